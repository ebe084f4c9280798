"""Models on disk: folders that appear whole or not at all, and that can prove they are whole.

A model folder is in the layout of the library the model is built on, so that plain open_clip (`local-dir:`) or
transformers (`from_pretrained`) loads it, with vlkit's own record beside it:

    open_clip_config.json, open_clip_model.safetensors              on open_clip
    config.json, preprocessor_config.json, model.safetensors        on transformers
    vlkit.json                     the encoder's record, the loss family, the version
    manifest.json                  size and sha256 of every file
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlkit import __version__
from vlkit.errors import CheckpointError, ModelError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.hf_layout import processor_of, write_clip_tokenizer
from vlkit.models.lora import has_lora, merge_updates, merged_weights
from vlkit.models.tokenizers import CLIP_BPE
from vlkit.models.weight_files import differences, read_weights

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
RECORD = "vlkit.json"
MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Names of a model folder's main files."""

    config: str
    weights: str


# By the library a model is built on.
LAYOUTS = {
    "open_clip": Layout(CONFIG, WEIGHTS),
    "transformers": Layout("config.json", "model.safetensors"),
}


def layout_of(encoder: DualEncoder) -> Layout:
    """How an encoder is saved.

    Raises:
        ModelError: its library is none of those that have a layout.
    """
    library = encoder.record().get("library")
    if library not in LAYOUTS:
        raise ModelError(
            f"Only encoders built on {' or '.join(LAYOUTS)} can be saved as a model folder, not {type(encoder)}."
        )
    return LAYOUTS[str(library)]


def save_encoder(encoder: DualEncoder, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write a model folder; an older one of that name is replaced once the new one is whole.

    Args:
        encoder: any encoder built on open_clip or transformers.
        folder: the folder to make.
        weights: on the CPU, no two sharing memory, in place of the encoder's own (with LoRA's updates merged).

    Returns:
        The folder.

    Raises:
        ModelError: the encoder is built on another library, so that no layout can hold it.
        CheckpointError: it cannot be written (no space, no permission).
    """
    from safetensors.torch import save_file

    layout, record = layout_of(encoder), encoder.record()
    with atomic_folder(folder) as new:
        own = _on_cpu(merged_weights(encoder)) if weights is None else dict(weights)
        save_file(own, new / layout.weights, metadata={"format": "pt"})
        if layout is LAYOUTS["open_clip"]:
            config = {"model_cfg": record["model_cfg"], "preprocess_cfg": record["preprocess_cfg"]}
        else:
            config = record["model_cfg"]
            write_json(new / "preprocessor_config.json", processor_of(encoder.preprocess, record["architecture"]))
            if encoder.tokenizer_id == CLIP_BPE:
                write_clip_tokenizer(new, encoder.context_length)
        write_json(new / layout.config, config)
        write_json(new / RECORD, {"vlkit": __version__, "family": encoder.training_family, **record})
        encoder.tokenize.vocabulary.save(new)
        write_manifest(new)
    return Path(folder)


def load_exact(
    encoder: DualEncoder,
    path: Path,
    copy: Callable[[dict[str, Tensor], dict[str, Tensor]], None] | None = None,
) -> None:
    """Put weights saved by `save_encoder` into an encoder: every name and shape must agree.

    Args:
        copy: (the encoder's tensors, those read) -> None, for tensors that need more than a plain copy.

    Raises:
        CheckpointError: the file is cut, or belongs to another architecture; the message lists what differs.
    """
    found = read_weights(path)
    if not has_lora(encoder):
        found = merge_updates(found)  # a checkpoint of a run with LoRA keeps both apart
    own = encoder.weights()
    wrong = differences(found=found, expected=own)
    if wrong:
        name = encoder.record()["architecture"]
        raise CheckpointError(f"{path} does not hold weights of architecture {name}: {wrong}")
    (copy or _copy_each)(own, found)


@torch.no_grad()
def _copy_each(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])


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


def layout_in(folder: Path) -> Layout | None:
    """The layout of a folder that claims to be a model folder; None for any other.

    One of transformers counts only with vlkit's record: without it, it is a model of another tool (`hf:FOLDER`).
    """
    if (folder / CONFIG).is_file():
        return LAYOUTS["open_clip"]
    layout = LAYOUTS["transformers"]
    return layout if (folder / RECORD).is_file() and (folder / layout.config).is_file() else None


def is_model_folder(folder: Path) -> bool:
    """Whether a folder claims to be a model folder."""
    return layout_in(folder) is not None


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
        problems.append(problem or f"{model} has no {CONFIG} (or config.json and {RECORD})")
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
