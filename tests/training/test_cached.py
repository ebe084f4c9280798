"""Chunks against the whole batch in float64: value, all gradients, random numbers, batch statistics, memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses import ClipLoss, Objective, SigmoidLoss
from vlkit.training.cached import CachedStep, EncodeStep, merge, split

CPU = torch.device("cpu")
IMAGES = 8
GIVES = frozenset({"image", "text", "logit_bias"})


class Towers(nn.Module):
    """Images and tokens to features; `dropout` and `norm` as a real tower may have them."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 6))
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.text = nn.Sequential(nn.Embedding(20, 6), nn.Dropout(dropout), nn.Linear(6, 6))
        self.scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))
        self.extra = extra
        self.double()

    def forward(self, batch: ImageTextBatch) -> Features:
        image = F.normalize(self.norm(self.image(batch.images.flatten(1).double() / 255)), dim=1)
        text = F.normalize(self.text(batch.tokens).mean(1), dim=1)
        extra = {"doubled": 2 * image, "curvature": self.scale.sigmoid()} if self.extra else {}
        return Features(image, text, batch.text_to_image, self.scale.exp(), self.bias, extra=extra)


class UsesExtra(nn.Module):
    needs = frozenset({"image"})

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        return (features.extra["doubled"] ** 3).sum() * features.extra["curvature"]


def both_losses() -> Objective:
    terms = {"clip": (0.7, ClipLoss("mask")), "sigmoid": (1.3, SigmoidLoss("mask"))}
    return Objective(terms, gives=GIVES)


@pytest.fixture
def batch() -> ImageTextBatch:
    """Ragged captions in no order, a broken row, duplicates."""
    made = torch.Generator().manual_seed(1)
    own = torch.tensor([3, 0, 0, 7, 1, 5, 6, 4, 4, 2, 7, 7])
    valid = torch.ones(IMAGES, dtype=torch.bool)
    valid[5] = False
    return ImageTextBatch(
        images=torch.randint(0, 256, (IMAGES, 3, 2, 2), generator=made, dtype=torch.uint8),
        tokens=torch.randint(0, 20, (len(own), 4), generator=made),
        text_to_image=own,
        ids=torch.arange(IMAGES),
        caption_hash=torch.randint(0, 9, (len(own),), generator=made),
        valid=valid,
        extra={"labels": torch.arange(IMAGES)},
        keys=[str(i) for i in range(IMAGES)],
    )


def cached(towers: nn.Module, objective: Objective, chunk_size: int) -> CachedStep:
    return CachedStep(EncodeStep(towers, towers.forward), objective, chunk_size, CPU)


def gradients(towers: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in towers.named_parameters()}


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(found)[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("chunk_size", [4, 2, 3, 100], ids=["2 chunks", "4 chunks", "uneven", "one chunk"])
def test_chunks_give_value_and_gradients_of_the_whole_batch(batch: ImageTextBatch, chunk_size: int) -> None:
    whole, chunked = Towers(), Towers()
    expected = both_losses()(whole(batch), batch, 0)
    expected.total.backward()
    found = cached(chunked, both_losses(), chunk_size)(batch, 0)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
    assert {name: part.item() for name, part in found.parts.items()} == pytest.approx(
        {name: part.item() for name, part in expected.parts.items()}, rel=1e-12
    )
    assert not found.total.requires_grad
    assert_same_gradients(chunked, whole)


def test_the_second_pass_draws_the_same_random_numbers(batch: ImageTextBatch) -> None:
    def reference(towers: Towers) -> None:
        """All chunks with their graphs at once, drawing in the same order, and one loss."""
        chunks = list(split(batch, 2))
        both_losses()(merge([towers(chunk.batch) for chunk in chunks], chunks), batch, 0).total.backward()

    whole, chunked = Towers(dropout=0.5), Towers(dropout=0.5)
    torch.manual_seed(5)
    reference(whole)
    after = torch.rand(3)
    torch.manual_seed(5)
    cached(chunked, both_losses(), 2)(batch, 0)
    assert_same_gradients(chunked, whole)
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(6)
    other = Towers(dropout=0.5)
    torch.manual_seed(6)
    reference(other)
    assert not torch.allclose(gradients(other)["image.3.weight"], gradients(whole)["image.3.weight"])


def test_batch_statistics_are_updated_once(batch: ImageTextBatch) -> None:
    plain, chunked = Towers(norm=True), Towers(norm=True)
    for chunk in split(batch, 4):
        plain(chunk.batch)
    cached(chunked, both_losses(), 4)(batch, 0)
    assert chunked.norm.num_batches_tracked == 2
    torch.testing.assert_close(chunked.norm.running_mean, plain.norm.running_mean)


def test_extra_features_and_gradients_already_there(batch: ImageTextBatch) -> None:
    whole, chunked = Towers(extra=True), Towers(extra=True)
    objective = Objective({"extra": (1.0, UsesExtra())}, gives=GIVES)
    for _ in range(2):
        objective(whole(batch), batch, 0).total.backward()
        cached(chunked, objective, 3)(batch, 0)
    used = {name for name, gradient in gradients(whole).items() if gradient is not None}
    assert used == {name for name, gradient in gradients(chunked).items() if gradient is not None}
    for name in used:
        torch.testing.assert_close(gradients(chunked)[name], gradients(whole)[name], rtol=1e-10, atol=1e-13)


def test_a_frozen_tower(batch: ImageTextBatch) -> None:
    whole, chunked = Towers(), Towers()
    for towers in (whole, chunked):
        towers.image.requires_grad_(False)
    both_losses()(whole(batch), batch, 0).total.backward()
    cached(chunked, both_losses(), 2)(batch, 0)
    assert chunked.image[0].weight.grad is None
    torch.testing.assert_close(chunked.text[2].weight.grad, whole.text[2].weight.grad, rtol=1e-10, atol=1e-13)


def test_memory_is_that_of_a_chunk(batch: ImageTextBatch) -> None:
    def peak(run: Callable[[], object]) -> int:
        """Most numbers that graphs held at a time: a tensor is there from when it is saved to when it is used."""
        held, most = 0, 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal held, most
            held += tensor.numel()
            most = max(most, held)
            return tensor

        def unpack(tensor: Tensor) -> Tensor:
            nonlocal held
            held -= tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            run()
        return most

    large = batch._replace(
        images=batch.images.repeat(32, 1, 1, 1),
        tokens=batch.tokens.repeat(32, 1),
        text_to_image=torch.cat([batch.text_to_image + 8 * i for i in range(32)]),
        ids=torch.arange(256),
        caption_hash=torch.arange(32 * 12),
        valid=torch.ones(256, dtype=torch.bool),
        extra={},
        keys=[""] * 256,
    )
    towers, objective = Towers(), both_losses()
    whole = peak(lambda: objective(towers(large), large, 0).total.backward())
    assert peak(lambda: cached(towers, objective, 8)(large, 0)) < whole / 4
