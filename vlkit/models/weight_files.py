"""Files of weights, read without running code from them."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlkit.errors import CheckpointError, ModelError

_LISTED = 4


def weight_names(path: Path) -> frozenset[str]:
    """The names of the tensors in a file, and with it the proof that it is whole and holds no code.

    Raises:
        CheckpointError: missing, cut, or no file of weights.
        ModelError: a pickle that would run code.
    """
    if path.suffix in (".npz", ".npy"):  # big_vision; open_clip reads it with numpy's allow_pickle off
        return frozenset()
    if path.suffix == ".safetensors":
        return frozenset(_open_safetensors(path).keys())
    return frozenset(_state_dict(path, _load_torch(path)))


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: missing, cut, or no safetensors file.
    """
    content = _open_safetensors(path)
    return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)


def read_any_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or torch file, on the CPU, without running code from it.

    Raises:
        CheckpointError: missing, cut, or no file of weights.
        ModelError: a pickle that would run code.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    content = _state_dict(path, _load_torch(path))
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps weights from fitting a model, a few names of each kind; empty when they fit."""
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    parts = [
        _some("missing", [name for name in expected if name not in found]),
        _some("not expected", [name for name in found if name not in expected]),
        _some("of another shape", shapes),
    ]
    return "; ".join(part for part in parts if part)


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:_LISTED])}{more}"


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file ({error}): it was cut or damaged. Copy or save it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read the weights {path}: {error.strerror or error}.") from error


def _load_torch(path: Path) -> Any:
    if _is_torchscript(path):
        raise ModelError(
            f"{path} is a TorchScript archive, which holds code: refused. Get a .safetensors file of these weights; "
            "OpenAI's are on the Hugging Face hub under timm/*_clip*.openai."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is a pickle that holds more than weights and could run code: refused. Convert it to safetensors "
            "where you trust it (safetensors.torch.save_file), or get a .safetensors file of these weights."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read the weights {path}: {error.strerror or error}.") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole file of weights ({error}). Copy it again.") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state_dict(path: Path, content: Any) -> Mapping[str, Any]:
    inner = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(inner, Mapping) or not all(isinstance(name, str) for name in inner):
        raise CheckpointError(f"{path} holds a {type(inner).__name__}; expected a state dict (names and tensors).")
    return {name.removeprefix("module."): value for name, value in inner.items()}
