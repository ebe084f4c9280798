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

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.contracts import ImageTextBatch
from vlkit.data.captions import FunctionTokenizer, Tokenizer
from vlkit.data.decode import MAX_PIXELS, Exif
from vlkit.data.epoch_plan import EpochPlan, Remainder
from vlkit.data.feed import Feed, ReadJob
from vlkit.data.records import Problems
from vlkit.data.sample_reader import Rows, SampleReader
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Augment, Preprocess
from vlkit.data.worker_pool import StartMethod, WorkerPool
from vlkit.errors import ConfigError, DataError

Ids = NDArray[np.int64]

# A few broken samples at the start of a run are no sign of a bad data set yet.
_SAMPLES_BEFORE_STOPPING = 1000


@dataclass
class LoadReport:
    """What a loader has given out on this rank, and what it could not read."""

    num_samples: int = 0  # without padding rows
    num_broken: int = 0
    num_texts: int = 0
    num_full_texts: int = 0  # texts that fill the whole context: cut, or just fitting
    last_message: str = ""  # what was wrong with the last broken sample
    causes: Counter[str] = field(default_factory=Counter)
    shards: dict[str, Problems] = field(default_factory=dict)  # causes with examples, of shards that have any

    def lines(self) -> list[str]:
        """One line a shard, the worst first; empty when all is well."""
        worst = sorted(self.shards.items(), key=lambda item: -item[1].total)
        return [f"{shard}: {'; '.join(problems.lines())}" for shard, problems in worst]


class Loader:
    """Batches of image-text pairs from tar shards, for one rank.

    Attributes:
        plan: the `EpochPlan`; `plan.position(step)` says where a step lies.
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
        exif: Exif = "apply",
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
        start_method: StartMethod | None = None,
    ):
        """Check the settings; no process is started and no sample read before the first batch.

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
            exif, max_pixels: see `decode.open_image`.
            prefetch: batches prepared ahead by the workers.
            start_method: of the workers, see `WorkerPool`.

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
        self.plan = EpochPlan(
            shards.offsets,
            seed=seed,
            global_batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            remainder=remainder,
            shuffle=shuffle,
        )
        if not 0 <= token_dropout < 1:
            raise ConfigError(f"token_dropout is {token_dropout}; expected 0 or more and less than 1.")
        self._reader = SampleReader(
            shards, tokenize, preprocess, augment, captions_per_image, seed, exif, max_pixels, token_dropout
        )
        self._workers, self._prefetch, self._start_method = workers, prefetch, start_method
        self._max_bad_fraction = max_bad_fraction
        self._report = LoadReport()
        self._pool: WorkerPool | None = None
        self._feed: Feed[tuple[ImageTextBatch, list[Rows]]] | None = None

    @property
    def num_batches(self) -> int:
        """Batches of one epoch on this rank."""
        return self.plan.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[ImageTextBatch]:
        """The batches of an epoch from batch `start` on; those before are skipped without reading.

        Raises:
            DataError: too many broken samples, or a worker ended.
        """
        batches = (self.plan.batch(epoch, index) for index in range(start, self.num_batches))
        if self._workers == 0:
            return (self._read_here(epoch, ids) for ids in batches)
        return self._read_in_workers(epoch, batches)

    def report(self) -> LoadReport:
        """Counts over all batches given out so far, of all epochs."""
        return self._report

    def close(self) -> None:
        """End the workers. The loader can be used again: they are started anew when needed."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_here(self, epoch: int, ids: Ids) -> ImageTextBatch:
        images = self._new_images(len(ids))
        parts = [self._reader.read(epoch, ids, images)]
        self._account(parts)
        return self._batch(ids, parts, images)

    def _read_in_workers(self, epoch: int, batches: Iterator[Ids]) -> Iterator[ImageTextBatch]:
        if self._feed is not None:
            raise ConfigError("Two epochs of one loader cannot be read at the same time; make a second loader.")
        size, rows = self._reader.preprocess.size, self.plan.batch_size
        if self._pool is None:
            num_bytes = self._prefetch * rows * 3 * size * size
            self._pool = WorkerPool(ReadJob(self._reader), self._workers, num_bytes, self._start_method)
            weakref.finalize(self, self._pool.close)
        feed = Feed(
            self._pool,
            epoch,
            batches,
            size=size,
            # Parts small enough that all workers share every batch, large enough that messages cost nothing.
            part_rows=min(max(rows // (2 * self._workers), 8), 64),
            prefetch=self._prefetch,
            finish=self._copied_batch,
        )
        self._feed = feed
        try:
            for batch, parts in feed:
                self._account(parts)
                yield batch
            if self._feed is not feed:
                raise ConfigError("The loader was closed before the epoch came to its end.")
        finally:
            if self._feed is feed:  # else `close` was called meanwhile
                self._feed = None
                feed.close()
                if feed.failed:
                    self.close()

    def _copied_batch(self, ids: Ids, parts: list[Rows], shared: Tensor) -> tuple[ImageTextBatch, list[Rows]]:
        return self._batch(ids, parts, self._new_images(len(ids)).copy_(shared)), parts

    def _new_images(self, count: int) -> Tensor:
        size = self._reader.preprocess.size
        # Pinned memory lets the copy to the GPU run beside the computation.
        return torch.empty(count, 3, size, size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def _batch(self, ids: Ids, parts: list[Rows], images: Tensor) -> ImageTextBatch:
        tokens = [row for part in parts for row in part.tokens]
        num_texts = torch.tensor([count for part in parts for count in part.num_texts])
        return ImageTextBatch(
            images=images,
            tokens=self._reader.tokenizer.pad(tokens),
            text_to_image=torch.repeat_interleave(torch.arange(len(ids)), num_texts),
            ids=torch.from_numpy(ids),
            caption_hash=torch.tensor([value for part in parts for value in part.caption_hash], dtype=torch.int64),
            valid=torch.tensor([value for part in parts for value in part.valid]),
            extra={},
            keys=[key for part in parts for key in part.keys],
        )

    def _account(self, parts: list[Rows]) -> None:
        report, context_length = self._report, self._reader.tokenizer.context_length
        report.num_samples += sum(key != "" for part in parts for key in part.keys)
        report.num_texts += sum(sum(part.num_texts) for part in parts)
        report.num_full_texts += sum(len(row) >= context_length for part in parts for row in part.tokens)
        for part in parts:
            for failure in part.failures:
                report.num_broken += 1
                report.causes[failure.cause] += 1
                report.shards.setdefault(failure.shard, Problems()).add(failure.cause, failure.key)
                report.last_message = failure.message
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
