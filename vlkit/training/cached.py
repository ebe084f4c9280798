"""Large batches on small memory, exactly: the activations of one chunk at a time, the loss of the whole batch.

    step = CachedStep(EncodeStep(module), module.objective, chunk_size=64, device=device)
    output = step(batch, i)                      # has done backward; gradients as without chunks

First the features of all chunks without a graph, then one loss on them and its gradient by the features, then each
chunk once more, with the same random numbers, and backward from that gradient. Features are small, so the memory is
that of one chunk; the price is a second forward.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983.
Differs: gradients of the temperature and the bias are taken once, with the last chunk, so that they are not k times
too large; batch statistics are updated once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses.objective import LossOutput, Objective

# How the rows of each tensor of the features follow those of the batch.
_OF_IMAGES = ("image", "patches")
_OF_TEXTS = ("text", "words", "word_mask")


class Chunk(NamedTuple):
    """Some images of a batch with their texts."""

    batch: ImageTextBatch
    images: Tensor  # which rows of the batch
    texts: Tensor


class EncodeStep(nn.Module):
    """Batch to features in one forward, so that wrappers for several processes see nothing else.

    Args:
        encoder: its parameters are those of this module.
        features: batch -> features by this encoder, e.g. under autocast.
    """

    def __init__(self, encoder: nn.Module, features: Callable[[ImageTextBatch], Features]) -> None:
        super().__init__()
        self.encoder = encoder
        self._features = features

    def forward(self, batch: ImageTextBatch) -> Features:
        """The features of a batch."""
        return self._features(batch)


class CachedStep:
    """One training step up to and with backward, a chunk at a time.

    Models that normalise over the batch do so over each chunk.

    Args:
        encode: batch on the device -> features; what wraps it for several processes included.
        objective: features of the whole batch -> losses.
        chunk_size: images at a time on this process.
        device: where `encode` runs. The batch may be elsewhere: only one chunk is brought there at a time.
        to_device: brings a batch there.
        sync: `Parallel.sync`.
    """

    def __init__(
        self,
        encode: nn.Module,
        objective: Objective,
        chunk_size: int,
        device: torch.device,
        to_device: Callable[[ImageTextBatch, torch.device], ImageTextBatch] = lambda batch, device: batch,
        sync: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext(),
    ) -> None:
        self._encode, self._objective = encode, objective
        self._chunk_size, self._device = chunk_size, device
        self._to_device, self._sync = to_device, sync

    def __call__(self, batch: ImageTextBatch, step: int) -> LossOutput:
        """The losses of the whole batch; gradients have been added to the parameters."""
        chunks = list(split(batch, self._chunk_size))
        statistics = [buffer.clone() for buffer in self._encode.buffers()]
        random, parts = [], []
        with torch.no_grad():
            for chunk in chunks:
                random.append(_random_state(self._device))
                parts.append(self._encode(self._to_device(chunk.batch, self._device)))
            for buffer, value in zip(self._encode.buffers(), statistics, strict=True):
                buffer.copy_(value)
        whole = _leaves(merge(parts, chunks))
        small = batch._replace(images=batch.images[:0], tokens=batch.tokens[:0])
        output = self._objective(whole, self._to_device(small, self._device), step)
        torch.autograd.backward(output.total)
        for number, (chunk, state) in enumerate(zip(chunks, random, strict=True)):
            last = number == len(chunks) - 1
            with self._sync(last):
                _set_random_state(state, self._device)
                features = self._encode(self._to_device(chunk.batch, self._device))
                _backward(features, whole, chunk, with_shared=last)
        return LossOutput(output.total.detach(), output.parts)


def split(batch: ImageTextBatch, chunk_size: int) -> Iterator[Chunk]:
    """A batch in chunks of so many images with their texts; the last may be smaller."""
    num_images = len(batch.images)
    for start in range(0, num_images, chunk_size):
        images = torch.arange(start, min(start + chunk_size, num_images))
        own = batch.text_to_image
        texts = ((own >= start) & (own < start + chunk_size)).nonzero()[:, 0]
        part = batch._replace(
            images=batch.images[start : start + chunk_size],
            tokens=batch.tokens[texts],
            text_to_image=own[texts] - start,
            ids=batch.ids[start : start + chunk_size],
            caption_hash=batch.caption_hash[texts],
            valid=batch.valid[start : start + chunk_size],
            extra={
                name: value[start : start + chunk_size] if value.ndim and len(value) == num_images else value
                for name, value in batch.extra.items()
            },
            keys=batch.keys[start : start + chunk_size],
        )
        yield Chunk(part, images, texts)


def merge(parts: Sequence[Features], chunks: Sequence[Chunk]) -> Features:
    """The features of a whole batch from those of its chunks, in the order of the batch.

    Tensors without dimensions are the same for all chunks; each tensor in `extra` has one row for each image.
    """
    device = parts[0].image.device
    images = torch.cat([chunk.images for chunk in chunks]).to(device)
    texts = torch.cat([chunk.texts for chunk in chunks]).to(device)
    starts = [int(chunk.images[0]) for chunk in chunks]
    own = [part.text_to_image + start for part, start in zip(parts, starts, strict=True)]
    extra = {
        name: value if value.ndim == 0 else _in_order([part.extra[name] for part in parts], images)
        for name, value in parts[0].extra.items()
    }
    rows = dict.fromkeys(_OF_IMAGES, images) | dict.fromkeys(_OF_TEXTS, texts)
    together: dict[str, Any] = {
        name: None if getattr(parts[0], name) is None else _in_order([getattr(part, name) for part in parts], order)
        for name, order in rows.items()
    }
    return parts[0]._replace(text_to_image=_in_order(own, texts), extra=extra, **together)


def _in_order(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    joined = torch.cat(list(parts))
    return torch.empty_like(joined).index_copy_(0, order, joined)


def _leaves(features: Features) -> Features:
    """The same features as the beginning of a graph."""
    leaves = {name: _leaf(value) for name, value in features._asdict().items() if isinstance(value, Tensor)}
    return features._replace(**leaves, extra={name: _leaf(value) for name, value in features.extra.items()})


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())


def _backward(features: Features, whole: Features, chunk: Chunk, with_shared: bool) -> None:
    """Backward through one chunk, from the gradients that the loss left at the features of the whole batch."""
    ends: list[Tensor] = []
    gradients: list[Tensor] = []
    named = {**features._asdict(), **{f"extra {name}": value for name, value in features.extra.items()}}
    of_whole = {**whole._asdict(), **{f"extra {name}": value for name, value in whole.extra.items()}}
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.requires_grad or of_whole[name].grad is None:
            continue
        if value.ndim == 0 and not with_shared:
            continue
        gradient = of_whole[name].grad
        if value.ndim:
            gradient = gradient[(chunk.texts if name in _OF_TEXTS else chunk.images).to(gradient.device)]
        ends.append(value)
        gradients.append(gradient)
    if ends:  # none where both towers are frozen
        torch.autograd.backward(ends, gradients)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    host, cuda = state
    torch.set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
