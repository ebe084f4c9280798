"""Add-ons on disk: tensors as safetensors, the rest as JSON, with the fingerprint of the encoder they belong to.

    save_addon(fitted, "addons/tip")       # addons/tip/addon.json, addons/tip/addon.safetensors
    addon = load_addon("addons/tip")

No code is stored: `addon.json` names the method, and its file in this package is what runs.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlkit import __version__
from vlkit.addons.base import AddOn, Fitted, State
from vlkit.addons.registry import find_method
from vlkit.data.atomic import atomic_file
from vlkit.errors import CheckpointError, ConfigError, DataError
from vlkit.features.feature_set import Fingerprint

RECORD, TENSORS = "addon.json", "addon.safetensors"
FORMAT = 1


def save_addon(addon: AddOn, folder: str | Path) -> Path:
    """Write a fitted add-on; returns the folder.

    Raises:
        ConfigError: it is not fitted, or its method belongs to no slot of this package.
        DataError: it cannot be written.
    """
    if addon.fitted is None:
        raise ConfigError(f"{addon.name} is not fitted; there is nothing to save.")
    find_method(addon.name)  # what cannot be found again is not worth saving
    state, folder = addon.state(), Path(folder)
    fitted = {**asdict(addon.fitted), "encoder": addon.fitted.encoder.to_json()}
    record = {
        "format": FORMAT,
        "vlkit": __version__,
        "method": addon.name,
        "slot": addon.slot,
        "values": state.values,
        "fitted": fitted,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, folder / TENSORS)
        with atomic_file(folder / RECORD) as file:  # last: a folder without it holds no add-on
            file.write(json.dumps(record, indent=2, allow_nan=False).encode())
    except OSError as error:
        raise DataError(f"Cannot write the add-on to {folder}: {error.strerror or error}.") from error
    return folder


def load_addon(folder: str | Path) -> AddOn:
    """The add-on in a folder, fitted as it was.

    Raises:
        CheckpointError: no add-on there, or a damaged one.
        ConfigError: of a method, or with settings, that this version does not have.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        method, values, fitted = record["method"], record["values"], record["fitted"]
        tensors = load_file(folder / TENSORS)
        found = Fitted(
            encoder=Fingerprint.from_json(fitted["encoder"], folder / RECORD),
            logit_scale=float(fitted["logit_scale"]),
            task=fitted["task"],
            class_names=tuple(fitted["class_names"]),
            before=tuple(fitted["before"]),
            seen=dict(fitted["seen"]),
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no add-on: it has no {Path(error.filename or RECORD).name}. `vlkit adapt --out DIR` makes "
            "such folders."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The add-on in {folder} is damaged ({error}). Copy or fit it again.") from error
    return find_method(str(method)).from_state(State(tensors, {k: _frozen(v) for k, v in values.items()}), found)


def _frozen(value: Any) -> Any:
    """JSON has no tuples; add-ons, being frozen, no lists."""
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value
