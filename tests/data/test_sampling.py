"""From what a run file says to a plan: sources and weights, classes, fixed epochs; and what does not fit together."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vlkit.data import balance
from vlkit.data.balance import find_classes
from vlkit.data.epoch_plan import EpochPlan
from vlkit.data.sampling import PlannedData, Sampling, TrainingSet, open_training_set, plan_batches
from vlkit.errors import ConfigError, DataError


def files_of(numbers: list[int]) -> Iterator[tuple[str, bytes]]:
    for number in numbers:
        about = {"kind": ("cat", "dog", "eel")[0 if number < 6 else 1 + number % 2], "odd": [number]}
        files = {"jpg": b"x", "cls": b"%d" % (number % 4), "json": json.dumps(about).encode()}
        yield from ((f"{number:06}.{suffix}", content) for suffix, content in files.items())


@pytest.fixture
def write(write_tar: Callable[..., Path]) -> Callable[..., Path]:
    """`write(folder, 20)`: that many samples in two shards."""

    def make(folder: Path, count: int, shards: int = 2) -> Path:
        for shard, numbers in enumerate(np.array_split(np.arange(count), shards)):
            write_tar(folder / f"{shard:05}.tar", files_of(numbers.tolist()))
        return folder

    return make


@pytest.fixture
def data(tmp_path: Path, write: Callable[..., Path]) -> TrainingSet:
    return open_training_set({str(write(tmp_path / "a", 30)): 2.0, str(write(tmp_path / "b", 10, 3)): 1.0})


def plan(data: TrainingSet, sampling: Sampling | None = None, batch: int = 6) -> PlannedData:
    return plan_batches(data, sampling or Sampling(), seed=0, global_batch_size=batch)


def test_a_mixture_and_its_table(data: TrainingSet, tmp_path: Path) -> None:
    planned = plan(data)
    assert planned.plan.num_batches == 6  # 40 samples at 6 a batch
    a, b = planned.table(steps=60)
    assert (a.name, a.num_samples, a.share, a.planned) == (str(tmp_path / "a"), 30, 2 / 3, 240)
    assert (b.expected, b.planned, b.passes) == (pytest.approx(120), 120, 12)
    ids = planned.plan.batch(0, 0)
    assert np.bincount(planned.group_of(ids)).tolist() == [4, 2]
    assert data.shards.locate(29)[0].path.parent.name == "a" and data.shards.locate(30)[0].path.parent.name == "b"
    assert planned.record["sources"]["1"] == {"num_samples": 10, "share": 1 / 3}
    assert planned.remainder == "none: every batch is full; an epoch is 4 samples shorter than asked for"


def test_only_the_ratio_of_weights_counts(data: TrainingSet) -> None:
    doubled = TrainingSet(data.shards, data.names, data.num_shards, (4.0, 2.0))
    assert plan(doubled).record == plan(data).record
    assert np.array_equal(plan(doubled).plan.batch(3, 2), plan(data).plan.batch(3, 2))


def test_one_source_is_the_plain_plan_and_says_its_remainder(tmp_path: Path, write: Callable[..., Path]) -> None:
    data = open_training_set(str(write(tmp_path / "a", 20)))
    planned = plan(data)
    assert isinstance(planned.plan, EpochPlan) and planned.record == {}
    assert planned.remainder == "drop: each epoch leaves out 2 samples that fill no batch, others each time"
    assert planned.counts(4).tolist() == [24]
    keep = plan(data, Sampling(remainder="keep"))
    assert keep.remainder == "keep: the last batch of an epoch has 4 rows without a sample"
    assert keep.counts(8).tolist() == [40] and keep.record == {"remainder": "keep"}
    assert plan(data, batch=5).remainder == "none: the batches of an epoch come out even"


def test_epochs_of_a_fixed_length(tmp_path: Path, write: Callable[..., Path]) -> None:
    data = open_training_set(str(write(tmp_path / "a", 20)))
    short = plan(data, Sampling(samples_per_epoch=12)).plan
    ids = np.concatenate([short.batch(epoch, index) for epoch in range(5) for index in range(short.num_batches)])
    assert short.num_batches == 2 and np.bincount(ids).tolist() == [3] * 20  # five epochs are three passes
    drawn = plan(data, Sampling(samples_per_epoch=600, replacement=True)).plan
    assert drawn.num_batches == 100
    ids = np.concatenate([drawn.batch(0, index) for index in range(100)])
    assert len(np.bincount(ids)) == 20 and np.ptp(np.bincount(ids)) > 1


@pytest.mark.parametrize(("label", "sizes"), [("cls", {"0": 8, "1": 8, "2": 7, "3": 7}), ("kind", None)])
def test_balanced_batches(tmp_path: Path, label: str, sizes: dict[str, int] | None, write: Callable[..., Path]) -> None:
    data = open_training_set(str(write(tmp_path / "a", 30)))
    planned = plan(data, Sampling(balance=label), batch=12)
    assert planned.kind == "classes"
    found = {group.name: group.num_samples for group in planned.groups}
    assert found == (sizes or {"cat": 6, "dog": 12, "eel": 12})
    for epoch in range(3):
        for index in range(planned.plan.num_batches):
            counts = np.bincount(planned.group_of(planned.plan.batch(epoch, index)), minlength=len(found))
            assert counts.tolist() == [12 // len(found)] * len(found)


def test_labels_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]) -> None:
    monkeypatch.setattr(balance, "_WORTH_KEEPING", 10)
    shards = open_training_set(str(write(tmp_path / "a", 20))).shards
    first = find_classes(shards, "kind")
    (tmp_path / "a" / "00000.tar").write_bytes(b"")  # not looked at again
    again = find_classes(shards, "kind")
    assert again.names == first.names and np.array_equal(again.of_sample, first.of_sample)


def test_what_does_not_fit_together(data: TrainingSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.balance and weights of sources both say how often a sample comes"):
        plan(data, Sampling(balance="cls"))
    one = open_training_set(str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"data\.balance and data\.replacement both"):
        plan(one, Sampling(balance="cls", replacement=True))
    with pytest.raises(DataError, match=r"'odd': 30 of 30 samples have no text or number under 'odd'.*00000/000000"):
        plan(one, Sampling(balance="odd"))
    with pytest.raises(DataError, match=r"belongs to two sources"):
        open_training_set({str(tmp_path / "a"): 1.0, str(tmp_path / "a/00000.tar"): 1.0})
