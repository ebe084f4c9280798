"""The multiplier of training: the one that fits zero-shot answers, and what it keeps shared words from forgetting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.bayesian_prompt import BayesianPrompt
from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.class_weights.pouf import Pouf
from vlkit.addons.class_weights.tpt import Tpt
from vlkit.addons.class_weights.upl import Upl
from vlkit.addons.confidence import LEAST, Confidence, fitted_scale
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.reference import Part, Reference
from vlkit.addons.towers.visual_prompt import VisualPrompt
from vlkit.errors import ConfigError
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder

NAMES = ("dog", "black cat", "boat", "tree")
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def small() -> CachedEmbedder:
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    encoder: Any = build_encoder(ARCHITECTURE).eval()
    with torch.no_grad():  # features of fresh towers are nearly alike
        encoder.model.text.token_embedding.weight.mul_(20)
    embedder = Embedder(encoder, "small")
    return CachedEmbedder(lambda: embedder, None, card_of(embedder))


def reference(source: CachedEmbedder, right: bool = True) -> Reference:
    """Images near the texts of their class, or of any class."""
    random = torch.Generator().manual_seed(1)
    texts = source.embed_texts([f"a photo of a {name}." for name in NAMES])
    labels = torch.arange(4).repeat_interleave(8)
    shown = labels if right else labels[torch.randperm(32, generator=random)]
    pooled = F.normalize(texts[shown] + 0.1 * torch.randn(32, 16, generator=random), dim=-1)
    part = Part("train", Vectors("image", pooled), labels)
    classes = tuple(parse_class(name) for name in NAMES)
    return Reference(class_names=classes, few_shot=part, images=part, weights=ClassWeights(texts, torch.arange(4)))


def test_the_fitted_multiplier_is_the_best_of_a_fine_grid() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (60,), generator=random)
    scores = 0.1 * F.one_hot(labels, 5) + 0.2 * torch.randn(60, 5, generator=random)
    grid = torch.logspace(-1, 2, 2000).double()
    losses = torch.stack([F.cross_entropy(one * scores.double(), labels) for one in grid])
    best = grid[losses.argmin()].item()
    assert 1 < best < 50
    assert fitted_scale(scores, labels, 100.0) == pytest.approx(best, rel=0.01)
    assert fitted_scale(scores, labels, 1.0) == pytest.approx(1.0, rel=1e-3)  # never surer than the model
    assert fitted_scale(-scores, labels, 100.0) == pytest.approx(100.0 * LEAST, rel=1e-3)


def test_words_of_a_model_too_sure_of_itself_make_all_classes_alike_unless_it_fits(small: CachedEmbedder) -> None:
    given, alike, scales = reference(small, right=False), [], []
    which: tuple[Confidence, ...] = ("model", "fitted")
    for confidence in which:
        addon = CoOp(words="a photo of a", epochs=40, lr=0.05, confidence=confidence)
        fitted = addon.fit(given, small)
        made = fitted.weights(given.class_names, small).vectors
        alike.append(((made @ made.T).sum() - 4).item() / 12)
        scales.append(fitted.scale or 0.0)
    texts = small.embed_texts([f"a photo of a {name}." for name in NAMES])
    before = ((texts @ texts.T).sum() - 4).item() / 12
    assert scales[0] == pytest.approx(small.logit_scale) and scales[1] < 0.2 * small.logit_scale
    assert alike[0] - before > 0.02 and abs(alike[1] - before) < 0.002


def test_a_model_that_is_right_is_trained_as_it_is(small: CachedEmbedder) -> None:
    addon = CoOp(words="a photo of a", epochs=2, lr=0.05)
    given = reference(small)
    one, other = addon.fit(given, small), replace(addon, confidence="fitted").fit(given, small)
    assert other.scale == pytest.approx(one.scale, rel=1e-3)
    assert torch.allclose(one.vectors, other.vectors, atol=1e-4)  # type: ignore[arg-type]


def test_probabilities_are_mixed_as_sure_as_they_were_trained(small: CachedEmbedder) -> None:
    given = reference(small, right=False)
    assert given.few_shot is not None
    made = BayesianPrompt(epochs=1, lr=0.0, draws=3, confidence="fitted").fit(given, small)
    assert made.scale is not None and made.scale < 0.2 * small.logit_scale
    found = made.weights(given.class_names, small).scores(given.few_shot.vectors)
    again = replace(made, scale=None).weights(given.class_names, small).scores(given.few_shot.vectors)
    assert not torch.allclose(found, again, atol=1e-5)


def test_without_labels_there_is_nothing_to_fit_it_to(small: CachedEmbedder, tmp_path: Path) -> None:
    for method in (
        Upl(context=2, confidence="fitted", missing="accept"),
        Pouf(confidence="fitted"),
        Tpt(confidence="fitted"),
    ):
        with pytest.raises(ConfigError, match=f"{method.name}: confidence=fitted asks labelled images"):
            given = replace(reference(small), logits=lambda images: images.pooled[:, :4])
            replace(method, fitted=None).learn(given, small)


def test_methods_inside_the_towers_train_with_it_too(task_of: Any, tower_case: Any) -> None:
    own, fitted = (task_of(VisualPrompt(confidence=which)) for which in ("model", "fitted"))
    weights, shots = fitted.reference.weights, tower_case.reference.few_shot
    expected = fitted_scale(weights.scores(shots.vectors.pooled), shots.labels, own.scale)
    assert own.scale == pytest.approx(tower_case.source.logit_scale)
    assert fitted.scale == pytest.approx(expected) and fitted.scale < own.scale
    assert fitted.from_paper(25.0) == pytest.approx(0.25 * fitted.scale)
