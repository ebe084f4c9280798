"""The tiled sigmoid loss against a case worked by hand, a slow loop, open_clip and numerical gradients."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import Features, ImageTextBatch
from vlkit.errors import ConfigError
from vlkit.losses import Objective, SigmoidLoss, sigmoid_loss


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=1).to(dtype).requires_grad_()


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def slow_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, own: list[int], valid: list[bool]) -> Tensor:
    """Algorithm 1 of the paper, one pair at a time."""
    texts = [j for j in range(len(text)) if valid[own[j]]]
    total = torch.zeros((), dtype=image.dtype)
    for i in (i for i in range(len(image)) if valid[i]):
        for j in texts:
            label = 1 if own[j] == i else -1
            total = total - torch.sigmoid(label * (scale * (image[i] @ text[j]) + bias)).log()
    return total / len(texts)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def test_two_pairs_worked_by_hand() -> None:
    # Cosines [[1, 0], [0.6, 0.8]], scale 2, bias -1: logits [[1, -1], [0.2, 0.6]].
    # Positives: log(1 + e^-1), log(1 + e^-0.6). Negatives: log(1 + e^-1), log(1 + e^0.2).
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    by_hand = sum(math.log1p(math.exp(exponent)) for exponent in (-1.0, -0.6, -1.0, 0.2)) / 2
    loss = sigmoid_loss(image, torch.eye(2), torch.tensor(2.0), torch.tensor(-1.0))
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("tile_size", [1, 11, 1 << 22], ids=["row by row", "two tiles or more", "one tile"])
def test_value_and_gradients_equal_the_slow_loop(texts_and_valid: tuple[list[int], list[bool]], tile_size: int) -> None:
    counts, valid = texts_and_valid
    own = [i for i, count in enumerate(counts) for _ in range(count)]
    own = own[1::2] + own[::2]  # nothing promises that texts lie in the order of the images
    inputs = features(len(counts), 6, 0), features(len(own), 6, 1), number(9.0), number(-3.0)
    expected = slow_loss(*inputs, own, valid)
    loss = sigmoid_loss(*inputs, torch.tensor(own), torch.tensor(valid), tile_size=tile_size)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, slow in zip(gradients(loss, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile_size", [8, 1 << 22])
def test_gradcheck(tile_size: int) -> None:
    own, valid = torch.tensor([0, 0, 1, 3, 2, 3]), torch.tensor([True, True, False, True])

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(image, text, scale, bias, own, valid, tile_size=tile_size)

    assert torch.autograd.gradcheck(loss, (features(4, 3, 2), features(6, 3, 3), number(5.0), number(-1.0)))


@pytest.mark.parametrize("tile_size", [1000, 1 << 22])
def test_equals_open_clip(tile_size: int) -> None:
    from open_clip.loss import SigLipLoss

    single = torch.float32
    inputs = features(100, 32, 4, single), features(100, 32, 5, single), number(20.0, single), number(-10.0, single)
    ours, theirs = sigmoid_loss(*inputs, tile_size=tile_size), SigLipLoss()(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_float32_of_far_logits_agrees_with_float64() -> None:
    # Positives at -100 and +80, where log(sigmoid(x)) by itself is -inf, or 1 - sigmoid(x) is 0.
    for sign in (1.0, -1.0):
        exact = features(64, 8, 6), (sign * features(64, 8, 6).detach()).requires_grad_(), number(90.0), number(-10.0)
        rounded = [value.detach().float().requires_grad_() for value in exact]
        expected, found = sigmoid_loss(*exact), sigmoid_loss(*rounded)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for a, b in zip(gradients(found, *rounded), gradients(expected, *exact), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [512, 1024])
def test_keeps_memory_linear_in_the_batch(rows: int, numbers_kept: Callable[[Callable[[], Any]], int]) -> None:
    width = 16
    image, text = features(rows, width, 7, torch.float32), features(rows, width, 8, torch.float32)
    kept = numbers_kept(partial(sigmoid_loss, image, text, number(10.0), number(-10.0), tile_size=rows * 64))
    assert kept <= 2 * rows * width + 100


def test_is_float32_under_autocast_and_for_half_precision() -> None:
    image, text = features(40, 16, 11, torch.bfloat16), features(40, 16, 12, torch.bfloat16)
    scale, bias = number(50.0, torch.float32), number(-10.0, torch.float32)
    expected = sigmoid_loss(image.float(), text.float(), scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_loss(image, text, scale, bias)
        (gradient,) = gradients(loss, image)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    assert gradient.dtype == torch.bfloat16


def test_no_valid_row_gives_zero() -> None:
    inputs = features(3, 4, 13), features(3, 4, 14), number(10.0), number(-10.0)
    loss = sigmoid_loss(*inputs, valid=torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, *inputs))


def test_wrong_shapes() -> None:
    numbers = torch.tensor(1.0), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"expected \(B,D\) and \(R,D\)"):
        sigmoid_loss(torch.zeros(3, 4), torch.zeros(3, 5), *numbers)
    with pytest.raises(ValueError, match="3 images and 6 texts: pass text_to_image"):
        sigmoid_loss(torch.zeros(3, 4), torch.zeros(6, 4), *numbers)


def test_the_term_reads_features_and_batch() -> None:
    image, text = features(3, 4, 15), features(4, 4, 16)
    own, valid = torch.tensor([0, 1, 2, 2]), torch.tensor([True, True, False])
    scale, bias = number(7.0), number(-2.0)
    batch = ImageTextBatch(*[torch.empty(0)] * 5, valid=valid, extra={}, keys=[])
    loss = SigmoidLoss()(Features(image, text, own, scale, bias), batch, 0)
    assert loss.item() == sigmoid_loss(image, text, scale, bias, own, valid).item()


def test_a_model_without_a_bias_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="Loss sigmoid needs logit_bias"):
        Objective({"sigmoid": (1.0, SigmoidLoss())}, gives=frozenset({"image", "text"}))
