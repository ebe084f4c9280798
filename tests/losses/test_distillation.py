"""Distillation against the matrices it never keeps, and against open_clip's own term."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import Features, ImageTextBatch
from vlkit.errors import DataError
from vlkit.losses import DistillationLoss, distillation_loss


def unit(rows: int, width: int, seed: int) -> Tensor:
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=1).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def slow(image: Tensor, text: Tensor, scale: Tensor, taught: tuple[Tensor, Tensor, float]) -> Tensor:
    """Both directions with whole matrices."""
    ours, theirs = scale * image @ text.T, taught[2] * taught[0] @ taught[1].T
    both = []
    for a, b in ((ours, theirs), (ours.T, theirs.T)):
        log_p = b.detach().log_softmax(1)
        both.append((log_p.exp() * (log_p - a.log_softmax(1))).sum(1).mean())
    return (both[0] + both[1]) / 2


@pytest.mark.parametrize("tile_size", [1, 15, 1 << 22])
def test_value_and_gradients_equal_whole_matrices(tile_size: int) -> None:
    image, text, scale = unit(5, 6, 0), unit(7, 6, 1), scalar(4.0)
    teacher = (unit(5, 3, 2), unit(7, 3, 3), 9.0)  # another width, another scale
    own = torch.tensor([0, 1, 1, 2, 3, 4, 4])
    found = distillation_loss(image, text, scale, teacher[0], teacher[1], torch.tensor(9.0), own, tile_size=tile_size)
    expected = slow(image, text, scale, teacher)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    inputs = (image, text, scale)
    for a, b in zip(*(torch.autograd.grad(loss * 3, inputs) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_pairs_worked_by_hand() -> None:
    # The teacher is sure of the diagonal (P = sigmoid(2)), the student sees no difference (Q = 1/2): in each of the
    # four rows and columns p log(2p) + (1-p) log(2(1-p)).
    image, eye = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2)
    p = torch.sigmoid(torch.tensor(2.0))
    by_hand = p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log()
    found = distillation_loss(image, image, torch.tensor(3.0), eye, eye, torch.tensor(2.0))
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_equals_open_clip_up_to_the_teachers_entropy() -> None:
    # open_clip's term is the cross-entropy; its gradient is that of the divergence.
    from open_clip.loss import DistillClipLoss

    image, text, scale = unit(20, 8, 4), unit(20, 8, 5), scalar(10.0)
    teacher = (unit(20, 8, 6).detach(), unit(20, 8, 7).detach(), torch.tensor(20.0, dtype=torch.float64))
    _, theirs = DistillClipLoss()(image, text, scale, *teacher)
    ours = distillation_loss(image, text, scale, *teacher)
    inputs = (image, text, scale)
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_student_that_agrees_has_no_loss() -> None:
    image, text = unit(6, 4, 8), unit(6, 4, 9)
    loss = distillation_loss(image, text, scalar(7.0), image, text, torch.tensor(7.0))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, image)[0].abs().max() < 1e-12


def test_following_the_gradient_brings_the_students_ranking_to_the_teachers() -> None:
    teacher = (unit(8, 4, 10).detach(), unit(8, 4, 11).detach(), torch.tensor(10.0))
    image, text = unit(8, 4, 12), unit(8, 4, 13)
    optimizer = torch.optim.Adam([image, text], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        distillation_loss(F.normalize(image), F.normalize(text), torch.tensor(10.0), *teacher).backward()
        optimizer.step()
    ours, theirs = F.normalize(image) @ F.normalize(text).T, teacher[0] @ teacher[1].T
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


def test_broken_rows_are_left_out() -> None:
    image, text = unit(5, 4, 14), unit(5, 4, 15)
    teacher = (unit(5, 4, 16), unit(5, 4, 17))
    valid = torch.tensor([True, False, True, True, False])
    found = distillation_loss(image, text, scalar(5.0), *teacher, torch.tensor(8.0), valid=valid)
    kept = distillation_loss(
        image[valid], text[valid], scalar(5.0), teacher[0][valid], teacher[1][valid], torch.tensor(8.0)
    )
    assert found.item() == kept.item()
    none = distillation_loss(image, text, scalar(5.0), *teacher, torch.tensor(8.0), valid=torch.zeros(5).bool())
    assert none.item() == 0


@pytest.mark.parametrize("rows", [256, 512])
def test_keeps_memory_linear_in_the_batch(rows: int) -> None:
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    sides = [unit(rows, 4, seed) for seed in range(18, 22)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        distillation_loss(sides[0], sides[1], scalar(5.0), sides[2], sides[3], torch.tensor(8.0), tile_size=rows * 32)
    assert sum(kept.values()) <= 4 * rows * 4 + 8 * rows + 100


def test_the_term_reads_the_teacher_from_the_batch() -> None:
    image, text, teacher = unit(3, 4, 22), unit(3, 4, 23), (unit(3, 5, 24), unit(3, 5, 25))
    own, empty = torch.arange(3), torch.empty(0)
    stored = {"teacher_image": teacher[0].detach(), "teacher_text": teacher[1].detach()}
    batch = ImageTextBatch(empty, empty, own, own, own, torch.ones(3, dtype=torch.bool), stored, [])
    given = Features(image, text, own, scalar(5.0))
    expected = distillation_loss(image, text, scalar(5.0), *teacher, torch.tensor(50.0))
    assert DistillationLoss(logit_scale=50.0)(given, batch, 0).item() == expected.item()
    # A teacher that runs beside the student brings its own scale.
    live = batch._replace(extra={**stored, "teacher_logit_scale": torch.tensor(50.0)})
    assert DistillationLoss()(given, live, 0).item() == expected.item()
    with pytest.raises(DataError, match=r"holds no teacher_text \(it holds teacher_image\)"):
        DistillationLoss()(given, batch._replace(extra={"teacher_image": teacher[0]}), 0)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="features have 4 and 3 rows; expected those of the student, 3 and 3"):
        distillation_loss(unit(3, 2, 0), unit(3, 2, 1), scalar(1.0), unit(4, 2, 2), unit(3, 2, 3), torch.tensor(1.0))
