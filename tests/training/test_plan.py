"""What a dry run finds out, against what can be counted by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlkit.config import RunConfig, load_run
from vlkit.training.plan import dry_run

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def settings(*overrides: str) -> RunConfig:
    run: dict[str, Any] = {
        "run": {"out": "nowhere/out", "samples": 6400, "device": "cpu"},
        "model": {"architecture": ARCHITECTURE},
        "data": {"train": "nowhere/shards", "global_batch_size": 64},
        "optim": {"warmup": 0.1},
    }
    return load_run(run, overrides)


def test_without_data_the_plan_says_so_and_what_it_cannot_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = dry_run(settings())
    assert plan.data.problem is not None and "nowhere/shards" in plan.data.problem
    assert (plan.steps, plan.samples, plan.warmup_steps) == (100, 6400, 10)
    assert plan.steps_per_epoch is None and plan.epochs is None
    assert list(tmp_path.iterdir()) == []  # a dry run writes nothing
    plan = dry_run(settings("run.epochs=3"))
    assert (plan.steps, plan.samples, plan.warmup_steps) == (None, None, None)


def test_memory_is_counted() -> None:
    plan = dry_run(settings('model.freeze=["image"]', "data.global_batch_size=32"))
    trained = plan.parameters["text"]["trainable"] + 1
    everything = trained + plan.parameters["image"]["total"]
    assert plan.parameters["image"]["trainable"] == 0
    assert plan.memory.gradients == 4 * trained
    assert 8 * trained <= plan.memory.optimizer <= 8 * trained + 1000  # two moments and a count of steps
    assert 0 <= plan.memory.weights - 4 * everything < 4000  # the causal mask, mean and std
    assert plan.memory.total == sum(
        [plan.memory.weights, plan.memory.gradients, plan.memory.optimizer, plan.memory.activations]
    )
    assert plan.to_dict()["memory"]["total"] == plan.memory.total


def test_activations_of_a_larger_batch_are_extrapolated() -> None:
    measured, twice = dry_run(settings("data.global_batch_size=32")), dry_run(settings("data.global_batch_size=64"))
    assert (twice.memory.rows_measured, twice.memory.rows) == (32, 64)
    # What does not grow with the batch is small here, so twice the images keep about twice the memory.
    assert twice.memory.activations == pytest.approx(2 * measured.memory.activations, rel=0.1)


def test_kept_bytes_of_a_layer_counted_by_hand() -> None:
    from vlkit.training.plan import _KeptBytes

    layer = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    kept = _KeptBytes(layer)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        layer(torch.zeros(10, 8, requires_grad=True)).sum()
    # The input of each linear layer; the output of tanh is the input of the second.
    assert kept.total == 4 * (10 * 8 + 10 * 16)
