import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vlkit.addons.reference import Reference
from vlkit.addons.terms.tip_adapter import TipAdapter
from vlkit.addons.terms.tip_adapter_f import TipAdapterF

Blobs = Callable[..., Reference]


def loss_of(addon: Any, reference: Reference) -> float:
    shots = reference.few_shot
    assert shots is not None and reference.logits is not None and shots.labels is not None
    base = reference.logits(shots.vectors)
    return float(F.cross_entropy(base + addon.term(shots.vectors, base), shots.labels))


def test_without_training_it_is_tip_adapter(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True)
    plain, untrained = (one.fit(given, tiny_source()) for one in (TipAdapter(), TipAdapterF(epochs=0)))
    assert (plain.alpha, plain.beta) == (untrained.alpha, untrained.beta)
    images = given.val.vectors  # type: ignore[union-attr]
    assert torch.equal(plain.term(images, torch.zeros(12, 3)), untrained.term(images, torch.zeros(12, 3)))


def test_one_step_by_hand(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(shots=2, classes=2)
    fitted = TipAdapterF(alpha=3.0, beta=2.0, epochs=1).fit(given, tiny_source())
    shots = given.few_shot
    assert shots is not None and shots.vectors.views is not None and shots.labels is not None and given.logits
    views, labels = shots.vectors.views, shots.labels.tolist()
    start = F.normalize(views.mean(1), dim=-1)
    keys = start.clone().requires_grad_()
    total = torch.zeros(())
    for i in range(4):  # the first epoch shows the first view
        logits = given.logits(shots.vectors.with_pooled(views[:, 0], unit=True))[i].unbind()
        cached = [
            sum(3.0 * 20 / 100 * torch.exp(-2.0 * (1 - views[i, 0] @ keys[j])) for j in range(4) if labels[j] == c)
            for c in range(2)
        ]
        both = [one + other for one, other in zip(logits, cached, strict=True)]
        total = total - both[labels[i]] + torch.logsumexp(torch.stack(both), 0)
    (total / 4).backward()
    assert keys.grad is not None
    # AdamW's first step: decay by 0.01, then the gradient over its own size.
    expected = start * (1 - 1e-3 * 0.01) - 1e-3 * keys.grad / (keys.grad.abs() + 1e-4)
    assert torch.allclose(fitted.keys, expected, atol=1e-6)  # type: ignore[arg-type]


def test_training_the_keys_lowers_the_loss_of_the_shots(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(noise=0.5)
    before = loss_of(TipAdapter(alpha=5.0, beta=3.0).fit(given, tiny_source()), given)
    after = loss_of(TipAdapterF(alpha=5.0, beta=3.0, lr=1e-2).fit(given, tiny_source()), given)
    assert after < before - 0.05


def test_constants_are_chosen_on_validation_images_after_training(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True, beside=0.8)
    chosen = TipAdapterF().fit(given, tiny_source())
    assert given.val is not None and given.logits is not None and given.val.labels is not None
    base = given.logits(given.val.vectors)
    reached = given.metric(base + chosen.term(given.val.vectors, base), given.val.labels)
    for alpha in (1.0, 7.0, 20.0):
        other = TipAdapterF(alpha=alpha, beta=1.0).fit(given, tiny_source())
        assert reached >= given.metric(base + other.term(given.val.vectors, base), given.val.labels) - 1e-9
    fixed = TipAdapterF().fit(blobs(), tiny_source())
    assert (fixed.alpha, fixed.beta) == (1.17, 1.0)
    assert TipAdapterF(alpha=0.0).fit(blobs(), tiny_source()).alpha == 0.0


def test_alpha_zero_adds_nothing_and_seeds_repeat(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    off = TipAdapterF(alpha=0.0, beta=1.0).fit(given, tiny_source())
    assert given.few_shot is not None
    assert not off.term(given.few_shot.vectors, torch.zeros(12, 3)).any()
    one, two = (TipAdapterF().fit(given, tiny_source()) for _ in range(2))
    assert one.key == two.key and math.isfinite(loss_of(one, given))
