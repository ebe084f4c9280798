"""From sample numbers to pixels and token ids: the part of loading that runs in worker processes.

What comes out for a sample depends on the shards, the settings below, the epoch and the sample's number, and on
nothing else; so it does not matter which process reads it, or beside which other samples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlkit.data.augment import Choices, decode_views
from vlkit.data.caption_choice import CaptionChoice, Draw
from vlkit.data.captions import Text, Tokenizer, WholeTokenizer, caption_hash, choose_captions, drop_tokens
from vlkit.data.decode import MAX_PIXELS, BrokenImageError, EncodedImage, Exif, open_image
from vlkit.data.epoch_plan import PADDING
from vlkit.data.randomness import fleeting_generator
from vlkit.data.replay import Replay, image_number
from vlkit.data.resizing import copy_planes
from vlkit.data.shard_index import ShardIndex, ShardSet
from vlkit.data.transforms import Augment, Preprocess
from vlkit.errors import DataError

# Headers of some images first, then their pixels: see `SampleReader.read`. Bounded, as encoded images wait meanwhile.
_HEADERS_AT_ONCE = 64


class Failure(NamedTuple):
    """A sample that could not be read."""

    row: int
    shard: str
    key: str  # "shard/key"
    cause: str
    message: str
    sample: int  # position in the shard set: two sources may hold shards and keys of one name


class Rows(NamedTuple):
    """Everything about some consecutive rows of a batch but the pixels."""

    keys: list[str]  # (b,) "shard/key", "" for padding
    num_texts: list[int]  # (b,) texts of each row
    tokens: list[list[int]]  # one entry a text
    caption_hash: list[int]  # one entry a text
    valid: list[bool]  # (b,)
    labels: list[int]  # (b,) class numbers, -1 for none; empty if they are not asked for
    failures: list[Failure]
    cut: list[bool]  # one entry a text: longer than the model's context
    views: list[int]  # (b,) which fixed view of the image this is; empty where views are drawn anew


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
    token_dropout: float = 0.0
    second_view: Augment | None = None
    labels: bool = False
    captions: CaptionChoice | None = None  # None: `captions_per_image` of those the shard index finds
    replay: Replay | None = None  # fixed views in place of new ones

    @property
    def num_views(self) -> int:
        """Pictures made of each image."""
        return 1 if self.second_view is None else 2

    def read(self, epoch: int, ids: NDArray[np.int64], images: Tensor) -> Rows:
        """Read samples; a broken one leaves a black image and stands in `failures`.

        Args:
            epoch: decides augmentation and captions.
            ids: (b,) numbers in the shard set; -1 for a padding row.
            images: (V,b,3,size,size) uint8, is filled; V is `num_views`.
        """
        rows, texts = Rows([], [], [], [], [], [], [], [], []), []
        # Texts, then headers, then pixels: small steps run twice as fast when decoding does not empty the processor's
        # caches in between.
        for row, sample_id in enumerate(ids.tolist()):
            texts += self._read_texts(row, epoch, sample_id, rows)
        self._tokenize(texts, rows)
        self._drop_tokens(epoch, ids, rows)
        if self.labels:
            rows.labels.extend(self._label(row, sample_id, rows) for row, sample_id in enumerate(ids.tolist()))
        for start in range(0, len(ids), _HEADERS_AT_ONCE):
            some = list(enumerate(ids[start : start + _HEADERS_AT_ONCE].tolist(), start))
            opened = [self._open(row, epoch, sample_id, rows) for row, sample_id in some]
            for (row, sample_id), image in zip(some, opened, strict=True):
                self._fill(images[:, row], row, sample_id, image, rows)
        return rows

    def _read_texts(self, row: int, epoch: int, sample_id: int, rows: Rows) -> list[Text]:
        """The texts of a row; fills in its key, its validity as far as texts go, and their number and hashes."""
        key, texts = "", list[Text]()
        if sample_id != PADDING:
            shard, i = self.shards.locate(sample_id)
            key = f"{shard.name}/{shard.key(i)}"
            try:
                texts = self._chosen(shard, i, epoch, sample_id)
            except DataError as error:
                rows.failures.append(Failure(row, shard.path.name, key, "unreadable caption", str(error), sample_id))
            else:
                if not texts:
                    message = f"{key} has no caption."
                    rows.failures.append(Failure(row, shard.path.name, key, "no caption", message, sample_id))
        rows.keys.append(key)
        rows.valid.append(bool(texts))
        # A row without a caption still has one, empty text, so that one text an image stays one text an image.
        texts = texts or [Text("", None)]
        rows.num_texts.append(len(texts))
        rows.caption_hash.extend(caption_hash(text.text) for text in texts)
        return texts

    def _label(self, row: int, sample_id: int, rows: Rows) -> int:
        """The class number of a row, -1 if it has none."""
        if sample_id == PADDING:
            return -1
        shard, i = self.shards.locate(sample_id)
        try:
            label = shard.label(i)
        except DataError as error:
            self._fail(rows, row, sample_id, error, "unreadable label")
            return -1
        return -1 if label is None else label

    def _open(
        self, row: int, epoch: int, sample_id: int, rows: Rows
    ) -> tuple[EncodedImage, list[Choices | None]] | None:
        """The image's header, and what will happen to it in each view; None if there is none."""
        if self.replay is not None:
            rows.views.append(0)  # until it is known
        if sample_id == PADDING:
            return None
        shard, i = self.shards.locate(sample_id)
        try:
            data = shard.image_bytes(i)
            image = open_image(data, where=rows.keys[row], exif=self.exif, max_pixels=self.max_pixels)
        except DataError as error:
            self._fail(rows, row, sample_id, error)
            return None
        views: list[Choices | None] = []
        for augment, purpose in ((self.augment, "augment"), (self.second_view, "second view"))[: self.num_views]:
            random = fleeting_generator(self.seed, epoch, sample_id, purpose)
            views.append(None if augment is None else augment.draw(image.height, image.width, random))
        if self.replay is not None and self.augment is not None:
            number = image_number(data)
            rows.views[-1] = self.replay.view(number, epoch)
            views[0] = self.replay.draw(self.augment, image, number, rows.views[-1])
        return image, views

    def _fill(
        self,
        out: Tensor,
        row: int,
        sample_id: int,
        opened: tuple[EncodedImage, list[Choices | None]] | None,
        rows: Rows,
    ) -> None:
        """Decode and change an image into `out` (V,3,size,size), black if there is none."""
        if opened is None:
            out.zero_()
            return
        image, views = opened
        try:
            changed = [choices for choices in views if choices is not None]
            plain = [self.preprocess(image.decode())] if views[0] is None else []
            made = decode_views(image, changed, self.preprocess.size, self.preprocess.interpolation)
            for view, pixels in enumerate((*plain, *made)):
                copy_planes(pixels, out[view])
        except DataError as error:
            out.zero_()
            self._fail(rows, row, sample_id, error)

    def _fail(self, rows: Rows, row: int, sample_id: int, error: DataError, cause: str = "unreadable shard") -> None:
        """Count a row whose image or label is broken, unless it is counted as broken already."""
        if rows.valid[row]:
            cause = error.cause if isinstance(error, BrokenImageError) else cause
            shard, _ = self.shards.locate(sample_id)
            rows.failures.append(Failure(row, shard.path.name, rows.keys[row], cause, str(error), sample_id))
            rows.valid[row] = False

    def _chosen(self, shard: ShardIndex, i: int, epoch: int, sample_id: int) -> list[Text]:
        """The chosen captions, with their stored token ids if the shard has this tokenizer's."""
        if self.captions is not None:
            return self.captions.texts(shard, i, self.tokenizer.tokenizer_id, Draw(self.seed, epoch, sample_id))
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
        tokenizer, longest = self.tokenizer, self.tokenizer.context_length
        missing = [text.text for text in texts if text.tokens is None]
        # Stored ids are not cut either; `pad` cuts. Where a tokenizer gives cut ones only, full ones count as cut.
        whole = isinstance(tokenizer, WholeTokenizer)
        encode = tokenizer.encode_whole if isinstance(tokenizer, WholeTokenizer) else tokenizer.encode_ragged
        fresh = iter(encode(missing) if missing else [])
        for text in texts:
            tokens = next(fresh) if text.tokens is None else text.tokens
            rows.tokens.append(tokens)
            rows.cut.append(len(tokens) > longest - (text.tokens is None and not whole))

    def _drop_tokens(self, epoch: int, ids: NDArray[np.int64], rows: Rows) -> None:
        """Leave tokens out of the texts, each image's by its own random numbers."""
        if not self.token_dropout:
            return
        place = 0
        for sample_id, count in zip(ids.tolist(), rows.num_texts, strict=True):
            random = fleeting_generator(self.seed, epoch, max(sample_id, 0), "token dropout")
            for position in range(place, place + count):
                rows.tokens[position] = drop_tokens(rows.tokens[position], self.token_dropout, random)
            place += count
