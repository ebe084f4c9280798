"""Images and texts in, vectors out: what classification, retrieval and every add-on start from."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import Progress
from vlkit.data.images import ImageChunk, ImageLike, iterate_images
from vlkit.data.transforms import Preprocess
from vlkit.errors import DataError
from vlkit.models.dual_encoder import DualEncoder

# How images are read. "fast": libjpeg-turbo and torch's resize, EXIF rotation applied. "reference": pillow, EXIF
# ignored: to the bit what open_clip and its peers feed their models, several times slower.
Decode = Literal["fast", "reference"]

# Threads that decode while the model computes. More bring nothing: one decodes as fast as a CPU embeds, and a few
# keep up with a GPU.
_MOST_WORKERS = 8


class ReadableImages(NamedTuple):
    """Embeddings of the images that could be read."""

    embeddings: Tensor  # (n,D) float32 unit norm, on the CPU
    kept: list[int]  # (n,) position of each row in the input
    failures: list[tuple[int, str]]  # position in the input, what is wrong with it


class EmbeddedChunk(NamedTuple):
    """Some consecutive images; `rows` and `failures` together hold each of their positions once."""

    rows: list[int]  # (b,) positions of the readable ones in the input
    embeddings: Tensor  # (b,D) float32 unit norm, on the CPU
    failures: list[tuple[int, str]]  # position in the input, what is wrong
    norms: Tensor  # (b,) length of each embedding before it was brought to unit norm


@dataclass(frozen=True)
class Embedder:
    """A trained encoder with its preprocessing and tokenizer. `vlkit.load_embedder(name)` makes one.

    Embeddings are float32 on the CPU, unit norm, one row per input in the order of the input.

    Attributes:
        encoder: the model.
        name: as the user gave it.
        decode: how images are read; "reference" where numbers are to be compared with published ones.
    """

    encoder: DualEncoder
    name: str
    decode: Decode = "fast"

    def embed_images(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Tensor:
        """Images to (N,D).

        Args:
            images: N paths, pillow images or records.
            batch_size: images per pass.
            progress: called with (done, total).
            workers: threads that decode; None is one per core, at most 8.

        Raises:
            DataError: an image cannot be read; the message names it.
        """
        return all_of(self.iterate_embeddings(images, batch_size, progress, workers), len(images), self.embed_dim)

    def embed_images_where_readable(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> ReadableImages:
        """The same, leaving out and naming those that cannot be read."""
        return readable_of(self.iterate_embeddings(images, batch_size, progress, workers), len(images), self.embed_dim)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """Texts to (N,D). Equal texts are embedded once, and texts of like length together.

        Args:
            texts: N strings; one longer than the model's context is cut.
            batch_size: texts per pass.
            progress: called with (done, total) distinct texts.

        Raises:
            DataError: `texts` is a single string or holds something else than strings.
        """
        check_texts(texts)
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        tokenize = self.encoder.tokenize
        rows = tokenize.encode_ragged(list(distinct))
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        out = torch.empty(len(rows), self.encoder.embed_dim)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                tokens = tokenize.pad([rows[row] for row in chosen]).to(self.device)
                out[chosen] = self.encoder.encode_text(tokens).float().cpu()
                if progress:
                    progress(start + len(chosen), len(order))
        return out[[distinct[text] for text in texts]]

    def iterate_embeddings(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Iterator[EmbeddedChunk]:
        """`embed_images_where_readable` a chunk at a time, in order: for results that should not wait for the last."""
        if isinstance(images, str | Path):
            raise DataError(f"embed_images takes a list of images, got the one path {images}. Put it into a list.")
        done = 0
        for chunk in self.iterate_pixels(images, batch_size, workers):
            raw = torch.empty(0, self.embed_dim)
            if chunk.rows:
                # Not around the whole loop: a generator that waits would leave the mode on for its caller.
                with torch.inference_mode():
                    raw = self.encoder.encode_image(chunk.images.to(self.device), normalize=False).float().cpu()
            done += len(chunk.rows) + len(chunk.failures)
            if progress:
                progress(done, len(images))
            with torch.inference_mode():
                unit, norms = F.normalize(raw, dim=-1), raw.norm(dim=-1)
            yield EmbeddedChunk(chunk.rows, unit, chunk.failures, norms)

    def iterate_pixels(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        workers: int | None = None,
        preprocess: Preprocess | None = None,
    ) -> Iterator[ImageChunk]:
        """Images as this embedder reads them, (b,3,size,size) uint8 a chunk; `preprocess` in place of the model's."""
        yield from iterate_images(
            images,
            preprocess or self.encoder.preprocess,
            batch_size=batch_size,
            workers=min(os.cpu_count() or 1, _MOST_WORKERS) if workers is None else workers,
            reference=self.decode == "reference",
            exif="apply" if self.decode == "fast" else "ignore",
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.device

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.encoder.embed_dim

    @property
    def family(self) -> Literal["softmax", "sigmoid"]:
        """Which probabilities the scores stand for: over the classes, or of each class on its own."""
        return self.encoder.training_family

    @cached_property
    def logit_scale(self) -> float:
        """Multiplier of the cosine, already exponentiated."""
        return float(self.encoder.logit_scale().detach())

    @cached_property
    def logit_bias(self) -> float | None:
        """Added after scaling; None for softmax-trained models."""
        bias = self.encoder.logit_bias
        return None if bias is None else float(bias.detach())

    @cached_property
    def identity(self) -> str:
        """Hash of weights, preprocessing and tokenizer: equal for equal embeddings, whatever the name."""
        record = self.encoder.record()
        deciding = {key: record.get(key) for key in ("model_cfg", "preprocess_cfg", "tokenizer")}
        deciding["weights"] = self.weights_hash
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    @cached_property
    def weights_hash(self) -> str:
        """Hash of the weights alone: their names, types, shapes and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.weights().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def all_of(chunks: Iterable[EmbeddedChunk], num_images: int, embed_dim: int) -> Tensor:
    """All chunks of `num_images` images as one (N,D).

    Raises:
        DataError: an image could not be read; at the chunk it stands in.
    """
    out = torch.empty(num_images, embed_dim)
    for chunk in chunks:
        if chunk.failures:
            raise DataError(f"Image {chunk.failures[0][0]} of {num_images}: {chunk.failures[0][1]}")
        out[chunk.rows] = chunk.embeddings
    return out


def readable_of(chunks: Iterable[EmbeddedChunk], num_images: int, embed_dim: int) -> ReadableImages:
    """All chunks of `num_images` images as one, without those that could not be read."""
    out = torch.empty(num_images, embed_dim)
    kept: list[int] = []
    failures: list[tuple[int, str]] = []
    for chunk in chunks:
        out[len(kept) : len(kept) + len(chunk.rows)] = chunk.embeddings
        kept += chunk.rows
        failures += chunk.failures
    return ReadableImages(out[: len(kept)], kept, failures)


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what only looks like a list of texts.

    Raises:
        DataError: a single string, or something else than strings among them.
    """
    if isinstance(texts, str):
        raise DataError(f"embed_texts takes a list of texts, got the one string {texts!r}. Write [{texts!r}].")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"Text {position} is a {type(text).__name__}; expected a string.")
