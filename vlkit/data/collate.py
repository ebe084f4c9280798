"""The rows that were read of a batch, put together."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.contracts import ImageTextBatch
from vlkit.data.captions import Tokenizer
from vlkit.data.sample_reader import Rows

# In a batch's `extra`: (B,) which of its fixed views each image is in.
VIEW = "view"


@dataclass(frozen=True)
class Collator:
    """Makes batches of consecutive parts of their rows."""

    tokenizer: Tokenizer

    def __call__(self, ids: NDArray[np.int64], parts: list[Rows]) -> ImageTextBatch:
        """Everything but the pixels, in whose place stands an empty tensor; see `with_images`."""
        tokens = [row for part in parts for row in part.tokens]
        num_texts = torch.tensor([count for part in parts for count in part.num_texts])
        labels = [label for part in parts for label in part.labels]
        views = [view for part in parts for view in part.views]
        return ImageTextBatch(
            images=torch.empty(0, dtype=torch.uint8),
            tokens=self.tokenizer.pad(tokens),
            text_to_image=torch.repeat_interleave(torch.arange(len(ids)), num_texts),
            ids=torch.from_numpy(ids),
            caption_hash=torch.tensor([value for part in parts for value in part.caption_hash], dtype=torch.int64),
            valid=torch.tensor([value for part in parts for value in part.valid]),
            extra={name: torch.tensor(values) for name, values in (("labels", labels), (VIEW, views)) if values},
            keys=[key for part in parts for key in part.keys],
        )


def as_images(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flat memory as the pixels (V,B,3,S,S) of a batch; each image lies as S x S x 3.

    So decoders and the resize kernel leave them: an image is moved in one piece, which is 30 microseconds faster than
    taking its channels apart, and convolutions take such batches as `channels_last`.
    """
    views, rows, channels, height, width = shape
    return memory.view(views, rows, height, width, channels).permute(0, 1, 4, 2, 3)


def with_images(batch: ImageTextBatch, images: Tensor) -> ImageTextBatch:
    """The batch with its pixels, (V,B,3,size,size) uint8: the first view, and the second in `extra`."""
    views = {"second_view": images[1]} if len(images) > 1 else {}
    return batch._replace(images=images[0], extra={**batch.extra, **views})
