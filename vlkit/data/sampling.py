"""From what a run file says about its training data to the plan of its batches.

    data = open_training_set({"shards/a": 2.0, "shards/b": 1.0})
    planned = plan_batches(data, Sampling(), seed=0, global_batch_size=256)
    planned.plan.batch(0, 0)
    planned.table(steps=1000)            # a line a source: its share, how many samples that is, how many it gives

Four kinds of plan, chosen by what is asked for:

- neither weights nor anything below: each sample once an epoch (`EpochPlan`); `remainder` says what becomes of the
  samples that do not fill a batch;
- weights: every batch holds its exact share of each source. An epoch is as many samples as the sources hold together,
  unless `samples_per_epoch` says otherwise; a source with a large weight is then seen several times in one;
- `samples_per_epoch` alone: epochs of that length that go on where the one before stopped, so that each sample comes
  once in a pass over the set; with `replacement`, every sample is drawn anew, for sets too large for a pass;
- `balance`: every batch holds equally many samples of each class (one more or less where it does not divide).

All but the first fill every batch, so `remainder` has no effect there.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np

from vlkit.contracts import Progress
from vlkit.data.balance import Classes, find_classes
from vlkit.data.epoch_plan import EpochPlan, Ids, Plan, Remainder
from vlkit.data.pass_order import WINDOW
from vlkit.data.shard_index import ShardSet, ShardSpec
from vlkit.data.share_plan import GroupDraws, ReplacementDraws, SharePlan, SourceDraws
from vlkit.errors import ConfigError, DataError

Sources = ShardSpec | Mapping[str, float]


@dataclass(frozen=True)
class Sampling:
    """How samples are chosen; see the module's head."""

    remainder: Remainder = "drop"
    samples_per_epoch: int | None = None
    replacement: bool = False
    balance: str | None = None  # "cls", or a field of the samples' `.json`


@dataclass(frozen=True)
class TrainingSet:
    """Shards of one or several sources under one running number, source after source."""

    shards: ShardSet
    names: tuple[str, ...]  # of the sources, as they were written
    num_shards: tuple[int, ...]  # of each
    weights: tuple[float, ...] | None  # None where no weights were given

    @property
    def offsets(self) -> list[Ids]:
        """For each source the number of the first sample of each of its shards, and the end of the last."""
        ends = np.cumsum([0, *self.num_shards])
        return [self.shards.offsets[a : b + 1] for a, b in itertools.pairwise(ends)]


class Group(NamedTuple):
    """A source or a class."""

    name: str
    num_samples: int
    share: float  # of every batch


class GroupCount(NamedTuple):
    """What a group gives in some number of steps."""

    name: str
    num_samples: int
    share: float
    expected: float  # samples, share of all
    planned: int  # samples, in whole numbers
    passes: float  # how often each of its samples comes


@dataclass(frozen=True)
class PlannedData:
    """A plan with what its batches are made of."""

    plan: Plan
    groups: tuple[Group, ...]
    kind: str  # "sources" or "classes"
    remainder: str  # one sentence
    first: Ids  # (S,) number of each source's first sample
    classes: Classes | None  # of a balanced plan
    record: Mapping[str, Any]  # what must be the same for a run to be continued, in JSON types; empty for plain epochs

    def group_of(self, ids: Ids) -> Ids:
        """The group of each sample."""
        if self.classes is not None:
            return self.classes.of_sample[ids].astype(np.int64)
        return np.searchsorted(self.first, ids, side="right") - 1

    def counts(self, step: int) -> Ids:
        """(S,) samples of each group in the global batches before `step`, by the plan."""
        if isinstance(self.plan, SharePlan):
            return self.plan.counts(step)
        epoch, index = self.plan.position(step)
        whole = self.plan.num_batches * self.plan.global_batch_size - self.plan.num_padding
        return np.array([epoch * whole + index * self.plan.global_batch_size], np.int64)

    def table(self, steps: int) -> list[GroupCount]:
        """One line a group: what it should give in so many steps, and what it does."""
        planned = self.counts(steps)
        total = int(planned.sum())
        return [
            GroupCount(*group, expected=group.share * total, planned=count, passes=count / group.num_samples)
            for group, count in zip(self.groups, planned.tolist(), strict=True)
        ]


