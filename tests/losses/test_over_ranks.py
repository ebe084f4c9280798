"""FastCLIP, distillation and PACL on two processes against the same batch on one: value, gradients, normalisers."""

from collections.abc import Callable

# Each rank holds its part of the images and their ragged texts; gradients of parameters are averaged as DDP does.
TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses import DistillationLoss, FastClipLoss, distillation_loss, patch_alignment_loss
from vlkit.losses.base import share_of
from vlkit.losses.fast_clip import fast_clip_step

rank, world = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
made = torch.Generator().manual_seed(0)
own = torch.repeat_interleave(torch.arange(8), torch.tensor([1, 3, 2, 1, 1, 2, 0, 1]))
valid = torch.tensor([True, True, False, True, True, True, True, False])
ids = torch.tensor([4, 0, 7, 2, 9, 1, 3, 5])
x, teacher_x = (torch.randn(8, 5, generator=made, dtype=torch.float64) for _ in range(2))
y, teacher_y = (torch.randn(len(own), 5, generator=made, dtype=torch.float64) for _ in range(2))
taught = F.normalize(teacher_x), F.normalize(teacher_y)
rows = slice(rank * 4, rank * 4 + 4)
texts = (own >= rows.start) & (own < rows.stop)
empty = torch.empty(0)


def parameters():
    made = torch.Generator().manual_seed(1)
    towers = [torch.randn(5, 4, generator=made, dtype=torch.float64) for _ in range(2)]
    return [value.requires_grad_() for value in (*towers, torch.tensor(1.5, dtype=torch.float64))]


def features(p, rows=slice(None), texts=slice(None), first=0):
    return Features(F.normalize(x[rows] @ p[0]), F.normalize(y[texts] @ p[1]), own[texts] - first, p[2].exp())


def fast_alone(p):
    share = share_of(*features(p)[:3], valid, None, None, False)
    state = torch.linspace(-3, -1, 10, dtype=torch.float64)
    found = fast_clip_step(share, p[2].exp(), state[ids[valid]], state[ids[valid]] + 1, gamma=0.4, rho=3.0)
    new = state.clone()
    new[ids[valid][found.counted]] = found.log_u_image[found.counted]
    return found.loss, new


def fast_together(p, batch):
    term = FastClipLoss(gamma=0.4, gamma_decay=0.0, rho=3.0)
    term.begin(num_samples=10, steps_per_epoch=1, steps=1, device=torch.device("cpu"))
    term.double()
    term.log_u_image[:] = torch.linspace(-3, -1, 10, dtype=torch.float64)
    term.log_u_text[:] = term.log_u_image + 1
    return term(features(p, rows, texts, rows.start), batch, 0), term.log_u_image


def distilled_alone(p):
    image, text, _, scale, *_ = features(p)
    return distillation_loss(image, text, scale, *taught, torch.tensor(20.0), own, valid), torch.zeros(1)


def distilled_together(p, batch):
    return DistillationLoss(20.0, tile_size=30)(features(p, rows, texts, rows.start), batch, 0), torch.zeros(1)


patches = torch.randn(8, 3, 5, generator=made, dtype=torch.float64)


def aligned_alone(p):
    loss = patch_alignment_loss(patches @ p[0], F.normalize(y @ p[1]), p[2].exp(), p[2], own, valid)
    return loss, torch.zeros(1)


def aligned_together(p, batch):
    mine, text = patches[rows] @ p[0], F.normalize(y[texts] @ p[1])
    local = batch.text_to_image, batch.valid
    loss = patch_alignment_loss(mine, text, p[2].exp(), p[2], *local, over_ranks=True, tile_size=70)
    return loss, torch.zeros(1)


extra = {"teacher_image": taught[0][rows], "teacher_text": taught[1][texts]}
batch = ImageTextBatch(empty, empty, own[texts] - rows.start, ids[rows], own[texts], valid[rows], extra, [])
cases = ((fast_alone, fast_together), (distilled_alone, distilled_together), (aligned_alone, aligned_together))
for alone, together in cases:
    whole, mine = parameters(), parameters()
    (expected, expected_state), (loss, state) = alone(whole), together(mine, batch)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=0)
    for value, reference in zip(mine, whole):
        dist.all_reduce(value.grad)
        torch.testing.assert_close(value.grad / world, reference.grad, rtol=1e-9, atol=1e-13)
dist.destroy_process_group()
"""


def test_two_processes_give_what_one_gives(on_two_processes: Callable[[str], None]) -> None:
    on_two_processes(TWO_PROCESSES)
