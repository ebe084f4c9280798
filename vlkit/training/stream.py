"""The batches of a run, from any step on: stages, numbers for patch dropout, features of a stored teacher."""

import io
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.config import RunConfig
from vlkit.contracts import ImageTextBatch
from vlkit.data.captions import caption_hash
from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Preprocess
from vlkit.errors import DataError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tokenizers import TextTokenizer
from vlkit.training.stages import Stage, add_draws, staged_batches

Row = NDArray[np.float32] | None
TEACHER_IMAGE, TEACHER_TEXT = "teacher_image.npy", "teacher_text.npy"


class Stream:
    """The batches of one process.

    Args:
        loader: of batches as the model takes them at the end of the run.
        make_loader: one with another size and text length, and the same plan.
        stages: from `plan_stages`, checked.
        steps: of the whole run.
    """

    def __init__(
        self,
        run: RunConfig,
        shards: ShardSet,
        encoder: DualEncoder,
        loader: Loader,
        make_loader: Callable[[Preprocess, TextTokenizer], Loader],
        stages: list[Stage],
        steps: int,
    ) -> None:
        self._run, self._shards, self._encoder = run, shards, encoder
        self._loader, self._make_loader = loader, make_loader
        self._stages, self._steps = stages, steps
        self.loaders = [loader]  # whose reports together tell what could not be read

    def batches(self, step: int, skipped: int = 0) -> Generator[ImageTextBatch, None, None]:
        """The batches from a step on, without end; `skipped` of the data before it were left out."""
        plain = staged_batches(self._stages, self._loader_of, step, skipped, close=self._close)
        epoch_of = lambda i: self._loader.plan.position(i + skipped)[0]  # noqa: E731
        stream: Iterator[ImageTextBatch] = plain
        if self._run.model.patch_dropout:
            stream = add_draws(stream, seed=self._run.run.seed, start=step, until=self._unmasked(), epoch_of=epoch_of)
        if reads_stored_teacher(self._run):
            stream = (add_stored_teacher(batch, self._shards) for batch in stream)
        try:
            yield from stream
        finally:
            plain.close()

    def _unmasked(self) -> int:
        """The step from which all patches are seen."""
        size = self._run.data.global_batch_size
        tail = self._run.model.patch_dropout_tail.in_steps(
            total=self._steps, steps_per_epoch=self._loader.num_batches, batch_size=size
        )
        return self._steps - tail

    def _loader_of(self, stage: Stage) -> Loader:
        if stage.image_size is None and stage.text_length is None:
            return self._loader
        encoder = self._encoder
        preprocess = replace(encoder.preprocess, size=stage.image_size or encoder.preprocess.size)
        tokenize = encoder.tokenize
        if stage.text_length is not None:
            tokenize = TextTokenizer(
                tokenize.tokenizer_id, stage.text_length, full_context=tokenize.full_context, folder=tokenize.folder
            )
        made = self._make_loader(preprocess, tokenize)
        self.loaders.append(made)
        return made

    def _close(self, loader: Loader) -> None:
        if loader is not self._loader:
            loader.close()


def reads_stored_teacher(run: RunConfig) -> bool:
    """Whether the run distils from features that lie in the shards."""
    return run.loss.distillation is not None and run.loss.distillation.teacher is None


def add_stored_teacher(batch: ImageTextBatch, shards: ShardSet) -> ImageTextBatch:
    """The batch with the features that a sample's `teacher_image.npy` (E,) and `teacher_text.npy` (captions, E) hold.

    Broken samples get zeros; they do not count.

    Raises:
        DataError: a sample has none, or of another shape.
    """
    ids, valid = batch.ids.tolist(), batch.valid.tolist()
    known = [_Taught.read(shards, number) if good else None for number, good in zip(ids, valid, strict=True)]
    images = [None if one is None else one.image for one in known]
    texts: list[Row] = []
    for row, hashed in zip(batch.text_to_image.tolist(), batch.caption_hash.tolist(), strict=True):
        taught = known[row]
        texts.append(None if taught is None else taught.text_of(hashed))
    width = next((len(row) for row in images if row is not None), 1)
    found = {"teacher_image": _rows(images, width), "teacher_text": _rows(texts, width)}
    return batch._replace(extra={**batch.extra, **found})


class _Taught(NamedTuple):
    """What a sample stores of the teacher."""

    where: str
    image: NDArray[np.float32]  # (E,)
    texts: dict[int, NDArray[np.float32]]  # hash of a caption -> (E,)

    @classmethod
    def read(cls, shards: ShardSet, number: int) -> "_Taught":
        shard, i = shards.locate(number)
        captions = shard.captions(i)
        texts = _stored(shards, number, TEACHER_TEXT, len(captions))
        hashes = {caption_hash(caption): row for caption, row in zip(captions, texts, strict=True)}
        return cls(f"{shard.path.name}, sample {shard.key(i)}", _stored(shards, number, TEACHER_IMAGE, 1)[0], hashes)

    def text_of(self, hashed: int) -> NDArray[np.float32]:
        if hashed not in self.texts:
            raise DataError(
                f"{self.where}: the caption trained on is none of the sample's own captions, which .{TEACHER_TEXT} "
                "has the teacher's features of. Train on the captions of the shard, or name a teacher."
            )
        return self.texts[hashed]


def _stored(shards: ShardSet, number: int, suffix: str, rows: int) -> NDArray[np.float32]:
    shard, i = shards.locate(number)
    where = f"{shard.path.name}, sample {shard.key(i)}"
    data = shard.read_member(i, suffix)
    if data is None:
        raise DataError(
            f"{where}: there is no .{suffix}. loss.distillation without a teacher reads the teacher's features from "
            "the shards; store them in every sample, or name a teacher."
        )
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{where}: .{suffix} is no array of numpy ({error}).") from error
    array = np.atleast_2d(array)
    if array.ndim != 2 or len(array) != rows or array.dtype.kind != "f":
        raise DataError(
            f"{where}: .{suffix} holds {array.dtype} of shape {array.shape}; expected {rows} row(s) of floats, "
            f"{'one a caption' if suffix == TEACHER_TEXT else 'one an image'}."
        )
    array = array.astype(np.float32)
    unit: NDArray[np.float32] = array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
    return unit


def _rows(rows: list[Row], width: int) -> Tensor:
    out = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        if row is not None:
            out[number] = torch.from_numpy(row)
    return out
