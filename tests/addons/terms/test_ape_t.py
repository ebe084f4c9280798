from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vlkit.addons.reference import Reference
from vlkit.addons.terms.ape_t import ApeT
from vlkit.addons.terms.tip_adapter import TipAdapter

Blobs = Callable[..., Reference]


def test_without_training_it_is_tip_adapter(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    assert given.few_shot is not None
    images, logits = given.few_shot.vectors, torch.zeros(12, 3)
    plain = TipAdapter(alpha=2.0, beta=3.0).fit(given, tiny_source())
    untrained = ApeT(alpha=2.0, beta=3.0, epochs=0).fit(given, tiny_source())
    assert torch.equal(plain.term(images, logits), untrained.term(images, logits))


def test_one_step_by_hand(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(shots=2, classes=2)
    fitted = ApeT(alpha=2.0, beta=3.0, epochs=1, share=0.5).fit(given, tiny_source())
    shots, weights = given.few_shot, given.weights
    assert shots is not None and shots.vectors.views is not None and shots.labels is not None and weights is not None
    labels, views = shots.labels.tolist(), shots.vectors.views
    keys = F.normalize(views.mean(1), dim=-1)
    residual, value = torch.zeros(2, 16, requires_grad=True), torch.ones(4, requires_grad=True)
    assert fitted.residual is not None and fitted.keys is not None and fitted.values is not None
    changed = fitted.residual.abs().sum(0) > 0
    assert int(changed.sum()) == 8
    total = torch.zeros(())
    for i in range(4):
        logits = []
        for c in range(2):
            one = 20 * views[i, 0] @ (weights.vectors[c] + residual[c] * changed)
            for j in range(4):
                if labels[j] == c:
                    near = views[i, 0] @ (keys[j] + residual[c] * changed)
                    one = one + 0.2 * 2.0 * torch.exp(-3.0 * (1 - near)) * value[j]
            logits.append(one)
        total = total - logits[labels[i]] + torch.logsumexp(torch.stack(logits), 0)
    (total / 4).backward()
    assert residual.grad is not None and value.grad is not None
    # AdamW's first step; what starts at zero does not decay.
    step = -1e-3 * residual.grad / (residual.grad.abs() + 1e-3)
    assert torch.allclose(fitted.residual, step, atol=1e-6)
    assert torch.allclose(fitted.keys, keys + step[labels], atol=1e-6)
    weighed = 1 - 1e-3 * 0.1 - 1e-3 * value.grad / (value.grad.abs() + 1e-3)
    assert torch.allclose(fitted.values, F.one_hot(shots.labels, 2) * weighed[:, None], atol=1e-6)


def test_the_residual_moves_logits_and_lowers_the_loss(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(noise=0.5, beside=0.8)
    assert given.few_shot is not None and given.few_shot.labels is not None and given.logits is not None
    images, labels = given.few_shot.vectors, given.few_shot.labels
    base = given.logits(images)

    def loss(epochs: int) -> float:
        fitted = ApeT(alpha=1.0, beta=1.0, epochs=epochs, lr=1e-2).fit(given, tiny_source())
        return float(F.cross_entropy(base + fitted.term(images, base), labels))

    assert loss(30) < loss(0) - 0.1


def test_the_epoch_that_does_best_on_validation_images_counts(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True, noise=0.6, beside=0.6, seed=3)
    assert given.val is not None and given.val.labels is not None and given.logits is not None
    base, labels = given.logits(given.val.vectors), given.val.labels

    def right(addon: ApeT, reference: Reference) -> float:
        fitted = addon.fit(reference, tiny_source())
        return given.metric(base + fitted.term(given.val.vectors, base), labels)  # type: ignore[union-attr]

    addon = ApeT(alpha=1.0, beta=1.0, lr=0.03, epochs=10)
    # Without validation images a run ends with its last epoch; one of them is what a run with them keeps.
    without = blobs(noise=0.6, beside=0.6, seed=3)
    assert right(addon, given) >= right(addon, without)
    chosen = ApeT(epochs=3).fit(given, tiny_source())
    assert chosen.alpha is not None and chosen.beta is not None
    fixed = ApeT(epochs=1).fit(without, tiny_source())
    assert (fixed.alpha, fixed.beta) == (1.0, 1.0)
