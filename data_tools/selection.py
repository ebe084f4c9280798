"""Choose samples by rules and scores, to be listed or copied into new shards.

    chosen = select_samples("shards/", rules=Rules(min_words=3, min_side=200), scores=scores, keep_fraction=0.3)
    write_uids(chosen.uids[chosen.keep], "kept.npy");  copy_samples(chosen.shards, chosen.keep, "clean/")

As in DataComp, a fraction is one of all samples with a score, not of those that pass the rules; what is kept passes
all. Per sample 40 bytes stay in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.chunks import Chunk, cut_chunks, map_chunks
from data_tools.sample_facts import hash64
from data_tools.sample_scores import Scores, threshold_of_fraction
from data_tools.uid_lists import UID, as_numbers, is_in, read_uids, uid_of
from vlkit.contracts import Progress
from vlkit.data.decode import open_image
from vlkit.data.shard_index import ShardIndex, ShardSet, ShardSpec
from vlkit.errors import ConfigError, DataError

# From the chosen shards and the ids of their samples to their scores.
Scoring = Callable[[ShardSet, "SampleIds"], Scores]


@dataclass(frozen=True)
class Rules:
    """What a sample must fulfil; None asks for nothing. Of several captions one that fulfils a rule is enough."""

    min_words: int | None = None
    min_characters: int | None = None
    min_side: int | None = None  # pixels of the shorter side
    max_aspect: float | None = None  # longer side / shorter side

    def __post_init__(self) -> None:
        for name in ("min_words", "min_characters", "min_side", "max_aspect"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value:g}: expected at least 1.")

    @property
    def of_text(self) -> bool:
        """Whether captions matter."""
        return self.min_words is not None or self.min_characters is not None

    @property
    def of_size(self) -> bool:
        """Whether image sizes matter."""
        return self.min_side is not None or self.max_aspect is not None


class SampleIds(NamedTuple):
    """By what samples are known elsewhere; N samples."""

    uids: NDArray[np.void]  # (N,) UID
    keys: NDArray[np.uint64]  # (N,) hash64 of KEY
    names: NDArray[np.uint64]  # (N,) hash64 of SHARD/KEY


@dataclass(frozen=True)
class Selection:
    """Which samples are chosen, and why the others are not."""

    shards: ShardSet
    keep: NDArray[np.bool_]  # (N,)
    uids: NDArray[np.void]  # (N,)
    failed: dict[str, int]  # rule -> samples that fail it; a sample may fail several
    scores: Scores | None = None  # (N,)
    threshold: float | None = None  # score from which on samples are kept
    num_scored: int = field(default=0)

    def rows(self) -> list[tuple[str, object]]:
        """The figures as (name, value)."""
        rows: list[tuple[str, object]] = [("samples", len(self.keep)), *self.failed.items()]
        if self.scores is not None:
            rows.append(("with a score", self.num_scored))
        if self.threshold is not None:
            rows.append(("threshold", self.threshold))
        kept = int(self.keep.sum())
        return [*rows, ("kept", kept), ("share kept", round(kept / max(len(self.keep), 1), 4))]

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        threshold = self.threshold if self.threshold is None or np.isfinite(self.threshold) else None
        return {
            "num_samples": len(self.keep),
            "num_kept": int(self.keep.sum()),
            "failed": self.failed,
            "num_scored": self.num_scored,
            "threshold": threshold,
        }


class _Facts(NamedTuple):
    uids: NDArray[np.void]
    keys: NDArray[np.uint64]
    names: NDArray[np.uint64]
    passed: NDArray[np.bool_]  # (rules, n), in the order of _RULES


_RULES = ("min_words", "min_characters", "min_side", "max_aspect")


def select_samples(
    spec: ShardSpec,
    *,
    rules: Rules | None = None,
    scoring: Scoring | None = None,
    min_score: float | None = None,
    keep_fraction: float | None = None,
    uid_list: str | Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Choose samples.

    Args:
        spec: what `expand_shards` takes.
        rules: about captions and sizes; an image whose header cannot be read fulfils none about sizes.
        scoring: gives the scores; a sample without one is not kept where scores decide.
        min_score: keep scores from this on.
        keep_fraction: keep this best share of the scored samples, and all that are as good as the last of them.
        uid_list: a list as of `uid_lists`: keep none that is not in it.
        workers: processes beside this one.
        progress: called with (samples read, all samples).

    Raises:
        ConfigError: thresholds without scores, both kinds of them, or out of range.
        DataError: no shards, a list or table that cannot be read, or a worker died.
    """
    _check(scoring, min_score, keep_fraction)
    rules = rules or Rules()
    listed = None if uid_list is None else read_uids(uid_list)
    shards = ShardSet.open(spec)
    facts = _read_facts(shards, rules, workers, progress)
    failed = {
        _title(name, getattr(rules, name)): int((~passed).sum())
        for name, passed in zip(_RULES, facts.passed, strict=True)
        if getattr(rules, name) is not None
    }
    keep: NDArray[np.bool_] = np.asarray(facts.passed.all(axis=0))
    if listed is not None:
        found = is_in(facts.uids, listed)
        failed["not in the list"] = int((~found).sum())
        keep = keep & found
    scores, threshold = None, None
    if scoring is not None:
        scores = scoring(shards, SampleIds(facts.uids, facts.keys, facts.names))
        threshold = min_score if keep_fraction is None else threshold_of_fraction(scores, keep_fraction)
        if threshold is not None:
            good = scores >= np.float32(threshold)
            failed["score below the threshold, or none"] = int((~good).sum())
            keep = keep & good
    num_scored = 0 if scores is None else int((~np.isnan(scores)).sum())
    return Selection(shards, keep, facts.uids, failed, scores, threshold, num_scored)


