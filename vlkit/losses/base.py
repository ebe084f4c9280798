"""What the losses over all pairs of a batch share: which rows count, how they lie over processes, what is no pair."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlkit.contracts import Features, ImageTextBatch
from vlkit.distributed import Spread, gather_counts, rank

# Logits in one tile: 16 MiB of float32. Smaller tiles make the matrix products slower, larger ones leave the cache.
TILE_SIZE = 1 << 22

# What is done about pairs whose captions are equal or whose images are the same: they count as negatives ("keep"),
# or as no pairs at all ("mask").
Duplicates = Literal["keep", "mask"]


class Share(NamedTuple):
    """The rows of a batch that count; with several processes, this one's share of them."""

    image: Tensor  # (B,D)
    text: Tensor  # (R,D)
    own: Tensor  # (G,) the image row each text of all processes describes; -1 for the texts of others
    texts: Spread  # how the texts lie over processes: R here, G in all
    images: Spread  # how the images lie over processes
    num_described: int  # images with a text, over all processes
    same: "SameKeys | None"  # what is neither positive nor negative


class SameKeys(NamedTuple):
    """Keys that are equal for equal captions and for the same image."""

    captions_of_image: Tensor  # (B,K)
    known: Tensor  # (B,K) bool: images have different numbers of captions
    caption_of_text: Tensor  # (G,)
    image: Tensor  # (B,)
    image_of_text: Tensor  # (G,)

    def mask(self, own: Tensor, start: int, rows: int) -> Tensor:
        """(rows, G) bool, for the images from `start` on: same image or same caption, but not its own text."""
        tile = slice(start, start + rows)
        found = self.image[tile, None] == self.image_of_text
        for captions, known in zip(self.captions_of_image[tile].T, self.known[tile].T, strict=True):
            found |= (captions[:, None] == self.caption_of_text) & known[:, None]
        place, inside = own_in_tile(own, start, rows)
        return found.scatter_(0, place, found.gather(0, place) & ~inside)


def share_of(
    image: Tensor,
    text: Tensor,
    text_to_image: Tensor | None,
    valid: Tensor | None,
    same_caption: Tensor | None,
    same_image: Tensor | None,
    over_ranks: bool,
) -> Share:
    """Leave out invalid rows and find out how the rest is spread over processes.

    Args:
        image: (B, D).
        text: (R, D).
        text_to_image: (R,) the image row each text describes; default: row i describes image i.
        valid: (B,) images to count.
        same_caption: (R,) keys, equal for equal captions.
        same_image: (B,) keys, equal for the same image.
        over_ranks: the batch is spread over all processes, and these are the rows of this one.

    Raises:
        ValueError: shapes that do not go together.
    """
    _check(image, text, text_to_image, valid, same_caption, same_image)
    if text_to_image is None:
        text_to_image = torch.arange(len(text), device=text.device)
    if valid is not None and not bool(valid.all()):
        kept = valid[text_to_image]
        text_to_image = (valid.cumsum(0) - 1)[text_to_image[kept]]
        image, text = image[valid], text[kept]
        same_caption = None if same_caption is None else same_caption[kept]
        same_image = None if same_image is None else same_image[valid]
    counts = [[len(text), len(text_to_image.unique()), len(image)]]
    if over_ranks:
        counts = gather_counts(torch.tensor(counts[0], device=text.device))
    num_texts, num_described, num_images = zip(*counts, strict=True)
    me = rank() if over_ranks else 0
    texts, images = Spread(num_texts, me), Spread(num_images, me)
    own = torch.full((texts.total,), -1, dtype=torch.int64, device=text.device)
    own[texts.own] = text_to_image
    same = None
    if same_caption is not None or same_image is not None:
        same = _same_keys(image, text_to_image, texts, same_caption, same_image)
    return Share(image, text, own, texts, images, sum(num_described), same)


