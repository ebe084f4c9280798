"""What settings are made of: strictness, durations, `--set` overrides, and messages a user can act on.

The sections of the run file themselves are in `vlkit/config.py`.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from pydantic_core import ErrorDetails

from vlkit.errors import ConfigError, did_you_mean


class Settings(BaseModel):
    """A section: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_SECONDS = {"minute": 60.0, "hour": 3600.0}


class Duration(NamedTuple):
    """A length of time in training, e.g. Duration(2, "epochs")."""

    amount: float
    unit: Literal["steps", "samples", "epochs", "seconds", "fraction"]  # fraction: of the whole run

    @classmethod
    def parse(cls, value: object) -> "Duration":
        """Read "500 steps", "1 epoch", "1e6 samples", "300 seconds", "20 minutes", or a whole number of steps.

        Raises:
            ValueError: anything else.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value, "steps")
        match = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d+)?)\s*(step|sample|epoch|second|minute|hour)s?\s*", str(value))
        if isinstance(value, str) and match:
            if match[2] in _SECONDS:
                return cls(float(match[1]) * _SECONDS[match[2]], "seconds")
            return cls(float(match[1]), match[2] + "s")  # type: ignore[arg-type]
        raise ValueError('expected a duration such as "500 steps", "2 epochs", "100000 samples" or "300 seconds"')

    @classmethod
    def parse_period(cls, value: object) -> "Duration":
        """`parse`, and longer than nothing: how often something happens."""
        duration = cls.parse(value)
        if duration.amount <= 0:
            raise ValueError("expected a duration above 0")
        return duration

    @classmethod
    def parse_part(cls, value: object) -> "Duration":
        """`parse` without seconds; a number with a point, such as 0.05, is a fraction of the run."""
        if isinstance(value, float) and 0 <= value < 1:
            return cls(value, "fraction")
        if isinstance(value, float) or (duration := cls.parse(value)).unit == "seconds":
            raise ValueError('expected a number of steps, a fraction of the run below 1, or e.g. "2 epochs"')
        return duration

    def in_steps(self, *, total: int, steps_per_epoch: int, batch_size: int) -> int:
        """The nearest whole number of optimisation steps. Seconds have none."""
        assert self.unit != "seconds", self
        length = {"steps": 1.0, "samples": 1 / batch_size, "epochs": steps_per_epoch, "fraction": total}
        return round(self.amount * length[self.unit])

    def __str__(self) -> str:
        unit = self.unit if self.amount != 1 else self.unit.removesuffix("s")
        return f"{self.amount:.10g} {unit}"

    def plain(self) -> str | float:
        """What a run file would say."""
        return self.amount if self.unit == "fraction" else str(self)


Period = Annotated[Duration, PlainValidator(Duration.parse_period), PlainSerializer(Duration.plain)]
Part = Annotated[Duration, PlainValidator(Duration.parse_part), PlainSerializer(Duration.plain)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


def _paths(value: object) -> str | list[str]:
    many = value if isinstance(value, list) else [value]
    if not many or not all(isinstance(path, str) and path for path in many):
        raise ValueError("expected a path, or a list of paths")
    return value  # type: ignore[return-value]


def _sources(value: object) -> object:
    if not isinstance(value, dict):
        return _paths(value)
    for source, weight in value.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not source or not number or not 0 < weight < float("inf"):
            raise ValueError(f"expected a weight above 0 for each source; {source!r} has {weight!r}")
    if not value:
        raise ValueError("expected a path, a list of paths, or a table of paths with their weights")
    return {source: float(weight) for source, weight in value.items()}


def _workers(value: object) -> str | int:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError('expected "auto" or a number of processes from 0')


def _device(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        return value
    raise ValueError('expected "auto", "cpu", "mps", "cuda" or e.g. "cuda:1"')


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _size(value: object) -> int:
    """ "200 GB", or a number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?B)\s*", value) if isinstance(value, str) else None
    if match and (size := round(float(match[1]) * _BYTES[match[2]])) > 0:
        return size
    raise ValueError('expected a size such as "200 GB", or a number of bytes')


# Functions, because pydantic reports a union of types as one problem for each of its members.
Paths = Annotated[Any, PlainValidator(_paths)]
Sources = Annotated[Any, PlainValidator(_sources)]
Workers = Annotated[Any, PlainValidator(_workers)]
Size = Annotated[int, PlainValidator(_size)]  # bytes
Device = Annotated[str, PlainValidator(_device)]


def apply_override(tree: dict[str, Any], override: str, exclusive: Sequence[Sequence[str]]) -> None:
    """Write one `--set section.key=value` into the raw tree of a run file.

    Args:
        tree: changed in place.
        override: the value is TOML; what is no TOML is taken as text, so that paths need no quotes.
        exclusive: groups of dotted keys of which a run file holds one; setting one removes the others.

    Raises:
        ConfigError: no "=", or the path runs through something that is neither table nor list.
    """
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"Override {override!r}: expected section.key=value, e.g. optim.lr=3e-4.")
    for group in exclusive:
        if ".".join(keys[:2]) in group and isinstance(section := tree.get(keys[0]), dict):
            for rival in group:
                if rival != ".".join(keys[:2]):
                    section.pop(rival.partition(".")[2], None)
    node: Any = tree
    for position, key in enumerate(keys[:-1]):
        if isinstance(node, dict):
            node.setdefault(key, {})
        node = _child(node, key, override, keys[:position])
    if isinstance(node, dict):
        node[keys[-1]] = _toml_value(value)
    else:
        _child(node, keys[-1], override, keys[:-1])
        node[int(keys[-1])] = _toml_value(value)


def _child(node: Any, key: str, override: str, place: Sequence[str]) -> Any:
    if isinstance(node, dict):
        return node[key]
    if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
        return node[int(key)]
    held = f"a list of {len(node)}" if isinstance(node, list) else json.dumps(node)
    raise ConfigError(f"Override {override!r}: {'.'.join(place)} is {held} and has no {key!r}.")


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Each problem on one line: key path = what was found: what was expected, or the nearest valid key."""
    return [_problem(detail, root) for detail in error.errors()]


def _problem(detail: ErrorDetails, root: type[BaseModel]) -> str:
    place = detail["loc"]
    path = ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key. {_nearest_key(place, root)}"
    if detail["type"] == "missing":
        return f"{path}: missing."
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    message = message.replace("a valid array", "a list").replace("an object", "a table")
    if not place:
        return f"{message}."
    found = "" if isinstance(detail["input"], dict) else f" = {_short(detail['input'])}"
    return f"{path}{found}: {message}."


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_key(place: tuple[int | str, ...], root: type[BaseModel]) -> str:
    section = tuple(str(part) for part in place[:-1] if not isinstance(part, int))
    keys = list(_all_keys(root))
    elsewhere = [".".join(path) for path in keys if path[-1] == place[-1] and path[:-1] != section]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(str(place[-1]), [path[-1] for path in keys if path[:-1] == section])


def _all_keys(section: type[BaseModel], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*place, name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _all_keys(kind, (*place, name))
