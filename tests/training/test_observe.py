"""Accuracy against a loop, arithmetic against a count by hand, spikes in a made-up run, trackers."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.contracts import Features, ImageTextBatch
from vlkit.errors import ConfigError
from vlkit.training.observe import Accuracy, SpikeLog, contrastive_accuracy, count_flops, peak_memory, peak_tflops
from vlkit.training.tracking import Trackers, flat


def features(rows: int = 12, seed: int = 0) -> Features:
    made = torch.Generator().manual_seed(seed)
    own = torch.randint(0, rows, (rows + 5,), generator=made)
    image = F.normalize(torch.randn(rows, 4, generator=made), dim=1)
    text = F.normalize(image[own] + 0.8 * torch.randn(rows + 5, 4, generator=made), dim=1)
    return Features(image, text, own, torch.tensor(1.0))


@pytest.mark.parametrize("tile", [1, 40, 1 << 20])
def test_accuracy_is_that_of_a_loop(tile: int) -> None:
    given = features()
    valid = torch.ones(12, dtype=torch.bool)
    valid[[2, 7]] = False
    texts = [j for j, i in enumerate(given.text_to_image.tolist()) if valid[i]]
    right = [
        int(given.text_to_image[max(texts, key=lambda j: float(given.image[i] @ given.text[j]))]) == i
        for i in range(12)
        if valid[i]
    ]
    assert 0 < sum(right) < len(right)
    assert contrastive_accuracy(given, valid, tile).item() == pytest.approx(sum(right) / 10)
    assert contrastive_accuracy(given, torch.zeros(12, dtype=torch.bool)).item() == 0


class Objective(nn.Module):
    def forward(self, given: Features, batch: ImageTextBatch, step: int) -> Tensor:
        return given.image.sum()


def test_accuracy_is_taken_when_due() -> None:
    objective = Objective()
    accuracy = Accuracy(objective, every=3)
    found = []
    for step in range(6):
        accuracy.start(step)
        objective(features(), SimpleNamespace(valid=torch.ones(12, dtype=torch.bool)), step)
        found.append("contrastive_accuracy" in accuracy.watched())
    assert found == [False, False, True, False, False, True]


class Linear(nn.Module):
    """Images (3*2*2) -> 5, tokens -> 5: products whose operations can be counted by hand."""

    drops_patches = False
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words, self.text = nn.Linear(12, 5), nn.Embedding(9, 4), nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.norm(self.image(images.flatten(1).float()))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text(self.words(tokens).mean(1))


def test_operations_are_those_of_forward_and_backward_for_one_image() -> None:
    encoder = Linear().train()
    encoder.text.eval()
    batch: Any = SimpleNamespace(images=torch.zeros(6, 3, 2, 2), tokens=torch.zeros(12, 7, dtype=torch.int64))
    before, random = {name: value.clone() for name, value in encoder.state_dict().items()}, torch.get_rng_state()
    # Image: forward and the gradient of the weight. Each of its two texts: also the gradient of what went in.
    assert count_flops(encoder, batch) == 2 * 12 * 5 * 2 + 2 * (2 * 4 * 5 * 3)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert encoder.training and not encoder.text.training and encoder.image.weight.grad is None
    encoder.image.requires_grad_(False)
    assert count_flops(encoder, batch) < 2 * 12 * 5 * 2 + 2 * (2 * 4 * 5 * 3)  # type: ignore[arg-type]


def test_a_cpu_has_no_known_peak_but_memory() -> None:
    assert peak_tflops(torch.device("cpu"), "fp32") is None
    assert peak_memory(torch.device("cpu")) > 50 * 2**20


def test_only_a_jump_is_a_spike(tmp_path: Path) -> None:
    log = SpikeLog(tmp_path / "spikes.jsonl")
    losses = [5 - 0.01 * i + 0.05 * (i % 3) for i in range(60)]
    losses[5], losses[50] = 50.0, 9.0  # the first one comes before there is a measure
    for step, loss in enumerate(losses, 1):
        moment: Any = SimpleNamespace(step=step, loss=loss, grad_norm=1.0, keys=[f"a/{step}"])
        log(moment)
    assert not (tmp_path / "spikes.jsonl").exists()  # a window with 50.0 in it finds 9.0 ordinary
    log = SpikeLog(tmp_path / "spikes.jsonl", window=30)
    for step, loss in enumerate(losses, 1):
        moment = SimpleNamespace(step=step, loss=loss, grad_norm=1.0, keys=[f"a/{step}"])
        log(moment)
    (line,) = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert (line["step"], line["loss"], line["keys"]) == (51, 9.0, ["a/51"])
    assert 4.4 < line["mean"] < 4.9


RECORDER = """
calls = []
def init(**settings): calls.append(("init", settings))
def log(numbers, step): calls.append(("log", numbers, step))
def finish(): calls.append(("finish",))
"""
LINE = {"step": 3, "loss": 1.5, "parts": {"clip": 1.5}, "eval": {"recall@1": 0.5}, "name": "x"}


def test_numbers_reach_a_module_with_the_interface_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recording_tracker.py").write_text(RECORDER)
    (tmp_path / "no_tracker.py").write_text("def init(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    trackers = Trackers(("recording_tracker",), tmp_path / "run", {"a": 1}, print)
    trackers.log(LINE, 3)
    trackers.close()
    init, log, finish = sys.modules["recording_tracker"].calls
    assert init[1]["config"] == {"a": 1} and init[1]["name"] == "run" and finish == ("finish",)
    assert log[1:] == ({"loss": 1.5, "parts/clip": 1.5, "eval/recall@1": 0.5}, 3)
    with pytest.raises(ConfigError, match="'no_tracker', which is no tracker: it has no log, no finish"):
        Trackers(("no_tracker",), tmp_path, {}, print)
    with pytest.raises(ConfigError, match=r"'not_there', which cannot be imported.*vlkit\[tracking\]"):
        Trackers(("not_there",), tmp_path, {}, print)


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = RECORDER.replace("def log(numbers, step): ", "def log(numbers, step): 1 / 0; ")
    (tmp_path / "failing_tracker.py").write_text(failing)
    monkeypatch.syspath_prepend(tmp_path)
    said: list[str] = []
    trackers = Trackers(("failing_tracker",), tmp_path, {}, said.append)
    for step in (1, 2):
        trackers.log(LINE, step)
    trackers.close()
    assert len(said) == 1 and "failing_tracker failed and is left out" in said[0]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(("tensorboard",), tmp_path, {}, print)
    trackers.log(LINE, 3)
    trackers.close()
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in written.Scalars("eval/recall@1")] == [(3, 0.5)]


@pytest.mark.slow
def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    said: list[str] = []
    trackers = Trackers(("wandb",), tmp_path, {"optim": {"lr": 0.125}}, said.append)
    trackers.log(LINE, 3)
    trackers.close()
    assert said == []
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # Names and numbers stand in its records as text.
    assert [
        name for name in (b"eval/recall@1", b"parts/clip", b"optim", b"0.125") if name not in written.read_bytes()
    ] == []


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=r"'tensorboard', which is not installed.*vlkit\[tracking\]"):
        Trackers(("tensorboard",), tmp_path, {}, print)


def test_names_with_slashes() -> None:
    assert flat(LINE) == [("loss", 1.5), ("parts/clip", 1.5), ("eval/recall@1", 0.5)]