def own_in_tile(own: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """The row of each text's image in a tile (1, G), and whether it is in the tile (G,), without asking the device."""
    place = own - start
    return place.clamp(0, rows - 1)[None], (place >= 0) & (place < rows)


def tile_logits(
    tile: Tensor, texts: Tensor, scale: Tensor, share: Share, start: int, only_negatives: bool = False
) -> Tensor:
    """(rows, G) logits of the images from `start` on; -inf where an image and a text are neither positive nor
    negative, and with `only_negatives` also where they are positive."""
    logits = (scale * tile) @ texts.T
    if share.same is not None:
        logits.masked_fill_(share.same.mask(share.own, start, len(tile)), -torch.inf)
    if only_negatives:
        place, inside = own_in_tile(share.own, start, len(tile))
        logits.scatter_(0, place, logits.gather(0, place).masked_fill_(inside, -torch.inf))
    return logits


class LogSumExps(NamedTuple):
    """Of the logits of all images with all texts."""

    image: Tensor  # (B,) of each image over texts
    text: Tensor  # (G,) of each text over the images of all processes
    own_logit: Tensor  # (G,) each text's logit with its own image; 0 for texts of other processes


def log_sum_exps(
    image: Tensor, texts: Tensor, scale: Tensor, share: Share, rows: int, only_negatives: bool = False
) -> LogSumExps:
    """One pass over tiles of `rows` images; what has no logit gets the lowest number instead of -inf."""
    lse_image = image.new_empty(len(image))
    own_logit = image.new_zeros(len(texts))
    top, total = image.new_full((len(texts),), lowest(image)), image.new_zeros(len(texts))
    for start in range(0, len(image), rows):
        logits = tile_logits(image[start : start + rows], texts, scale, share, start, only_negatives)
        lse_image[start : start + rows] = logits.logsumexp(dim=1)
        place, inside = own_in_tile(share.own, start, len(logits))
        own_logit += logits.gather(0, place)[0].masked_fill(~inside, 0)
        # Online: what was summed below an older maximum is brought below the new one.
        new_top = torch.maximum(top, logits.amax(dim=0))
        total = total * (top - new_top).exp_() + logits.sub_(new_top).exp_().sum(dim=0)
        top = new_top
    top_of_all = share.texts.max(top.clone())
    total = share.texts.sum(total * (top - top_of_all).exp_())
    lse_text = (top_of_all + total.log()).clamp_(min=lowest(image))
    return LogSumExps(lse_image.clamp_(min=lowest(image)), lse_text, own_logit)


def lowest(values: Tensor) -> float:
    """Stands for -inf where a difference of two must not be nan."""
    return torch.finfo(values.dtype).min


def sum_over_ranks(mine: Tensor, spread: Spread) -> Tensor:
    """() the sum over processes of what each adds to a loss, with gradients for averaging over processes."""
    total: Tensor = _SumOverRanks.apply(mine, spread)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, spread: Spread) -> Tensor:
        ctx.num_ranks = spread.num_ranks
        return spread.sum(mine.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.num_ranks, None


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, else float32."""
    return torch.promote_types(features.dtype, torch.float32)


def keys_of(duplicates: Duplicates, features: Features, batch: ImageTextBatch) -> dict[str, Tensor]:
    """The arguments `same_caption` and `same_image` for a batch; none where duplicates count as negatives.

    Images are the same when `extra["same_image"]` says so; without it, when they are the same sample.
    """
    if duplicates == "keep":
        return {}
    device = features.image.device
    same_image = batch.extra.get("same_image", batch.ids)
    return {"same_caption": batch.caption_hash.to(device), "same_image": same_image.to(device)}


def _same_keys(
    image: Tensor, own: Tensor, texts: Spread, same_caption: Tensor | None, same_image: Tensor | None
) -> SameKeys:
    if same_image is None:  # keys that are equal to nothing
        same_image = torch.zeros(len(image), dtype=torch.int64, device=own.device)
        image_of_text = torch.full((texts.total,), -1, device=own.device)
    else:
        image_of_text = texts.gather(same_image[own])
    if same_caption is None:
        none = same_image.new_zeros((len(image), 0))
        return SameKeys(none, none.bool(), image_of_text, same_image, image_of_text)
    order = own.argsort(stable=True)
    rows, counts = own[order], own.bincount(minlength=len(image))
    place = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[rows]
    captions = same_caption.new_zeros((len(image), int(counts.max()) if len(counts) else 0))
    known = torch.zeros_like(captions, dtype=torch.bool)
    captions[rows, place], known[rows, place] = same_caption[order], True
    return SameKeys(captions, known, texts.gather(same_caption), same_image, image_of_text)


def _check(
    image: Tensor,
    text: Tensor,
    text_to_image: Tensor | None,
    valid: Tensor | None,
    same_caption: Tensor | None,
    same_image: Tensor | None,
) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"Features are {tuple(image.shape)} and {tuple(text.shape)}; expected (B,D) and (R,D).")
    if text_to_image is None and len(image) != len(text):
        raise ValueError(f"{len(image)} images and {len(text)} texts: pass text_to_image, which image each describes.")
    for name, values, rows, kind in (
        ("text_to_image", text_to_image, text, "row for each text"),
        ("valid", valid, image, "entry for each image"),
        ("same_caption", same_caption, text, "key for each text"),
        ("same_image", same_image, image, "key for each image"),
    ):
        if values is not None and values.shape != rows.shape[:1]:
            raise ValueError(f"{name} is {tuple(values.shape)}; expected one {kind}, {len(rows)}.")
