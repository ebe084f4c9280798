"""ProDA: its bound in loops over contexts and channels, 0 where it must be, and what it is a bound of."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.class_weights.proda import ProDA, bounded_logits, likeness, positions
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat"]


def sample(contexts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    features = F.normalize(torch.randn(contexts, 3, 5, generator=random).double(), dim=-1)
    return features, F.normalize(torch.randn(4, 5, generator=random).double(), dim=-1), torch.tensor([0, 2, 1, 1])


def test_the_bound_in_loops() -> None:
    features, images, labels = sample(6)
    found = bounded_logits(features, images, labels, scale=7.0)
    for b in range(4):
        y = int(labels[b])
        for k in range(3):
            total = 7.0 * sum(float(images[b] @ features[s, k]) for s in range(6)) / 6
            for d in range(5):
                column = {c: [float(features[s, c, d]) for s in range(6)] for c in (y, k)}
                mean = {c: sum(values) / 6 for c, values in column.items()}

                def covariance(one: int, other: int) -> float:
                    return sum((column[one][s] - mean[one]) * (column[other][s] - mean[other]) for s in range(6)) / 6  # noqa: B023

                spread = covariance(y, y) + covariance(k, k) - 2 * covariance(y, k)
                total += 49.0 / 2 * float(images[b, d]) ** 2 * spread
            assert float(found[b, k]) == pytest.approx(total, abs=1e-9)


def test_nothing_is_added_for_the_label_nor_for_one_context_and_never_less_than_nothing() -> None:
    features, images, labels = sample(6)
    added = bounded_logits(features, images, labels, 7.0) - 7.0 * images @ features.mean(0).T
    assert torch.allclose(added.gather(1, labels[:, None]), torch.zeros(4, 1).double(), atol=1e-9)
    assert (added > -1e-9).all() and added.max() > 0.1
    assert torch.allclose(bounded_logits(features[:1], images, labels, 7.0), 7.0 * images @ features[0].T)


def test_contexts_are_kept_apart() -> None:
    assert likeness(torch.eye(3)).item() == 0
    assert likeness(F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=-1)).item() == pytest.approx(0.5**0.5)
    assert likeness(torch.ones(1, 2)).item() == 0


def test_one_context_is_coop_and_the_spread_counts(small: Any, labelled: Any, cross_entropy: Any) -> None:
    given, source = labelled(NAMES), small()
    fitted = ProDA(contexts=4, sampled=None, context=3, lr=0.0, epochs=1).fit(given, source)
    task = fitted.task(given, source, fitted.examples(given))
    vectors = parameter(torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(4)))
    loss = fitted.objective(task, {"vectors": vectors})(torch.arange(5)).item()
    features, alone = [], []
    for place, context in zip(positions(4), vectors, strict=True):
        text = CoOp(context=3, position=place).prompted(given.class_names, source)
        features.append(text.features(context).detach())
        model, ids = source.embedder.encoder.model.text, source.embedder.encoder.tokenize(["x x x"])[0]
        x = torch.cat([model.token_embedding(ids)[:1], context, model.token_embedding(ids)[4:]])
        x = (x + model.positional_embedding[: len(ids)])[None]
        for block in model.transformer.resblocks:
            x = block(x, attn_mask=torch.full((5, 5), -torch.inf).triu(1))
        alone.append(F.normalize(model.ln_final(x[0, 4]) @ model.text_projection, dim=-1).detach())
    logits = bounded_logits(torch.stack(features), task.images[:5], task.labels[:5], source.logit_scale)
    pairs = [abs(float(alone[i] @ alone[j])) for i in range(4) for j in range(4) if i != j]
    expected = cross_entropy(logits, task.labels[:5]) + 0.1 * task.scale / 100 * sum(pairs) / 12
    assert loss == pytest.approx(expected, abs=1e-4)
    one = ProDA(contexts=1, sampled=None, context=3, epochs=3, lr=0.1).fit(given, source)
    coop = CoOp(context=3, epochs=3, lr=0.1).fit(given, source)
    assert torch.allclose(one.vectors[0], coop.vectors, atol=1e-6)  # type: ignore[index, arg-type]


def test_weights_are_means_over_places(small: Any, labelled: Any) -> None:
    given = labelled(NAMES)
    assert positions(8) == ["front"] * 2 + ["middle"] * 2 + ["end"] * 4
    fitted = ProDA(contexts=4, words="a photo of a", lr=0.0, epochs=1).fit(given, small())
    texts = ["{} a photo of a.", "a photo {} of a.", "a photo of a {}.", "a photo of a {}."]
    hand = [small().embed_texts([text.replace("{}", name) for name in NAMES]) for text in texts]
    assert torch.allclose(fitted.weights(given.class_names, small()).vectors, torch.stack(hand).mean(0), atol=1e-6)
    with pytest.raises(ConfigError, match="1 to all"):
        ProDA(contexts=4, sampled=5).fit(given, small())