def open_training_set(spec: Sources, progress: Progress | None = None, *, cache_size: int | None = None) -> TrainingSet:
    """Open the shards of one source, or of several with their weights; `progress` and `cache_size` as `ShardSet.open`.

    Raises:
        DataError: as `ShardSet.open`; or a shard belongs to two sources.
    """
    if not isinstance(spec, Mapping):
        shards = ShardSet.open(spec, progress, cache_size=cache_size)
        name = "::".join(map(str, spec)) if isinstance(spec, list | tuple) else str(spec)
        return TrainingSet(shards, (name,), (len(shards.shards),), None)
    opened = [ShardSet.open(source, progress, cache_size=cache_size) for source in spec]
    owner: dict[object, str] = {}
    for name, source in zip(spec, opened, strict=True):
        for shard in source.shards:
            other = owner.setdefault(shard.path, name)
            if other != name:
                raise DataError(f"Shard {shard.path} belongs to two sources, {other} and {name}. Name it in one.")
    together = ShardSet(tuple(shard for source in opened for shard in source.shards))
    return TrainingSet(together, tuple(spec), tuple(len(source.shards) for source in opened), tuple(spec.values()))


def plan_batches(
    data: TrainingSet,
    sampling: Sampling,
    *,
    seed: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    window: int = WINDOW,
    progress: Progress | None = None,
) -> PlannedData:
    """The plan that a training set and the settings ask for.

    Args:
        data: the shards.
        sampling: how samples are chosen.
        seed, global_batch_size, rank, world_size: see `EpochPlan`.
        window: samples that are mixed with each other, see `PassOrder`.
        progress: of reading the labels, with `balance`.

    Raises:
        ConfigError: settings that do not fit each other.
        DataError: fewer samples than a batch; or with `balance`, samples without a label.
    """
    ranks = _Ranks(seed=seed, global_batch_size=global_batch_size, rank=rank, world_size=world_size)
    first = np.array([part[0] for part in data.offsets])
    length = sampling.samples_per_epoch or data.shards.num_samples
    if sampling.balance is not None:
        return _balanced(data, sampling, sampling.balance, length, first, ranks, progress)
    sizes = [int(part[-1] - part[0]) for part in data.offsets]
    weights = data.weights or (1.0,)
    shares = [weight / sum(weights) for weight in weights]
    groups = tuple(map(Group, data.names, sizes, shares))
    if data.weights is None and sampling.samples_per_epoch is None and not sampling.replacement:
        plan = EpochPlan(data.shards.offsets, remainder=sampling.remainder, window=window, **ranks)
        kept: dict[str, Any] = {} if sampling.remainder == "drop" else {"remainder": sampling.remainder}
        return PlannedData(plan, groups, "sources", _remainder_of(plan), first, None, kept)
    draws = (
        ReplacementDraws(data.offsets, seed=seed, window=window)
        if sampling.replacement
        else SourceDraws(data.offsets, seed=seed, shares=shares, window=window)
    )
    mixed = SharePlan(draws, weights=weights, samples_per_epoch=length, **ranks)
    record = {
        "samples_per_epoch": length,
        "replacement": sampling.replacement,
        "sources": {
            str(number): {"num_samples": size, "share": share}
            for number, (size, share) in enumerate(zip(sizes, shares, strict=True))
        },
    }
    return PlannedData(mixed, groups, "sources", _full(mixed, length), first, None, record)


class _Ranks(TypedDict):
    """What every plan is told."""

    seed: int
    global_batch_size: int
    rank: int
    world_size: int


def _balanced(
    data: TrainingSet,
    sampling: Sampling,
    label: str,
    length: int,
    first: Ids,
    ranks: "_Ranks",
    progress: Progress | None,
) -> PlannedData:
    if data.weights is not None or sampling.replacement:
        other = "weights of sources" if data.weights is not None else "data.replacement"
        raise ConfigError(f"data.balance and {other} both say how often a sample comes. Keep one of them.")
    classes = find_classes(data.shards, label, progress)
    members = np.argsort(classes.of_sample, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(classes.of_sample, minlength=len(classes.names)))])
    draws = GroupDraws(members, starts, seed=ranks["seed"])
    count = len(classes.names)
    plan = SharePlan(draws, weights=[1.0] * count, samples_per_epoch=length, **ranks)
    groups = tuple(Group(name, int(size), 1 / count) for name, size in zip(classes.names, draws.sizes, strict=True))
    record = {"samples_per_epoch": length, "balance": label}
    return PlannedData(plan, groups, "classes", _full(plan, length), first, classes, record)


def _remainder_of(plan: EpochPlan) -> str:
    if plan.num_padding:
        return f"keep: the last batch of an epoch has {plan.num_padding:,} rows without a sample"
    if plan.num_dropped:
        return f"drop: each epoch leaves out {plan.num_dropped:,} samples that fill no batch, others each time"
    return "none: the batches of an epoch come out even"


def _full(plan: SharePlan, length: int) -> str:
    rest = length - plan.num_batches * plan.global_batch_size
    return "none: every batch is full" + (f"; an epoch is {rest:,} samples shorter than asked for" if rest else "")


def spread(groups: Sequence[Group]) -> str:
    """The sizes of many groups in one line."""
    sizes = [group.num_samples for group in groups]
    return f"{len(sizes)} groups of {min(sizes):,} to {max(sizes):,} samples"
