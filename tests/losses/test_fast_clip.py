"""FastCLIP against a slow loop of the paper's equations over several steps, and with its memory left out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses import FastClipLoss
from vlkit.losses.fast_clip import cosine_gamma

CPU = torch.device("cpu")
EPS = 1e-14


def unit(rows: int, seed: int) -> Tensor:
    made = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=1).requires_grad_()


def make_batch(own: list[int], ids: list[int], valid: list[bool] | None = None) -> ImageTextBatch:
    empty, texts = torch.empty(0), torch.tensor(own)
    kept = torch.tensor(valid or [True] * len(ids))
    return ImageTextBatch(empty, empty, texts, torch.tensor(ids), texts, kept, {}, [str(i) for i in ids])


def make_term(num_samples: int = 12, **settings: float) -> FastClipLoss:
    term = FastClipLoss(**settings)  # type: ignore[arg-type]
    term.begin(num_samples=num_samples, steps_per_epoch=2, steps=8, device=CPU)
    term.double()
    return term


class Slow:
    """The equations of the paper, one exponential at a time. Normalisers in a dict by the number of the sample."""

    def __init__(self, version: int, rho: float) -> None:
        self.version, self.rho = version, rho
        self.u: dict[tuple[str, int], float] = {}

    def __call__(self, image: Tensor, text: Tensor, tau: Tensor, batch: ImageTextBatch, gamma: float) -> Tensor:
        own, ids = batch.text_to_image.tolist(), batch.ids.tolist()
        images = [i for i in range(len(ids)) if batch.valid[i]]
        texts = [j for j in range(len(own)) if batch.valid[own[j]]]
        described = [i for i in images if i in [own[j] for j in texts]]
        if self.version == 1:
            tau = tau.detach()
        surrogate, value = torch.zeros((), dtype=torch.float64), 0.0
        for i in described:
            mine = [j for j in texts if own[j] == i]
            g_image, g_text = [], []
            for j in mine:
                others = [torch.exp((image[i] @ text[k] - image[i] @ text[j]) / tau) for k in texts if own[k] != i]
                g_image.append(torch.stack(others).mean())
                others = [torch.exp((image[k] @ text[j] - image[i] @ text[j]) / tau) for k in images if k != i]
                g_text.append(torch.stack(others).mean())
            for side, g in (("image", torch.stack(g_image).mean()), ("text", torch.stack(g_text).mean())):
                old = self.u.get((side, ids[i]), g.item())
                u = (1 - gamma) * old + gamma * g.item()
                self.u[side, ids[i]] = u
                surrogate = surrogate + g / (EPS + u)
                value += math.log(EPS + u)
        surrogate, value = surrogate / (2 * len(described)), value / (2 * len(described))
        gradient_only = surrogate - surrogate.detach()
        if self.version == 1:
            return value + gradient_only
        return tau * (value + self.rho) + tau.detach() * gradient_only


# Samples come again in another company; image 1 of the second batch has no text, the last of the third is broken.
STEPS = [
    make_batch([0, 1, 2, 3], [3, 1, 4, 7]),
    make_batch([2, 0, 0, 3], [1, 3, 9, 7]),
    make_batch([0, 1, 1, 2, 3, 3], [7, 3, 1, 4], [True, True, True, False]),
    make_batch([1, 0, 2, 3], [9, 4, 3, 1]),
]


@pytest.mark.parametrize("tile_size", [1, 9, 1 << 22])
@pytest.mark.parametrize("version", [1, 3])
def test_value_gradients_and_normalisers_equal_the_slow_loop(version: int, tile_size: int) -> None:
    term = make_term(version=version, gamma=0.3, gamma_decay=0.75, rho=2.0, tile_size=tile_size)
    slow = Slow(version, 2.0)
    for step, batch in enumerate(STEPS):
        image, text = unit(4, 2 * step), unit(len(batch.text_to_image), 2 * step + 1)
        scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
        loss = term(Features(image, text, batch.text_to_image, scale), batch, step)
        expected = slow(image, text, 1 / scale, batch, term.gamma_at(step))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        inputs = (image, text, scale) if version == 3 else (image, text)
        pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for (side, sample), u in slow.u.items():
        assert getattr(term, f"log_u_{side}")[sample].exp().item() == pytest.approx(u, rel=1e-10)
    seen = {sample for _, sample in slow.u}
    assert not term.log_u_image[[i for i in range(12) if i not in seen]].isfinite().any()


def test_two_pairs_worked_by_hand() -> None:
    # Cosines [[1, 0], [0.6, 0.8]], tau 1/2, first step, so u = g. Images: exp(2 (0 - 1)), exp(2 (0.6 - 0.8));
    # texts: exp(2 (0.6 - 1)), exp(2 (0 - 0.8)). Half the mean of log u over the two: (-2 - 0.4 - 0.8 - 1.6) / 4.
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    batch = make_batch([0, 1], [0, 1])
    features = Features(image, torch.eye(2, dtype=torch.float64), batch.text_to_image, torch.tensor(2.0).double())
    assert make_term(version=1)(features, batch, 0).item() == pytest.approx(-4.8 / 4)
    assert make_term(version=3, rho=7.0)(features, batch, 0).item() == pytest.approx(0.5 * (-4.8 / 4 + 7))


def test_the_memory_of_earlier_batches_changes_the_gradient() -> None:
    batch, image, text = STEPS[0], unit(4, 0), unit(4, 1)
    features = Features(image, text, batch.text_to_image, torch.tensor(6.0, dtype=torch.float64))
    fresh, remembering = make_term(version=1, gamma_decay=0.0), make_term(version=1, gamma_decay=0.0)
    # The same samples met easier negatives before (all as near as the positive: u = 1), so what they meet now stands
    # out and moves them more.
    equal = unit(1, 9).detach().expand(4, 5)
    remembering(Features(equal, equal, batch.text_to_image, torch.tensor(6.0, dtype=torch.float64)), batch, 0)
    (plain,) = torch.autograd.grad(fresh(features, batch, 1), image)
    (moved,) = torch.autograd.grad(remembering(features, batch, 1), image)
    assert moved.norm() > 2 * plain.norm()


def test_gamma_falls_epoch_by_epoch() -> None:
    # 2 steps an epoch, 8 steps, decay over half the run: epochs 0 and 1 of 2 decay, then the end.
    term = make_term(gamma=0.2, gamma_decay=0.5)
    assert [term.gamma_at(step) for step in range(6)] == pytest.approx([1, 1, 0.6, 0.6, 0.2, 0.2])
    assert make_term(gamma=0.2, gamma_decay=0.0).gamma_at(0) == 0.2
    assert cosine_gamma(3, 4, 0.2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 - math.sqrt(0.5)))


def test_large_scales_stay_finite() -> None:
    image = unit(6, 3).float().detach().requires_grad_()
    batch = make_batch(list(range(6)), list(range(6)))
    term = FastClipLoss(version=3)
    term.begin(num_samples=6, steps_per_epoch=1, steps=4, device=CPU)
    for step in range(3):
        scale = torch.tensor(100.0, requires_grad=True)
        loss = term(Features(image, image.detach().flip(0), batch.text_to_image, scale), batch, step)
        gradients = torch.autograd.grad(loss, (image, scale))
        assert all(value.isfinite().all() for value in (loss, *gradients, term.log_u_image, term.log_u_text))


@pytest.mark.parametrize("own", [[0], [0, 0]])
def test_a_batch_without_negatives_gives_zero_and_keeps_the_state(own: list[int]) -> None:
    term, batch = make_term(version=1), make_batch(own, [5])
    image, text = unit(1, 4), unit(len(own), 5)
    loss = term(Features(image, text, batch.text_to_image, torch.tensor(6.0, dtype=torch.float64)), batch, 0)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (image, text)))
    assert not term.log_u_image.isfinite().any()


def test_duplicates_are_no_negatives() -> None:
    # Two images of the same sample group and a third: each of the two has the third as its only negative.
    image, text = unit(3, 6), unit(3, 7)
    batch = make_batch([0, 1, 2], [0, 1, 2])._replace(extra={"same_image": torch.tensor([5, 5, 6])})
    scale = torch.tensor(6.0, dtype=torch.float64)
    term = FastClipLoss(version=1, duplicates="mask")
    term.begin(num_samples=3, steps_per_epoch=1, steps=1, device=CPU)
    term.double()
    term(Features(image, text, batch.text_to_image, scale), batch, 0)
    cosine = (image @ text.T).detach()
    assert term.log_u_image[0].item() == pytest.approx(6 * (cosine[0, 2] - cosine[0, 0]).item())
    assert term.log_u_text[1].item() == pytest.approx(6 * (cosine[2, 1] - cosine[1, 1]).item())


def test_state_is_in_the_state_dict() -> None:
    term, batch = make_term(), STEPS[0]
    term(Features(unit(4, 0), unit(4, 1), batch.text_to_image, torch.tensor(6.0, dtype=torch.float64)), batch, 0)
    other = make_term()
    other.load_state_dict(term.state_dict())
    assert torch.equal(other.log_u_image, term.log_u_image) and other.log_u_image[3].isfinite()


@pytest.mark.parametrize("rows", [256, 512])
def test_keeps_memory_linear_in_the_batch(rows: int) -> None:
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    batch = make_batch(list(range(rows)), list(range(rows)))
    image, text = unit(rows, 8).float(), unit(rows, 9).float()
    term = FastClipLoss(tile_size=rows * 32)
    term.begin(num_samples=rows, steps_per_epoch=1, steps=1, device=CPU)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        term(Features(image, text, batch.text_to_image, torch.tensor(10.0, requires_grad=True)), batch, 0)
    assert sum(kept.values()) <= 10 * rows * 5 + 60 * rows + 100
