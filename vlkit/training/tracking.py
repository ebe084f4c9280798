"""The numbers of a run to where people look at them: TensorBoard, or any module with wandb's interface.

    [run]
    trackers = ["tensorboard", "wandb"]        # "trackio", "swanlab", ...: a module with init, log and finish

metrics.jsonl is written in any case. A tracker that fails while training goes on is said once and left alone.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from vlkit.errors import ConfigError


class Tracker(Protocol):
    """Takes the numbers of steps."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of one step, under names with slashes."""

    def close(self) -> None:
        """No more will come."""


class Trackers:
    """All trackers of a run as one.

    Args:
        names: "tensorboard", or the name of a module with wandb's interface.
        folder: of the run.
        config: the settings, as JSON types.
        say: takes remarks.

    Raises:
        ConfigError: one is not installed, or has another interface.
    """

    def __init__(
        self, names: tuple[str, ...], folder: Path, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._trackers = {name: open_tracker(name, folder, config) for name in dict.fromkeys(names)}

    def log(self, line: Mapping[str, Any], step: int) -> None:
        """A line of metrics.jsonl."""
        self._each("log", dict(flat(line)), step)

    def close(self) -> None:
        """No more will come."""
        self._each("close")

    def _each(self, what: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:  # whatever a service raises: a training of days does not end by it
                del self._trackers[name]
                self._say(f"Tracker {name} failed and is left out from now on: {error!r}. See metrics.jsonl.")


def flat(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a line with sub-tables, under names with slashes; the step itself is left out."""
    found: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and prefix + key != "step":
            found.append((prefix + key, float(value)))
    return found


def open_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """One tracker by name.

    Raises:
        ConfigError: it is not installed, or has another interface.
    """
    if name == "tensorboard":
        return _TensorBoard(folder / "tensorboard")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"run.trackers names {name!r}, which cannot be imported ({error}). pip install 'vlkit[tracking]' brings "
            "tensorboard and wandb."
        ) from error
    lacking = [part for part in ("init", "log", "finish") if not callable(getattr(module, part, None))]
    if lacking:
        raise ConfigError(
            f"run.trackers names {name!r}, which is no tracker: it has no {', no '.join(lacking)}. Expected "
            '"tensorboard", or a module with the interface of wandb.'
        )
    return _Wandb(module, folder, config)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"run.trackers names 'tensorboard', which is not installed ({error}). pip install 'vlkit[tracking]'."
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, module: Any, folder: Path, config: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project="vlkit", name=folder.name, config=dict(config), dir=str(folder))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()
