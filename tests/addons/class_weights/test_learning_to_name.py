"""Learned names: the hand template at step 0, untouched classes stay to the bit, the loss in a loop."""

from typing import Any

import pytest
import torch

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.learning_to_name import LearningToName
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "sailing boat", "st."]


def vectors_of(addon: Any, names: list[str], source: Any) -> torch.Tensor:
    vectors: torch.Tensor = addon.weights([parse_class(name) for name in names], source).vectors
    return vectors


@pytest.mark.parametrize("template", ["a photo of a {}.", "{}", "the {} in a picture"])
def test_at_step_0_it_is_the_hand_template(small: Any, labelled: Any, template: str) -> None:
    fitted = LearningToName(template=template, lr=0.0, epochs=1).fit(labelled(NAMES), small())
    hand = small().embed_texts([template.replace("{}", name) for name in NAMES])
    assert torch.allclose(vectors_of(fitted, NAMES, small()), hand, atol=1e-6)
    table = small().embedder.encoder.model.text.token_embedding.weight
    first = fitted.vectors[0, 0]  # type: ignore[index]
    assert ((table - first) ** 2).sum(1).argmin() == small().embedder.encoder.tokenize(["dog"])[0, 1]


def test_other_classes_keep_their_weights_to_the_bit(small: Any, labelled: Any) -> None:
    given = labelled(NAMES[:3], noise=0.3)
    still, moved = (LearningToName(lr=lr, epochs=3).fit(given, small()) for lr in (0.0, 0.5))
    mixed = ["zebra", "dog", "black cat", "sailing boat", "red bus"]
    before, after = (vectors_of(one, mixed, small()) for one in (still, moved))
    assert torch.equal(before[[0, 4]], after[[0, 4]])
    assert all(not torch.allclose(before[row], after[row], atol=1e-4) for row in (1, 2, 3))


def test_loss_and_pull_in_a_loop(small: Any, labelled: Any, cross_entropy: Any) -> None:
    given, source = labelled(NAMES[:2]), small()
    fitted = LearningToName(lr=0.0, epochs=1, pull=0.5).fit(given, source)
    task = fitted.task(given, source, fitted.examples(given))
    start = fitted.start(task)["vectors"]
    found = {"vectors": parameter(start)}
    loss = fitted.objective(task, found)  # the start is remembered here
    with torch.no_grad():
        found["vectors"] += 0.3
    value = loss(torch.arange(6))
    model, features = source.embedder.encoder.model.text, []
    for row, name in enumerate(NAMES[:2]):
        ids = source.embedder.encoder.tokenize([f"a photo of a {name}."])[0]
        x, count = model.token_embedding(ids).clone(), len(name.split())
        x[5 : 5 + count] = found["vectors"][row, :count]
        x = (x + model.positional_embedding[: len(ids)])[None]
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        for block in model.transformer.resblocks:
            x = block(x, attn_mask=mask)
        feature = model.ln_final(x[0, ids.argmax()]) @ model.text_projection
        features.append(feature / feature.norm())
    logits = source.logit_scale * task.images[:6] @ torch.stack(features).T
    pulled = 0.5 * 0.3**2 * 32 * 3  # three tokens of two names
    assert value.item() == pytest.approx(cross_entropy(logits, task.labels[:6]) + pulled, abs=1e-3)
    value.backward()
    assert not found["vectors"].grad[0, 1].any(), "a place that is no part of the name"  # type: ignore[index]


def test_one_vector_a_name_starts_from_the_mean(small: Any, labelled: Any) -> None:
    given = labelled(NAMES[:3])
    fitted = LearningToName(single=True, lr=0.0, epochs=1).fit(given, small())
    table = small().embedder.encoder.model.text.token_embedding.weight
    ids = small().embedder.encoder.tokenize(["black cat"])[0, 1:3]
    assert torch.allclose(fitted.vectors[1, 0], table[ids].mean(0), atol=1e-6)  # type: ignore[index]
    hand = small().embed_texts(["a photo of a dog.", "a photo of a black cat.", "a photo of a red bus."])
    found = vectors_of(fitted, ["dog", "black cat", "red bus"], small())
    assert torch.allclose(found[[0, 2]], hand[[0, 2]], atol=1e-6)
    assert not torch.allclose(found[1], hand[1], atol=1e-3)


def test_bad_settings(small: Any, labelled: Any) -> None:
    with pytest.raises(ConfigError, match="template"):
        LearningToName(template="a photo").fit(labelled(NAMES), small())
