"""Shards to batches: plan, decode, tokenize, count what is broken.

    loader = Loader(ShardSet.open("shards/"), encoder.tokenize, batch_size=256, preprocess=encoder.preprocess,
                    augment=Augment(hflip=0.5), seed=0, workers=2)
    for batch in loader.epoch(0):                    # ImageTextBatch: uint8 images, tokens, ids, ...
        ...
    for batch in loader.epoch(3, start=120): ...     # resume: the same batches as in a run that was not interrupted
    loader.close()

The batches of an epoch depend on the shards, the settings and the seed, not on the number of workers. A broken sample
keeps its row with `valid=False` and a black image; it is counted by cause and shard (`report`), and above
`max_bad_fraction` the epoch stops with an error that names the worst shard.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.contracts import ImageTextBatch
from vlkit.data.caption_choice import CaptionChoice
from vlkit.data.captions import FunctionTokenizer, Tokenizer
from vlkit.data.collate import Collator, as_images, with_images
from vlkit.data.decode import MAX_PIXELS, Exif
from vlkit.data.epoch_plan import EpochPlan, Plan, Remainder
from vlkit.data.feed import SPARE_SLOTS, Feed, ReadJob
from vlkit.data.pass_order import WINDOW
from vlkit.data.records import Problems
from vlkit.data.remote_prefetch import Prefetcher
from vlkit.data.replay import Replay
from vlkit.data.sample_reader import Failure, Rows, SampleReader
from vlkit.data.shard_index import ShardSet
from vlkit.data.shared_block import Slots
from vlkit.data.transforms import Augment, Preprocess
from vlkit.data.worker_pool import StartMethod, WorkerPool, prepare
from vlkit.errors import ConfigError, DataError

Ids = NDArray[np.int64]
Finished = tuple[ImageTextBatch, list[Rows]]

# A few broken samples at the start of a run are no sign of a bad data set yet.
_SAMPLES_BEFORE_STOPPING = 1000


@dataclass
class LoadReport:
    """What a loader has given out on this rank, and what it could not read."""

    num_samples: int = 0  # without padding rows
    num_broken: int = 0
    num_texts: int = 0
    num_full_texts: int = 0  # texts that fill the whole context: cut, or just fitting
    num_cut_texts: int = 0  # texts longer than the context
    last_message: str = ""  # what was wrong with the last broken sample
    causes: Counter[str] = field(default_factory=Counter)
    shards: dict[str, Problems] = field(default_factory=dict)  # causes with examples, of shards that have any

    def lines(self) -> list[str]:
        """One line a shard, the worst first; empty when all is well."""
        worst = sorted(self.shards.items(), key=lambda item: -item[1].total)
        return [f"{shard}: {'; '.join(problems.lines())}" for shard, problems in worst]


@dataclass
class _Running:
    """What is at work for a loader; apart from it, so that it can be ended when the loader is collected."""

    pool: WorkerPool | None = None
    slots: Slots | None = None  # of the pool's memory
    feed: Feed[Finished] | None = None
    next: tuple[int, int] = (0, 0)  # epoch and batch that the feed gives next, when it is not in use
    in_use: bool = False

    def close_feed(self) -> None:
        if self.feed is not None:
            self.feed.close()
            self.feed, self.in_use = None, False

    def close(self) -> None:
        self.close_feed()
        if self.pool is not None:
            self.pool.close()
            self.pool = self.slots = None


class Loader:
    """Batches of image-text pairs from tar shards, for one rank.

    Attributes:
        plan: the order of the samples; `plan.position(step)` says where a step lies.
        num_batches: per epoch, equal on all ranks.
    """

    def __init__(
        self,
        shards: ShardSet,
        tokenize: Tokenizer | Callable[[list[str]], Tensor],
        *,
        batch_size: int,
        preprocess: Preprocess | None = None,
        augment: Augment | None = None,
        image_size: int | None = None,
        captions_per_image: int = 1,
        token_dropout: float = 0.0,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        remainder: Remainder = "drop",
        max_bad_fraction: float = 0.01,
        tokenizer_id: str = "",
        shuffle: bool = True,
        window: int = WINDOW,
        exif: Exif = "apply",
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
        start_method: StartMethod | None = None,
        plan: Plan | None = None,
        on_broken: Callable[[Sequence[Failure]], None] | None = None,
        captions: CaptionChoice | None = None,
        second_view: Augment | None = None,
        labels: bool = False,
        replay: Replay | None = None,
    ):
        """Check the settings; no worker is started and no sample read before the first batch.

        Args:
            shards: where the samples lie.
            tokenize: a tokenizer, or a function from texts to tokens padded with 0. Token ids stored in the shards
                under its id are used instead of calling it. With workers it must be picklable.
            batch_size: images per step over all ranks.
            preprocess: image size and filter; without `augment` the whole preprocessing.
            augment: random changes for training, None for none.
            image_size: another size than that of `preprocess`.
            captions_per_image: texts taken of each image per epoch (fewer where it has fewer).
            token_dropout: probability that a token of a caption is left out, see `captions.drop_tokens`.
            seed: decides order, augmentation and captions, together with the epoch.
            workers: processes beside this one; 0 does everything in the caller's thread.
            rank, world_size: which of how many training processes this is.
            remainder: "drop" or "keep" the samples that do not fill a global batch, see `EpochPlan`.
            max_bad_fraction: stop when a larger share of the samples is broken.
            tokenizer_id: of a `tokenize` that is a plain function.
            shuffle: False keeps the order of the shards.
            window: samples that are permuted with each other; a smaller one reads from fewer shards at a time.
            exif, max_pixels: see `decode.open_image`.
            prefetch: batches prepared ahead by the workers.
            start_method: of the workers, see `WorkerPool`.
            plan: another order than each sample once an epoch (`sampling.plan_batches`), for the same batch size and
                rank; `remainder` and `shuffle` are its own then.
            on_broken: is handed the broken samples of each batch that has any.
            captions: fields, sub-captions and templates, in place of `captions_per_image`.
            second_view: random changes of another view of each image, (B,3,H,W) in the batch's `extra["second_view"]`.
            labels: give class numbers, (B,) in the batch's `extra["labels"]`, -1 for a sample without one.
            replay: fixed views of each image by `augment`, whose number is in the batch's `extra["view"]`.

        Raises:
            ConfigError: settings that do not fit each other.
            DataError: fewer samples than one global batch, with remainder "drop".
        """
        self._check(captions_per_image, workers, max_bad_fraction, prefetch)
        preprocess = preprocess or Preprocess()
        if image_size is not None:
            preprocess = replace(preprocess, size=image_size)
        if not isinstance(tokenize, Tokenizer):
            tokenize = FunctionTokenizer(tokenize, tokenizer_id)
        if tokenizer_id not in ("", tokenize.tokenizer_id):
            raise ConfigError(f"tokenizer_id is {tokenizer_id!r}, but the tokenizer is {tokenize.tokenizer_id!r}.")
        self.shards = shards
        self.plan: Plan = plan or EpochPlan(
            shards.offsets,
            seed=seed,
            global_batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            remainder=remainder,
            shuffle=shuffle,
            window=window,
        )
        assert (self.plan.global_batch_size, self.plan.rank) == (batch_size, rank), "a plan for other batches"
        self._on_broken = on_broken
        if not 0 <= token_dropout < 1:
            raise ConfigError(f"token_dropout is {token_dropout}; expected 0 or more and less than 1.")
        self._reader = SampleReader(
            shards,
            tokenize,
            preprocess,
            augment,
            captions_per_image,
            seed,
            exif,
            max_pixels,
            token_dropout,
            second_view,
            labels,
            captions=captions,
            replay=replay,
        )
        self._job = ReadJob(self._reader, self.plan.batch_size)
        self._collate = Collator(tokenize)
        self._workers, self._prefetch, self._start_method = workers, prefetch, start_method
        self._max_bad_fraction = max_bad_fraction
        self._report = LoadReport()
        self._prefetcher: Prefetcher | None = None
        if Prefetcher.is_remote(shards):
            self._prefetcher = Prefetcher(shards, batches_in_use=prefetch if workers else 0)
            weakref.finalize(self, self._prefetcher.close)
        self._slots: Slots | None = None  # without workers
        if workers:
            prepare(start_method)
        self._running = _Running()
        weakref.finalize(self, self._running.close)

    @property
    def num_batches(self) -> int:
        """Batches of one epoch on this rank."""
        return self.plan.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[ImageTextBatch]:
        """The batches of an epoch from batch `start` on; those before are skipped without reading.

        With workers, the first batches of the next epoch are read while the last ones are used, and are at hand when
        `epoch(epoch + 1)` follows.

        Raises:
            DataError: too many broken samples, or a worker ended.
        """
        if self._workers == 0:
            batches: Iterator[Ids] = (self.plan.batch(epoch, index) for index in range(start, self.num_batches))
            if self._prefetcher is not None:
                after = (self.plan.batch(epoch + 1, index) for index in range(self.num_batches))
                batches = self._prefetcher.follow(batches, after)
            return (self._read_here(epoch, ids) for ids in batches)
        return self._read_in_workers(epoch, start)

    def report(self) -> LoadReport:
        """Counts over all batches given out so far, of all epochs."""
        return self._report

    def close(self) -> None:
        """End the workers. The loader can be used again: they are started anew when needed."""
        self._running.close()
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_here(self, epoch: int, ids: Ids) -> ImageTextBatch:
        images = as_images(self._own_memory(), self._job.shape)
        parts = [self._reader.read(epoch, ids, images)]
        self._account(parts)
        return with_images(self._collate(ids, parts), images)

    def _own_memory(self) -> Tensor:
        """Room for a batch's pixels: pinned where there is a GPU, else used again when its last batch is gone."""
        num_bytes = math.prod(self._job.shape)
        if torch.cuda.is_available():
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        if self._slots is None:
            self._slots = Slots(torch.empty(SPARE_SLOTS * num_bytes, dtype=torch.uint8), SPARE_SLOTS)
        if self._slots.num_lent < SPARE_SLOTS:
            return self._slots.lend(self._slots.take())
        return torch.empty(num_bytes, dtype=torch.uint8)  # the consumer keeps many batches

    def _read_in_workers(self, epoch: int, start: int) -> Iterator[ImageTextBatch]:
        running = self._running
        if running.in_use:
            raise ConfigError("Two epochs of one loader cannot be read at the same time; make a second loader.")
        if start >= self.num_batches:
            return
        feed = self._feed_from(epoch, start)
        running.in_use, whole = True, False
        try:
            for _ in range(start, self.num_batches):
                got = feed.next()
                if got is None:
                    raise ConfigError("The loader was closed before the epoch came to its end.")
                (batch, parts), images = got
                self._account(parts)
                yield with_images(batch, images)
            whole = True
        finally:
            if running.feed is feed:  # else `close` was called meanwhile
                running.in_use, running.next = False, (epoch + 1, 0)
                if feed.failed:
                    running.close()
                elif not whole:
                    running.close_feed()

    def _feed_from(self, epoch: int, start: int) -> "Feed[Finished]":
        """The feed that is there, if it goes on from here; else a new one."""
        running = self._running
        if running.feed is not None and running.next == (epoch, start):
            return running.feed
        running.close_feed()
        pinned = torch.cuda.is_available()
        if running.pool is None:
            count = self._prefetch + (0 if pinned else SPARE_SLOTS)
            num_bytes = count * math.prod(self._job.shape)
            running.pool = WorkerPool(self._job, self._workers, num_bytes, self._start_method)
            running.slots = Slots(running.pool.memory, count)
        assert running.slots is not None
        collate = self._collate  # the thread must not hold the loader, or the loader would never be collected
        running.feed = Feed(
            running.pool,
            running.slots,
            _endless(self.plan, epoch, start, self._prefetcher),
            shape=self._job.shape,
            # Parts small enough that all workers share every batch, large enough that messages cost nothing.
            part_rows=min(max(self.plan.batch_size // (2 * self._workers), 8), 64),
            prefetch=self._prefetch,
            finish=lambda ids, parts: (collate(ids, parts), parts),
            pinned=pinned,
        )
        return running.feed

    def _account(self, parts: list[Rows]) -> None:
        report, context_length = self._report, self._reader.tokenizer.context_length
        report.num_samples += sum(key != "" for part in parts for key in part.keys)
        report.num_texts += sum(sum(part.num_texts) for part in parts)
        report.num_full_texts += sum(len(row) >= context_length for part in parts for row in part.tokens)
        report.num_cut_texts += sum(sum(part.cut) for part in parts)
        for part in parts:
            for failure in part.failures:
                report.num_broken += 1
                report.causes[failure.cause] += 1
                report.shards.setdefault(failure.shard, Problems()).add(failure.cause, failure.key)
                report.last_message = failure.message
        failures = [failure for part in parts for failure in part.failures]
        if failures and self._on_broken is not None:
            self._on_broken(failures)
        at_least = min(_SAMPLES_BEFORE_STOPPING, self.plan.num_samples // self.plan.world_size)
        if report.num_broken > self._max_bad_fraction * max(report.num_samples, at_least):
            raise self._too_many_broken()

    def _too_many_broken(self) -> DataError:
        report = self._report
        causes = ", ".join(f"{count} x {cause}" for cause, count in report.causes.most_common())
        return DataError(
            f"{report.num_broken} of {report.num_samples} samples could not be read ({causes}), more than "
            f"max_bad_fraction = {self._max_bad_fraction:g} allows. Worst: {report.lines()[0]}. The last one: "
            f"{report.last_message} Look with `vlkit shards validate`, repair the shards, or raise max_bad_fraction."
        )

    @staticmethod
    def _check(captions_per_image: int, workers: int, max_bad_fraction: float, prefetch: int) -> None:
        for name, value, least in (
            ("captions_per_image", captions_per_image, 1),
            ("workers", workers, 0),
            ("prefetch", prefetch, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected at least {least}.")
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction is {max_bad_fraction}; a fraction lies in [0, 1].")


def _endless(plan: Plan, epoch: int, start: int, prefetcher: Prefetcher | None) -> Iterator[tuple[int, Ids]]:
    """Epoch and ids of each batch from this one on, epoch after epoch."""

    def places() -> Iterator[tuple[int, int]]:
        return ((e, i) for e in count(epoch) for i in range(start if e == epoch else 0, plan.num_batches))

    batches: Iterator[Ids] = (plan.batch(e, i) for e, i in places())
    if prefetcher is not None:
        batches = prefetcher.follow(batches, iter(()))
    return zip((e for e, _ in places()), batches, strict=True)
