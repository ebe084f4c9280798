"""From sample numbers to pixels and token ids: the part of loading that runs in worker processes.

What comes out for a sample depends on the shards, the settings below, the epoch and the sample's number, and on
nothing else; so it does not matter which process reads it, or beside which other samples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlkit.data.captions import Tokenizer, caption_hash, choose_captions
from vlkit.data.decode import MAX_PIXELS, BrokenImageError, Exif, open_image
from vlkit.data.epoch_plan import PADDING
from vlkit.data.randomness import generator
from vlkit.data.shard_index import ShardIndex, ShardSet
from vlkit.data.transforms import Augment, Preprocess
from vlkit.errors import DataError


class Failure(NamedTuple):
    """A sample that could not be read."""

    row: int
    shard: str
    key: str  # "shard/key"
    cause: str
    message: str


class Text(NamedTuple):
    """A caption, with its token ids if they are stored."""

    text: str
    tokens: list[int] | None


class Rows(NamedTuple):
    """Everything about some consecutive rows of a batch but the pixels."""

    keys: list[str]  # (b,) "shard/key", "" for padding
    num_texts: list[int]  # (b,) texts of each row
    tokens: list[list[int]]  # one entry a text
    caption_hash: list[int]  # one entry a text
    valid: list[bool]  # (b,)
    failures: list[Failure]


@dataclass(frozen=True)
class SampleReader:
    """Reads samples of a shard set; see `Loader` for the settings."""

    shards: ShardSet
    tokenizer: Tokenizer
    preprocess: Preprocess
    augment: Augment | None
    captions_per_image: int
    seed: int
    exif: Exif = "apply"
    max_pixels: int = MAX_PIXELS

    def read(self, epoch: int, ids: NDArray[np.int64], images: Tensor) -> Rows:
        """Read samples; a broken one leaves a black image and stands in `failures`.

        Args:
            epoch: decides augmentation and captions.
            ids: (b,) numbers in the shard set; -1 for a padding row.
            images: (b,3,size,size) uint8, is filled.
        """
        rows = Rows([], [], [], [], [], [])
        texts: list[Text] = []
        for row, sample_id in enumerate(ids.tolist()):
            if sample_id == PADDING:
                images[row].zero_()
                texts += _add(rows, "", [], valid=False)
                continue
            shard, i = self.shards.locate(sample_id)
            key = f"{shard.name}/{shard.key(i)}"
            failed = self._read_image(shard, i, key, epoch, sample_id, images[row])
            chosen: list[Text] = []
            try:
                chosen = self._texts(shard, i, epoch, sample_id)
            except DataError as error:
                failed = failed or ("unreadable caption", str(error))
            if not chosen:
                failed = failed or ("no caption", f"{key} has no caption.")
            if failed:
                rows.failures.append(Failure(row, shard.path.name, key, *failed))
            texts += _add(rows, key, chosen, valid=not failed)
        self._tokenize(texts, rows)
        return rows

    def _read_image(
        self, shard: ShardIndex, i: int, key: str, epoch: int, sample_id: int, out: Tensor
    ) -> tuple[str, str] | None:
        """Fill `out` (3,size,size); returns cause and message when the image is broken."""
        try:
            data = shard.image_bytes(i)
            image = open_image(data, where=key, exif=self.exif, max_pixels=self.max_pixels)
            if self.augment is None:
                pixels = self.preprocess(image.decode())
            else:
                random = generator(self.seed, epoch, sample_id, "augment")
                size, interpolation = self.preprocess.size, self.preprocess.interpolation
                pixels = self.augment.decode(image, size, interpolation, random)
        except DataError as error:
            out.zero_()
            return (error.cause if isinstance(error, BrokenImageError) else "unreadable shard"), str(error)
        out.copy_(pixels)
        return None

    def _texts(self, shard: ShardIndex, i: int, epoch: int, sample_id: int) -> list[Text]:
        """The chosen captions, with their stored token ids if the shard has this tokenizer's."""
        captions = shard.captions(i)
        chosen = choose_captions(
            len(captions), self.captions_per_image, seed=self.seed, epoch=epoch, sample_id=sample_id
        )
        stored = shard.tokens(self.tokenizer.tokenizer_id, i)
        if stored is None or len(stored) != len(captions):
            return [Text(captions[n], None) for n in chosen]
        return [Text(captions[n], stored[n].tolist()) for n in chosen]

    def _tokenize(self, texts: list[Text], rows: Rows) -> None:
        """Fill in token ids, tokenizing in one call the texts that have none stored."""
        missing = [text.text for text in texts if text.tokens is None]
        fresh = iter(self.tokenizer.encode_ragged(missing) if missing else [])
        rows.tokens.extend(next(fresh) if text.tokens is None else text.tokens for text in texts)


def _add(rows: Rows, key: str, texts: list[Text], valid: bool) -> list[Text]:
    # A row without a caption still has one, empty text, so that one text an image stays one text an image.
    texts = texts or [Text("", None)]
    rows.keys.append(key)
    rows.valid.append(valid)
    rows.num_texts.append(len(texts))
    rows.caption_hash.extend(caption_hash(text.text) for text in texts)
    return texts
