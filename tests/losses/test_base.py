"""Duplicates are no negatives: both losses against slow loops that leave such pairs out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses import ClipLoss, SigmoidLoss, clip_loss, sigmoid_loss

# Six images, nine texts. Captions 5 and 7 occur with several images, images 0 and 4 are the same, image 3 has no
# text and is the same as image 5, image 2 is broken and would have been a duplicate.
OWN = [4, 0, 0, 1, 2, 5, 1, 5, 4]
CAPTION = [5, 5, 6, 7, 5, 7, 8, 9, 1]
IMAGE = [3, 2, 3, 1, 3, 1]
VALID = [True, True, False, True, True, True]
# The pairs of an image and a text that are neither, found by reading the lists above.
NEITHER = {(0, 0), (0, 8), (1, 5), (3, 5), (3, 7), (4, 1), (4, 2), (5, 3)}

SCALE, BIAS = 6.0, -2.0


def features(rows: int, seed: int) -> Tensor:
    made = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=1).requires_grad_()


def ours(name: str, image: Tensor, text: Tensor, keys: dict[str, Tensor], tile_size: int) -> Tensor:
    scale, bias = torch.tensor(SCALE, dtype=torch.float64), torch.tensor(BIAS, dtype=torch.float64)
    common = (torch.tensor(OWN), torch.tensor(VALID))
    if name == "clip":
        return clip_loss(image, text, scale, *common, **keys, tile_size=tile_size)
    return sigmoid_loss(image, text, scale, bias, *common, **keys, tile_size=tile_size)


def slow_clip(image: Tensor, text: Tensor) -> Tensor:
    logit = SCALE * image @ text.T
    images = [i for i in range(6) if VALID[i]]
    texts = [j for j in range(9) if VALID[OWN[j]]]
    to_image = [logit[[i for i in images if (i, j) not in NEITHER], j].logsumexp(0) - logit[OWN[j], j] for j in texts]
    to_text = []
    for i in sorted({OWN[j] for j in texts}):
        among = logit[i, [j for j in texts if (i, j) not in NEITHER]].logsumexp(0)
        to_text.append(torch.stack([among - logit[i, j] for j in texts if OWN[j] == i]).mean())
    return (torch.stack(to_image).mean() + torch.stack(to_text).mean()) / 2


def slow_sigmoid(image: Tensor, text: Tensor) -> Tensor:
    logit = SCALE * image @ text.T + BIAS
    texts = [j for j in range(9) if VALID[OWN[j]]]
    pairs = [(i, j) for i in range(6) if VALID[i] for j in texts if (i, j) not in NEITHER]
    return sum(F.softplus(-logit[i, j] if OWN[j] == i else logit[i, j]) for i, j in pairs) / len(texts)


@pytest.mark.parametrize("tile_size", [1, 20, 1 << 22])
@pytest.mark.parametrize(("name", "slow"), [("clip", slow_clip), ("sigmoid", slow_sigmoid)])
def test_duplicates_are_left_out(name: str, slow: Callable[[Tensor, Tensor], Tensor], tile_size: int) -> None:
    image, text = features(6, 0), features(9, 1)
    keys = {"same_caption": torch.tensor(CAPTION), "same_image": torch.tensor(IMAGE)}
    found, expected = ours(name, image, text, keys, tile_size), slow(image, text)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, (image, text)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_keys_that_are_all_different_change_nothing(name: str) -> None:
    image, text = features(6, 2), features(9, 3)
    plain = ours(name, image, text, {}, 1 << 22).item()
    different = {"same_caption": torch.arange(9), "same_image": torch.arange(6)}
    for names in (["same_caption"], ["same_image"], ["same_caption", "same_image"]):
        keys = {key: different[key] for key in names}
        assert ours(name, image, text, keys, 1 << 22).item() == plain


@pytest.mark.parametrize("tile_size", [1, 1 << 22])
@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_a_batch_of_nothing_but_duplicates(name: str, tile_size: int) -> None:
    image, text = features(6, 4), features(9, 5)
    loss = ours(name, image, text, {"same_image": torch.zeros(6, dtype=torch.int64)}, tile_size)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, (image, text)))
    assert torch.isfinite(loss)


def test_the_terms_take_keys_from_the_batch() -> None:
    image, text, own = features(6, 6), features(9, 7), torch.tensor(OWN)
    scale, bias = torch.tensor(SCALE, dtype=torch.float64), torch.tensor(BIAS, dtype=torch.float64)
    given = Features(image, text, own, scale, bias)
    empty, keys = torch.empty(0), {"same_caption": torch.tensor(CAPTION), "same_image": torch.tensor(IMAGE)}
    batch = ImageTextBatch(
        empty, empty, own, torch.tensor(IMAGE), torch.tensor(CAPTION), torch.tensor(VALID), extra={}, keys=[]
    )
    assert ClipLoss("mask")(given, batch, 0).item() == ours("clip", image, text, keys, 1 << 22).item()
    assert SigmoidLoss("mask")(given, batch, 0).item() == ours("sigmoid", image, text, keys, 1 << 22).item()
    assert ClipLoss()(given, batch, 0).item() == ours("clip", image, text, {}, 1 << 22).item()
    # Given groups of images take the place of the sample's identity.
    grouped = batch._replace(ids=torch.arange(6), extra={"same_image": torch.tensor(IMAGE)})
    assert ClipLoss("mask")(given, grouped, 0).item() == ours("clip", image, text, keys, 1 << 22).item()


def test_wrong_shapes() -> None:
    image, scale = torch.zeros(3, 4), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"same_caption is \(2,\); expected one key for each text, 3"):
        clip_loss(image, image, scale, same_caption=torch.zeros(2))
    with pytest.raises(ValueError, match=r"same_image is .* expected one key for each image, 3"):
        clip_loss(image, image, scale, same_image=torch.zeros(4))
