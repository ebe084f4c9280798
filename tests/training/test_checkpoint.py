"""The parts of a checkpoint that need no model: random states, what is deleted, what differs."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vlkit.config import OptimSettings
from vlkit.errors import CheckpointError
from vlkit.training import checkpoint
from vlkit.training.optim import make_optimizer


def folders(run: Path, *steps: int) -> None:
    for step in steps:
        folder = checkpoint.checkpoint_folder(run, step)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_random_states_are_restored_exactly() -> None:
    import json

    def draw() -> tuple[list[float], list[float], float, float]:
        return torch.randn(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    random.gauss(0, 1)  # half of a pair: the other half is part of the state
    states = json.loads(json.dumps(checkpoint.random_states()))
    first = draw()
    assert draw() != first
    checkpoint.restore_random_states(states)
    assert draw() == first


def test_the_last_and_the_best_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    folders(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "checkpoints" / ".step_00000006.new-abc").mkdir()
    (tmp_path / "checkpoints" / ".step_00000001.old").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, keep=[2])
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]
    checkpoint.prune(tmp_path, keep_last=9, keep=[])
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]


def test_damaged_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    folders(tmp_path, 3, 6, 9)
    checkpoint.set_aside(tmp_path, 6)
    assert names(tmp_path) == ["damaged_step_00000009", "step_00000003", "step_00000006"]
    folders(tmp_path, 9)
    checkpoint.set_aside(tmp_path, 6)  # once more
    assert names(tmp_path) == ["damaged_step_00000009", "step_00000003", "step_00000006"]


def test_without_any_whole_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest_good(tmp_path) == (None, [])
    folders(tmp_path, 1, 2)
    found, notes = checkpoint.latest_good(tmp_path)
    assert found is None
    assert ["step_00000002" in notes[0], "step_00000001" in notes[1]] == [True, True]
    assert all("manifest.json" in note for note in notes)


def test_differences_name_each_setting() -> None:
    old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "gone": None}
    new = {"a": 1, "b": {"c": 3, "d": [1]}, "new": "x"}
    assert checkpoint.differences(old, new) == ["b.c: 2 -> 3", "b.d: [1, 2] -> [1]", 'new: null -> "x"']
    assert checkpoint.differences(old, old) == []


def test_the_state_of_the_optimizer_keeps_the_layout_of_its_parameters() -> None:
    # The fused kernel goes through memory: a state laid out otherwise would be applied to other weights.
    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return module, make_optimizer(module, OptimSettings(lr=0.1))

    def advance(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(1)
        optimizer.zero_grad()
        (module(torch.randn(2, 3, 5, 5)) * torch.randn(2, 4, 3, 3)).sum().backward()
        optimizer.step()

    first, optimizer = trained()
    advance(first, optimizer)
    stored = {name: value.clone().contiguous() for name, value in checkpoint._optimizer_tensors(optimizer).items()}
    second, other = trained()
    second.load_state_dict(first.state_dict())
    checkpoint._load_optimizer(other, stored, Path("somewhere"))
    advance(first, optimizer)
    advance(second, other)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_state_of_other_parameters_is_refused() -> None:
    module = nn.Linear(2, 2)
    optimizer = make_optimizer(module, OptimSettings())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    stored = checkpoint._optimizer_tensors(optimizer)
    with pytest.raises(CheckpointError, match=r"other parameters than are trained now: bias, weight \(2 differ\)|0\."):
        checkpoint._load_optimizer(make_optimizer(nn.Sequential(nn.Linear(2, 2)), OptimSettings()), stored, Path("x"))
