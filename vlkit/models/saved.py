"""Models on disk: folders that appear whole or not at all, and that can prove they are whole.

A model folder is open_clip's `local-dir:` layout, so plain open_clip loads it, with vlkit's own record beside it:

    open_clip_config.json          model_cfg, preprocess_cfg
    open_clip_model.safetensors    weights
    vlkit.json                     the encoder's record, the loss family, the version
    manifest.json                  size and sha256 of every file
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vlkit import __version__
from vlkit.errors import CheckpointError, ModelError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.lora import merged_weights

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
RECORD = "vlkit.json"
MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


def save_encoder(encoder: DualEncoder, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write a model folder; an older one of that name is replaced once the new one is whole.

    Args:
        encoder: any encoder built on open_clip.
        folder: the folder to make.
        weights: on the CPU, no two sharing memory, in place of the encoder's own (with LoRA's updates merged).

    Returns:
        The folder.

    Raises:
        ModelError: the encoder is not built on open_clip, so that the layout cannot hold it.
        CheckpointError: it cannot be written (no space, no permission).
    """
    from safetensors.torch import save_file

    record = encoder.record()
    if record.get("library") != "open_clip":
        raise ModelError(f"Only encoders built on open_clip can be saved as a model folder, not {type(encoder)}.")
    config = {"model_cfg": record["model_cfg"], "preprocess_cfg": record["preprocess_cfg"]}
    with atomic_folder(folder) as new:
        own = _on_cpu(merged_weights(encoder)) if weights is None else dict(weights)
        save_file(own, new / WEIGHTS, metadata={"format": "pt"})
        write_json(new / CONFIG, config)
        write_json(new / RECORD, {"vlkit": __version__, "family": encoder.training_family, **record})
        encoder.tokenize.vocabulary.save(new)
        write_manifest(new)
    return Path(folder)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, the same bytes for the same value."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing or broken.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no whole JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A new folder that takes the target's name when the block ends, and vanishes when the block fails.

    Raises:
        CheckpointError: it cannot be written.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"Cannot write {target}: {error.strerror or error}.") from error
    try:
        yield new
        new.chmod(0o755)  # mkdtemp keeps others out
        _flush_tree(new)
        _swap(new, target)
    except OSError as error:
        raise CheckpointError(f"Cannot write {target}: {error.strerror or error}.") from error
    except SafetensorError as error:  # how it says that the disk is full
        raise CheckpointError(f"Cannot write {target}: {error}.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file below a folder in its manifest.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    entries = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    write_json(folder / MANIFEST, {"files": entries})


def check_manifest(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest: None when every file is as it was written."""
    try:
        entries = read_json(folder / MANIFEST).get("files")
    except CheckpointError as error:
        return str(error)
    if not isinstance(entries, dict):
        return f"{folder / MANIFEST} lists no files"
    for name, expected in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        if _sha256(path) != expected["sha256"]:
            return f"{path} differs from what was written"
    return None


def is_model_folder(folder: Path) -> bool:
    """Whether a folder claims to be a model folder: it has open_clip's configuration."""
    return (folder / CONFIG).is_file()


def model_folder_of_run(run: str | Path) -> Path:
    """The newest whole model of a run folder: its final one, else that of its last good checkpoint.

    Args:
        run: a run folder, or a model folder itself.

    Raises:
        CheckpointError: there is none; the message says what was found.
    """
    run = Path(run).expanduser()
    if is_model_folder(run):
        return run
    if not run.is_dir():
        raise CheckpointError(f"No run folder {run}. Expected the `out` folder of `vlkit train`.")
    problems: list[str] = []
    for whole, model in _candidates(run):
        problem = check_manifest(whole)
        if problem is None and is_model_folder(model):
            for line in problems:
                _log.warning("Skipped a broken model: %s. Using %s instead.", line, model)
            return model
        problems.append(problem or f"{model} has no {CONFIG}")
    found = "; ".join(problems) or f"{run} holds {_listing(run)}"
    raise CheckpointError(
        f"No whole model in run folder {run}: {found}. Expected {run / 'model'} or {run / 'checkpoints' / 'step_*'}. "
        "Train it first, or continue it with `vlkit train --resume`."
    )


def _candidates(run: Path) -> Iterator[tuple[Path, Path]]:
    """(folder with the manifest, model folder), best first."""
    if (run / "model").is_dir():
        yield run / "model", run / "model"
    steps = sorted((run / "checkpoints").glob("step_*"), key=lambda path: path.name, reverse=True)
    yield from ((step, step / "model") for step in steps if step.is_dir())


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    return {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(new: Path, target: Path) -> None:
    """Give `new` the name of `target`. The old folder keeps a hidden name until the new one is in place."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(old / target.name)
    new.rename(target)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    _flush(target.parent)
