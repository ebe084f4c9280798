"""Methods by name: the rows of every folder's table, and the class behind a name.

find_method("tip_adapter")              # <class TipAdapter>, from vlkit/addons/terms/tip_adapter.py
make_addon("tip_adapter:alpha=2.0,beta=5")
make_addon("addons/tip")                # a folder that `vlkit adapt` saved
make_addon("my_method.py:strength=2")   # a file of your own with `ADDON = ...`
"""

import types
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from vlkit.addons.base import SLOTS, AddOn, is_setting
from vlkit.contracts import MethodRow
from vlkit.errors import ConfigError, did_you_mean


def addon_rows() -> dict[str, MethodRow]:
    """Every add-on's row by name, in the order of the slots."""
    return {name: row for slot in SLOTS for name, row in sorted(_table(f"vlkit.addons.{slot}").items())}


def library_rows() -> Iterator[MethodRow]:
    """Rows of the tables in vlkit: losses, heads, interpretation, index, add-ons. Those of `eval` are its own."""
    for module in ("vlkit.losses", "vlkit.models.heads", "vlkit.interpret", "vlkit.index"):
        yield from (row for _, row in sorted(_table(module).items()))
    yield from addon_rows().values()


def find_method(name: str) -> type[AddOn]:
    """The class of an add-on.

    Raises:
        ConfigError: no such method; names the nearest ones.
    """
    rows = addon_rows()
    if name not in rows:
        raise ConfigError(f"There is no add-on {name!r}. {did_you_mean(name, rows)} `vlkit methods` lists all.")
    return _class_in(import_module(f"vlkit.addons.{rows[name].slot}.{name}"), name)


def make_addon(text: str) -> AddOn:
    """The add-on of `NAME[:key=value,...]`, of a saved folder, or of a file of the user's own.

    Raises:
        ConfigError: an unknown name or setting, or a value of another type.
        CheckpointError: a folder without an add-on in it, or with a damaged one.
    """
    if not text.strip():
        raise ConfigError("An add-on without a name; expected NAME[:key=value,...], a saved folder, or a file.py.")
    if Path(text).is_dir():
        from vlkit.addons.saved import load_addon  # it looks methods up here

        return load_addon(text)
    name, _, rest = text.partition(":")
    method = _from_file(Path(name)) if name.endswith(".py") else find_method(name)
    return method(**parse_settings(method, rest))


def parse_settings(method: type[AddOn], text: str) -> dict[str, Any]:
    """`key=value,key=value` as the method's settings, each of its field's type.

    Raises:
        ConfigError: an unknown key, one named twice, or a value that does not parse.
    """
    name = method.__module__.rpartition(".")[2]
    kinds, found = _kinds(method), {}
    for pair in text.split(",") if text else []:
        key, mark, value = (part.strip() for part in pair.partition("="))
        if not mark or not key:
            raise ConfigError(f"{pair!r} is no setting of {name}; write key=value, with commas between them.")
        if key not in kinds:
            raise ConfigError(f"{name} has no setting {key!r}. {did_you_mean(key, kinds) or 'It has none.'}")
        if key in found:
            raise ConfigError(f"{name} is given {key} twice.")
        found[key] = _parsed(kinds[key], value, f"{name}:{key}")
    return found


def _kinds(method: type[AddOn]) -> dict[str, Any]:
    return {one.name: one.type for one in fields(method) if is_setting(one)}


def _parsed(kind: Any, text: str, where: str) -> Any:
    """A value of one of the types that settings have: bool, int, float, str, a choice, or None."""
    if get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if type(None) in options and text.lower() == "none":
            return None
        kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ConfigError(f"{where} is {text!r}. {did_you_mean(text, [str(one) for one in get_args(kind)])}")
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{where} is {text!r}; expected {getattr(kind, '__name__', kind)}.") from error


def _table(module: str) -> dict[str, MethodRow]:
    """METHODS of a folder; none where the folder is not there yet or has no table."""
    try:
        return dict(getattr(import_module(module), "METHODS", {}))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return {}


def _class_in(module: types.ModuleType, name: str) -> type[AddOn]:
    found = getattr(module, "ADDON", None)
    if not (isinstance(found, type) and issubclass(found, AddOn)):
        raise ConfigError(f"{name} does not say which add-on it holds; its last line must be `ADDON = TheClass`.")
    return found


def _from_file(path: Path) -> type[AddOn]:
    """The add-on of a Python file the user named; its code runs."""
    spec = spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"There is no file {path}; expected a Python file with `ADDON = TheClass`.")
    module = module_from_spec(spec)
    # dataclasses look a class's module up by name.
    import sys

    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return _class_in(module, str(path))
