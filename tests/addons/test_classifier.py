"""The zero-shot classifier against cases worked by hand."""

import math
from typing import ClassVar

import pytest
import torch

from vlkit.addons.base import ClassWeights
from vlkit.addons.class_weights.templates import load_templates
from vlkit.addons.classifier import ZeroShotClassifier, parse_class_list
from vlkit.errors import ConfigError

SQRT_HALF = math.sqrt(0.5)


class HandEmbedder:
    """Texts that end in a known word get that word's vector; nothing else is known."""

    logit_scale = 2.0
    logit_bias = None
    family = "softmax"
    vectors: ClassVar = {"dog": (1.0, 0.0), "cat": (0.0, 1.0), "hound": (SQRT_HALF, SQRT_HALF)}

    def __init__(self):
        self.seen = []

    def embed_texts(self, texts, batch_size=256, progress=None):
        self.seen += texts
        return torch.tensor([self.vectors[text.split()[-1].rstrip(".")] for text in texts])


def test_probabilities_by_hand():
    """Image (1, 0): similarities dog 1, cat 0, scale 2 -> softmax(2, 0) = e^2 / (e^2 + 1)."""
    classifier = ZeroShotClassifier.build(HandEmbedder(), ["dog", "cat"], "none")
    predictions = classifier.predict(torch.tensor([[1.0, 0.0]]), k=5)
    assert predictions.indices.tolist() == [[0, 1]]
    assert predictions.probabilities[0, 0].item() == pytest.approx(math.exp(2) / (math.exp(2) + 1), abs=1e-6)
    assert predictions.rule == "softmax(2 x similarity) over 2 classes"


def test_sigmoid_family_judges_each_class_alone():
    embedder = HandEmbedder()
    embedder.family, embedder.logit_bias = "sigmoid", -1.0
    classifier = ZeroShotClassifier.build(embedder, ["dog", "cat"], "none")
    probabilities = classifier.probabilities(torch.tensor([[1.0, 0.0]]))[0].tolist()
    assert probabilities == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))], abs=1e-6)


def test_synonyms_score_the_maximum():
    """Image (s, s): cat alone is 0.707, `cat | hound` is 1."""
    classifier = ZeroShotClassifier.build(HandEmbedder(), ["dog", "cat | hound"], "none")
    scores = classifier.weights.scores(torch.tensor([[SQRT_HALF, SQRT_HALF]]))
    assert scores[0].tolist() == pytest.approx([SQRT_HALF, 1.0], abs=1e-6)
    assert classifier.class_names == ("dog", "cat")


def test_mean_reduce_is_the_mean_over_the_class():
    weights = ClassWeights(torch.eye(3), torch.tensor([0, 1, 1]), reduce="mean")
    scores = weights.scores(torch.tensor([[0.2, 0.4, 0.8]]))
    assert scores[0].tolist() == pytest.approx([0.2, 0.6])


def test_templates_are_averaged_and_brought_to_unit_norm():
    """Templates give (1, 0) and (s, s); their normalised mean is at 22.5 degrees."""

    class TwoTemplates(HandEmbedder):
        def embed_texts(self, texts, batch_size=256, progress=None):
            return torch.tensor([(1.0, 0.0) if text.startswith("a") else (SQRT_HALF, SQRT_HALF) for text in texts])

    classifier = ZeroShotClassifier.build(TwoTemplates(), ["dog"], ["a {}", "the {}"])
    angle = math.radians(22.5)
    assert classifier.weights.vectors[0].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_class_names_with_braces_are_plain_text():
    embedder = HandEmbedder()
    embedder.embed_texts = lambda texts, **options: embedder.seen.extend(texts) or torch.ones(len(texts), 2) * SQRT_HALF
    ZeroShotClassifier.build(embedder, ["{0} dog {x}"], "photo")
    assert embedder.seen == ["a photo of a {0} dog {x}."]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "There is no class"),
        (["dog", "", "cat"], "Entry 2 of the class list is blank"),
        (["dog", "Dog"], "'Dog' stands twice"),
        (["dog | hound", "hound"], "'hound' stands twice"),
        (["dog |"], "has an empty name"),
    ],
)
def test_bad_class_lists(lines, message):
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        parse_class_list(lines)


def test_template_choices(tmp_path):
    assert len(load_templates("imagenet80")) == 80 and len(load_templates("simple")) == 7
    assert load_templates("a drawing of {}") == ("a drawing of {}",)
    file = tmp_path / "mine.txt"
    file.write_text("one {}\n\ntwo {}\n")
    assert load_templates(str(file)) == ("one {}", "two {}")
    with pytest.raises(ConfigError, match="Did you mean simple"):
        load_templates("simpel")
    with pytest.raises(ConfigError, match="2 placeholders"):
        load_templates("{} and {}")
