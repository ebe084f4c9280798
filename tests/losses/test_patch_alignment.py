"""PACL against the paper's equations in slow loops, and against the shortcut of the public re-implementations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.contracts import Features, ImageTextBatch
from vlkit.errors import ModelError
from vlkit.losses.clip import clip_loss
from vlkit.losses.patch_alignment import PatchAlignmentLoss, alignment_scores, patch_alignment_loss

SCALE = torch.tensor(7.0, dtype=torch.float64)


def made(images: int = 4, patches: int = 5, texts: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    local = torch.randn(images, patches, 6, generator=random, dtype=torch.float64)
    return local, F.normalize(torch.randn(texts, 6, generator=random, dtype=torch.float64), dim=-1)


def slow_phi(patches: torch.Tensor, text: torch.Tensor, scale: float) -> torch.Tensor:
    """One pair, by the equations: cosines, softmax, pooled vector, cosine."""
    cosines = torch.stack([F.cosine_similarity(patch, text, dim=0) for patch in patches])
    attention = torch.softmax(scale * cosines, dim=0)
    pooled = sum(weight * patch for weight, patch in zip(attention, patches, strict=True))
    return F.cosine_similarity(pooled, text, dim=0)


def slow_loss(patches: torch.Tensor, texts: torch.Tensor, own: list[int], logit_scale: torch.Tensor) -> torch.Tensor:
    logits = logit_scale * torch.stack([torch.stack([slow_phi(one, text, 10.0) for text in texts]) for one in patches])
    by_text = [-(logits[i, j] - logits[:, j].logsumexp(0)) for j, i in enumerate(own)]
    by_image = []
    for i in sorted(set(own)):
        mine = [j for j, image in enumerate(own) if image == i]
        by_image.append(sum(-(logits[i, j] - logits[i].logsumexp(0)) for j in mine) / len(mine))
    return (sum(by_text) / len(by_text) + sum(by_image) / len(by_image)) / 2


@pytest.mark.parametrize("own", [[0, 1, 2, 3], [0, 0, 2, 3, 3, 3]])
def test_value_and_gradients_are_those_of_the_slow_loop(own: list[int]) -> None:
    patches, raw = made(texts=len(own))
    scale = SCALE.clone()
    inputs = [value.requires_grad_() for value in (patches, raw, scale)]
    # Brought to unit norm inside, because the paper divides by the length and the loss takes it for 1.
    found = patch_alignment_loss(patches, F.normalize(raw, dim=-1), scale, 10.0, torch.tensor(own))
    expected = slow_loss(patches, F.normalize(raw, dim=-1), own, scale)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_chunks_change_neither_value_nor_gradient() -> None:
    patches, texts = made(images=7, texts=7)
    attention = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    patches.requires_grad_()
    results = []
    for tile_size in (1, 70, 1 << 20):  # one image at a time, two, all
        loss = patch_alignment_loss(patches, texts, SCALE, attention, tile_size=tile_size)
        results.append((loss, *torch.autograd.grad(loss, (patches, attention))))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert results[0][2].abs() > 1e-6, "the attention's scale can be learned"


def test_the_attention_of_negatives_counts() -> None:
    """The shortcut pools image i by its own text once. Here a patch of image 0 matters to text 1 alone."""
    texts = torch.eye(6, dtype=torch.float64)[:2]
    patches = torch.zeros(2, 2, 6, dtype=torch.float64)
    patches[0, 0, 0] = patches[1, 0, 1] = 1.0
    patches[0, 1, 2] = patches[1, 1, 2] = 1.0  # of no text
    turned = patches.clone()
    turned[0, 1] = 0.6 * torch.eye(6)[1] + 0.8 * torch.eye(6)[2]  # now it looks like the negative text
    sharp = 200.0

    def shortcut(local: torch.Tensor) -> torch.Tensor:
        attention = torch.softmax(sharp * (F.normalize(local, dim=-1) * texts[:, None]).sum(-1), dim=1)
        pooled = F.normalize((attention[..., None] * local).sum(1), dim=-1)
        return clip_loss(pooled, texts, SCALE)

    before, after = (patch_alignment_loss(local, texts, SCALE, sharp) for local in (patches, turned))
    assert after > 10 * before, "the negative pair found its own patch"
    torch.testing.assert_close(shortcut(turned), shortcut(patches))  # which is why it is wrong


def test_one_patch_is_the_cosine_and_order_is_nothing() -> None:
    patches, texts = made(patches=1)
    torch.testing.assert_close(alignment_scores(patches, texts, 10.0), F.normalize(patches[:, 0], dim=-1) @ texts.T)
    torch.testing.assert_close(
        patch_alignment_loss(patches, texts, SCALE, 10.0), clip_loss(F.normalize(patches[:, 0], dim=-1), texts, SCALE)
    )
    patches, texts = made()
    torch.testing.assert_close(alignment_scores(patches.flip(1), texts, 10.0), alignment_scores(patches, texts, 10.0))
    mean = F.normalize(patches.mean(1), dim=-1) @ texts.T
    torch.testing.assert_close(alignment_scores(patches, texts, 0.0), mean)
    best = (F.normalize(patches, dim=-1) @ texts.T).amax(1)
    torch.testing.assert_close(alignment_scores(patches, texts, 1e5), best)


def test_invalid_rows_are_as_if_they_were_not_there() -> None:
    patches, texts = made()
    valid = torch.tensor([True, False, True, True])
    kept = patch_alignment_loss(patches[valid], texts[valid], SCALE, 10.0)
    torch.testing.assert_close(patch_alignment_loss(patches, texts, SCALE, 10.0, valid=valid), kept)
    nothing = patch_alignment_loss(patches.requires_grad_(), texts, SCALE, 10.0, valid=torch.zeros(4).bool())
    nothing.backward()
    assert nothing == 0 and patches.grad is not None and not patches.grad.any()


def test_patches_of_length_zero_give_finite_numbers() -> None:
    patches = torch.zeros(2, 3, 6, requires_grad=True)
    loss = patch_alignment_loss(patches, F.normalize(torch.ones(2, 6), dim=-1), torch.tensor(10.0), 10.0)
    loss.backward()
    assert loss.isfinite() and patches.grad is not None and patches.grad.isfinite().all()


class Twice(torch.nn.Linear):
    attention_scale = 10.0


def test_the_term_trains_its_head() -> None:
    tokens, texts = made()
    term = PatchAlignmentLoss(Twice(6, 6, dtype=torch.float64))
    rows = torch.arange(4)
    features = Features(texts, texts, rows, SCALE, extra={"patch_tokens": tokens})
    batch: Any = ImageTextBatch(tokens, tokens, rows, rows, rows, torch.ones(4).bool(), {}, [])
    loss = term(features, batch, 0)
    torch.testing.assert_close(loss, patch_alignment_loss(term.head(tokens), texts, SCALE, 10.0))
    loss.backward()
    assert term.head.weight.grad is not None
    with pytest.raises(ModelError, match="no patch tokens"):
        term(features._replace(extra={}), batch, 0)


def test_shapes_that_do_not_go_together() -> None:
    patches, texts = made()
    with pytest.raises(ValueError, match=r"expected \(B,P,D\)"):
        alignment_scores(patches[:, 0], texts, 1.0)
    with pytest.raises(ValueError, match="pass text_to_image"):
        patch_alignment_loss(patches, texts[:3], SCALE, 1.0)
