"""Checkpoints: whole or absent, provably so, and enough to continue bit for bit.

    OUT/checkpoints/step_00000100/
        model/                    the encoder as `save_encoder` writes it: loads in vlkit and in its own library
        optimizer.safetensors     state of the optimiser and of the losses, by name of the parameter
        state.json                step, settings, identity of data and model, random states, versions
        manifest.json             size and sha256 of every file

The order of the samples and every random choice about them follow from seed and step, so that no state of the
loader is kept and the number of its workers may change. Tensors that FSDP spreads over processes are saved whole, so
that any number of processes continues, with DDP, FSDP or alone.
"""

import json
import platform
import random
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlkit import __version__
from vlkit.distributed import gather_objects, is_main, rank, world_size
from vlkit.errors import CheckpointError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.saved import (
    atomic_folder,
    check_manifest,
    layout_of,
    load_exact,
    read_json,
    save_encoder,
    write_json,
    write_manifest,
)
from vlkit.training.sharded import load_whole, placed_like, whole

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


class Found(NamedTuple):
    """The checkpoint to continue from."""

    path: Path | None  # None: there is none
    notes: list[str]  # what was passed over, and why


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first, whole or not."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())


def latest_good(run: Path) -> Found:
    """The newest checkpoint whose files are as they were written."""
    notes: list[str] = []
    for path in reversed(checkpoints(run)):
        problem = check_manifest(path)
        if problem is None:
            ending = f" Continuing from {path.name}." if notes else ""
            return Found(path, [note + ending for note in notes])
        notes.append(f"Checkpoint {path.name} is damaged ({problem}) and was passed over.")
    return Found(None, notes)


class Snapshot(NamedTuple):
    """All that a checkpoint holds, on the CPU and cut off from training, which may go on while it is written."""

    step: int
    weights: dict[str, Tensor]  # of the encoder, whole, under the names of its library
    tensors: dict[str, Tensor]  # of the optimiser and the losses, whole
    state: dict[str, Any]  # JSON types


def take_snapshot(
    step: int,
    encoder: DualEncoder,
    optimizer: torch.optim.Optimizer,
    losses: nn.Module,
    state: Mapping[str, Any],
) -> Snapshot | None:
    """Copy everything that a checkpoint holds. All processes call this; only the main one gets something.

    Args:
        state: what else to keep, in JSON types.
    """
    tensors = {f"optimizer.{name}": value for name, value in _optimizer_tensors(optimizer).items()}
    tensors |= {f"losses.{name}": value for name, value in losses.state_dict().items()}
    copies = [_on_cpu(values, is_main()) for values in (encoder.weights(), tensors)]
    random = gather_objects(random_states())
    if not is_main():
        return None
    rest = {"step": step, **state, "random": random, "processes": world_size(), "versions": versions()}
    return Snapshot(step, copies[0], copies[1], rest)


def write_snapshot(run: Path, snapshot: Snapshot, encoder: DualEncoder) -> Path:
    """Write the checkpoint of a step; it takes its name only when it is whole and on the disk.

    Args:
        encoder: whose record and tokenizer go with the weights; its own weights are not read.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    from safetensors.torch import save_file

    folder = checkpoint_folder(run, snapshot.step)
    with atomic_folder(folder) as new:
        save_encoder(encoder, new / "model", weights=snapshot.weights)
        save_file(snapshot.tensors, new / OPTIMIZER)
        write_json(new / STATE, snapshot.state)
        write_manifest(new)
    return folder


def load_checkpoint(
    folder: Path, encoder: DualEncoder, optimizer: torch.optim.Optimizer, losses: nn.Module
) -> dict[str, Any]:
    """Put a checkpoint into objects built from the same settings, spread over any number of processes or on one.

    Returns:
        The state it was saved with.

    Raises:
        CheckpointError: it belongs to another model; what differs is listed.
    """
    from safetensors.torch import load_file

    load_exact(encoder, folder / "model" / layout_of(encoder).weights, copy=load_whole)
    tensors = load_file(folder / OPTIMIZER)
    _load_optimizer(optimizer, _with_prefix(tensors, "optimizer."), folder)
    losses.load_state_dict(_with_prefix(tensors, "losses."))
    state = read_json(folder / STATE)
    # A process that was not there when it was saved keeps its own: training draws nothing from them.
    if rank() < len(state["random"]):
        restore_random_states(state["random"][rank()])
    return state


def prune(run: Path, keep_last: int, keep: Collection[int]) -> None:
    """Delete all checkpoints but the newest `keep_last` and those of the steps in `keep`; and what a crash left."""
    kept = {checkpoint_folder(run, step) for step in keep}
    for path in checkpoints(run)[:-keep_last]:
        if path not in kept:
            # Renamed first: a deletion that is interrupted must not leave half a checkpoint under this name.
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    for leftover in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`, which are damaged, so that none counts as the newest."""
    for path in checkpoints(run):
        if path.name > checkpoint_folder(run, step).name:
            aside = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def random_states() -> dict[str, Any]:
    """The global generators of torch (CPU), numpy and Python, as JSON types.

    The model does not depend on them, as training seeds torch anew for each step; what a user's own `every` draws
    from them does.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [name, np.asarray(keys, dtype="<u4").tobytes().hex(), *rest],
        "python": json.dumps(random.getstate()),
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """What `random_states` gave."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.frombuffer(bytes.fromhex(keys), dtype="<u4"), *rest))
    version, inner, gauss = json.loads(states["python"])
    random.setstate((version, tuple(inner), gauss))


def versions() -> dict[str, str]:
    """Of what decides the numbers; kept for provenance, never compared."""
    return {
        "vlkit": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Each setting in which two trees of JSON types differ, as "key: old -> new"."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{place}{key}.")
        elif before != after:
            found.append(f"{place}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return found


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _names(optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}|{key}": value for index, values in state.items() for key, value in values.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], folder: Path) -> None:
    numbers = {name: index for index, name in enumerate(_names(optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    saved = {name.rpartition("|")[0] for name in tensors}
    if saved != numbers.keys():
        odd = sorted(saved ^ numbers.keys())
        raise CheckpointError(
            f"{folder / OPTIMIZER} holds the state of other parameters than are trained now: {', '.join(odd[:5])}"
            f"{', ...' if len(odd) > 5 else ''} ({len(odd)} differ). Continue with the settings it was saved with."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        owner, _, key = name.rpartition("|")
        parameter = parameters[numbers[owner]]
        if value.shape == parameter.shape:
            # The fused kernel walks through memory, so the state must be laid out as its parameter (channels last).
            value = placed_like(value, parameter)
        state.setdefault(numbers[owner], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _on_cpu(values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies of whole tensors; with keep=False only the exchange that the others wait for."""
    found = {}
    for name, value in values.items():
        full = whole(value.detach())
        if keep:  # copied, because training goes on, and because safetensors refuses shared memory (tied weights)
            found[name] = full.to("cpu", copy=True).contiguous()
    return found


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["names"]]


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