def _check(scoring: Scoring | None, min_score: float | None, keep_fraction: float | None) -> None:
    if scoring is None and (min_score is not None or keep_fraction is not None):
        raise ConfigError("A threshold on scores needs scores: name a table of them or a model.")
    if min_score is not None and keep_fraction is not None:
        raise ConfigError("min_score and keep_fraction both set a threshold; give one of them.")
    if keep_fraction is not None and not 0 < keep_fraction <= 1:
        raise ConfigError(f"keep_fraction = {keep_fraction:g}: expected more than 0, at most 1.")


def _title(name: str, value: float) -> str:
    return {
        "min_words": f"fewer than {value:g} words",
        "min_characters": f"fewer than {value:g} characters",
        "min_side": f"shorter side below {value:g} pixels",
        "max_aspect": f"sides beyond {value:g} to 1",
    }[name]


def _read_facts(shards: ShardSet, rules: Rules, workers: int, progress: Progress | None) -> _Facts:
    chunks = cut_chunks((shard.path, shard.num_samples) for shard in shards.shards)
    parts = list(map_chunks(partial(_facts_of, rules), chunks, workers, progress))
    return _Facts(*(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)))


def _facts_of(rules: Rules, chunk: Chunk) -> _Facts:
    """The ids of a run of samples and which rules they fulfil; runs in a worker."""
    shard = ShardIndex.open(chunk.tar)
    rows = range(chunk.start, chunk.stop)
    passed = np.ones((len(_RULES), len(rows)), bool)
    for position, row in enumerate(rows):
        if rules.of_text:
            passed[:2, position] = _fulfils_text(shard, row, rules)
        if rules.of_size:
            passed[2:, position] = _fulfils_size(shard, row, rules)
    keys = [shard.key(row) for row in rows]
    return _Facts(
        as_numbers([uid_of(shard, row) for row in rows]) if rows else np.zeros(0, UID),
        _hashes(keys),
        _hashes([f"{shard.name}/{key}" for key in keys]),
        passed,
    )


def _hashes(texts: list[str]) -> NDArray[np.uint64]:
    return np.array([hash64(text.encode("utf-8", "replace")) for text in texts], np.uint64)


def _fulfils_text(shard: ShardIndex, row: int, rules: Rules) -> tuple[bool, bool]:
    try:
        captions = shard.captions(row)
    except DataError:
        captions = ()
    words = max((len(text.split()) for text in captions), default=0)
    characters = max(map(len, captions), default=0)
    return words >= (rules.min_words or 0), characters >= (rules.min_characters or 0)


def _fulfils_size(shard: ShardIndex, row: int, rules: Rules) -> tuple[bool, bool]:
    try:
        image = open_image(shard.image_bytes(row), where=shard.key(row))
    except DataError:
        return False, False
    short, long = sorted((image.height, image.width))
    return short >= (rules.min_side or 0), rules.max_aspect is None or long <= rules.max_aspect * short
