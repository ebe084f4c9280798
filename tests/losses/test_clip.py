"""The tiled loss against a case worked by hand, a slow loop, open_clip, numerical gradients and two processes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses import ClipLoss, clip_loss


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=1).to(dtype).requires_grad_()


def slow_loss(image: Tensor, text: Tensor, scale: Tensor, own: list[int], valid: list[bool]) -> Tensor:
    """Loops over the definition, one logarithm at a time."""
    images = [i for i in range(len(image)) if valid[i]]
    texts = [j for j in range(len(text)) if valid[own[j]]]
    logit = {(i, j): scale * (image[i] @ text[j]) for i in images for j in texts}
    to_image = []
    for j in texts:
        chances = torch.stack([logit[i, j] for i in images]).softmax(0)
        to_image.append(-chances[images.index(own[j])].log())
    to_text = []
    for i in images:
        chances = torch.stack([logit[i, j] for j in texts]).softmax(0)
        own_texts = [-chances[place].log() for place, j in enumerate(texts) if own[j] == i]
        if own_texts:
            to_text.append(torch.stack(own_texts).mean())
    return (torch.stack(to_image).mean() + torch.stack(to_text).mean()) / 2


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def test_two_pairs_worked_by_hand() -> None:
    # Cosines [[1, 0], [0.6, 0.8]], scale 2: logits [[2, 0], [1.2, 1.6]].
    # Rows: log(1 + e^-2), log(1 + e^-0.4). Columns: log(1 + e^-0.8), log(1 + e^-1.6).
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.eye(2)
    by_hand = sum(math.log1p(math.exp(-gap)) for gap in (2.0, 0.4, 0.8, 1.6)) / 4
    assert clip_loss(image, text, torch.tensor(2.0)).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("tile_size", [1, 11, 1 << 22], ids=["row by row", "two tiles or more", "one tile"])
def test_value_and_gradients_equal_the_slow_loop(texts_and_valid: tuple[list[int], list[bool]], tile_size: int) -> None:
    counts, valid = texts_and_valid
    own = [i for i, count in enumerate(counts) for _ in range(count)]
    # Texts in another order than the images, as nothing promises that they are sorted.
    own = own[1::2] + own[::2]
    image, text = features(len(counts), 6, 0), features(len(own), 6, 1)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    expected = slow_loss(image, text, scale, own, valid)
    loss = clip_loss(image, text, scale, torch.tensor(own), torch.tensor(valid), tile_size=tile_size)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, slow in zip(gradients(loss, image, text, scale), gradients(expected, image, text, scale), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile_size", [8, 1 << 22])
def test_gradcheck(tile_size: int) -> None:
    own = torch.tensor([0, 0, 1, 3, 2, 3])
    valid = torch.tensor([True, True, False, True])
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return clip_loss(image, text, scale, own, valid, tile_size=tile_size)

    assert torch.autograd.gradcheck(loss, (features(4, 3, 2), features(6, 3, 3), scale))


@pytest.mark.parametrize("tile_size", [1000, 1 << 22])
def test_equals_open_clip(tile_size: int) -> None:
    from open_clip import ClipLoss as Theirs

    image, text = features(100, 32, 4, torch.float32), features(100, 32, 5, torch.float32)
    scale = torch.tensor(100.0, requires_grad=True)
    ours, theirs = clip_loss(image, text, scale, tile_size=tile_size), Theirs()(image, text, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours, image, text, scale), gradients(theirs, image, text, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_large_scales_stay_finite() -> None:
    image = features(64, 8, 6, torch.float32)
    for tile_size in (100, 1 << 22):
        scale = torch.tensor(1000.0, requires_grad=True)
        loss = clip_loss(image, image.detach().flip(0), scale, tile_size=tile_size)
        assert all(torch.isfinite(value).all() for value in (loss, *gradients(loss, image, scale)))
        assert loss > 100


@pytest.mark.parametrize("rows", [512, 1024])
def test_keeps_memory_linear_in_the_batch(rows: int, numbers_kept: Callable[[Callable[[], Any]], int]) -> None:
    width = 16
    image, text = features(rows, width, 7, torch.float32), features(rows, width, 8, torch.float32)
    for tile_size in (rows * 64, 1 << 22):
        scale = torch.tensor(10.0, requires_grad=True)
        kept = numbers_kept(partial(clip_loss, image, text, scale, tile_size=tile_size))
        assert kept <= 2 * rows * width + 8 * rows + 100


def test_is_float32_under_autocast() -> None:
    image, text = features(40, 16, 9, torch.float32), features(40, 16, 10, torch.float32)
    scale = torch.tensor(50.0, requires_grad=True)
    expected = gradients(clip_loss(image, text, scale), image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        loss = clip_loss(image, text, scale)
        found = gradients(loss, image, text, scale)
    assert loss.dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_half_precision_features_are_computed_in_float32() -> None:
    image, text = features(40, 16, 11, torch.bfloat16), features(40, 16, 12, torch.bfloat16)
    loss = clip_loss(image, text, torch.tensor(50.0))
    assert loss.item() == pytest.approx(clip_loss(image.float(), text.float(), torch.tensor(50.0)).item(), rel=1e-6)
    (gradient,) = gradients(loss, image)
    assert gradient.dtype == torch.bfloat16


def test_no_valid_row_gives_zero() -> None:
    image, text = features(3, 4, 13), features(3, 4, 14)
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    loss = clip_loss(image, text, scale, valid=torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, image, text, scale))


def test_wrong_shapes() -> None:
    image, scale = torch.zeros(3, 4), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"expected \(B,D\) and \(R,D\)"):
        clip_loss(image, torch.zeros(3, 5), scale)
    with pytest.raises(ValueError, match="3 images and 6 texts: pass text_to_image"):
        clip_loss(image, torch.zeros(6, 4), scale)
    with pytest.raises(ValueError, match="one row for each text, 6"):
        clip_loss(image, torch.zeros(6, 4), scale, torch.arange(3))
    with pytest.raises(ValueError, match="one entry for each image, 3"):
        clip_loss(image, torch.zeros(3, 4), scale, valid=torch.ones(4, dtype=torch.bool))


def test_the_term_reads_features_and_batch() -> None:
    image, text = features(3, 4, 15), features(4, 4, 16)
    own, valid = torch.tensor([0, 1, 2, 2]), torch.tensor([True, True, False])
    scale = torch.tensor(7.0, dtype=torch.float64)
    batch = ImageTextBatch(*[torch.empty(0)] * 5, valid=valid, extra={}, keys=[])
    loss = ClipLoss()(Features(image, text, own, scale), batch, 0)
    assert loss.item() == clip_loss(image, text, scale, own, valid).item()


# Each rank holds its part of the images and, ragged, their texts; parameters' gradients are averaged as DDP does.
TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses import ClipLoss, clip_loss

rank, world = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
made = torch.Generator().manual_seed(0)
counts = torch.tensor([1, 3, 2, 1, 1, 2, 1, 1])
own = torch.repeat_interleave(torch.arange(8), counts)
valid = torch.tensor([True, True, False, True, True, True, True, False])
x = torch.randn(8, 5, generator=made, dtype=torch.float64)
y = torch.randn(len(own), 5, generator=made, dtype=torch.float64)


def parameters():
    made = torch.Generator().manual_seed(1)
    towers = [torch.randn(5, 4, generator=made, dtype=torch.float64) for _ in range(2)]
    return [value.requires_grad_() for value in (*towers, torch.tensor(2.0, dtype=torch.float64))]


whole = parameters()
expected = clip_loss(F.normalize(x @ whole[0]), F.normalize(y @ whole[1]), whole[2].exp(), own, valid)
expected.backward()

mine = parameters()
rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
texts = (own >= rows.start) & (own < rows.stop)
image, text = F.normalize(x[rows] @ mine[0]), F.normalize(y[texts] @ mine[1])
features = Features(image, text, own[texts] - rows.start, mine[2].exp())
batch = ImageTextBatch(*[torch.empty(0)] * 5, valid=valid[rows], extra={}, keys=[])
loss = ClipLoss()(features, batch, 0)
loss.backward()
torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
for value, reference in zip(mine, whole):
    dist.all_reduce(value.grad)
    torch.testing.assert_close(value.grad / world, reference.grad, rtol=1e-9, atol=1e-12)
dist.destroy_process_group()
"""


def test_two_processes_give_the_loss_and_gradients_of_one(on_two_processes: Callable[[str], None]) -> None:
    on_two_processes(TWO_PROCESSES)
