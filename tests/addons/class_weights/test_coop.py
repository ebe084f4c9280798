"""CoOp: the hand template at step 0, its loss in a loop, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.prompt_fit import parameter
from vlkit.addons.saved import load_addon, save_addon
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "sailing boat", "st."]
AT_START = {"words": "a photo of a", "lr": 0.0, "epochs": 1}


def vectors_of(addon: Any, names: list[str], source: Any) -> torch.Tensor:
    made = addon.weights([parse_class(name) for name in names], source)
    assert isinstance(made, ClassWeights)
    return made.vectors


@pytest.mark.parametrize("per_class", [False, True])
def test_at_step_0_it_is_the_hand_template(small: Any, labelled: Any, per_class: bool) -> None:
    fitted = CoOp(**AT_START, per_class=per_class).fit(labelled(NAMES), small())
    expected = small().embed_texts([f"a photo of a {name}." for name in NAMES])
    assert torch.allclose(vectors_of(fitted, NAMES, small()), expected, atol=1e-6)


@pytest.mark.parametrize(("position", "text"), [("front", "{} a photo of a."), ("middle", "a photo {} of a.")])
def test_the_name_stands_where_it_is_asked_for(small: Any, labelled: Any, position: Any, text: str) -> None:
    names = ["dog", "black cat"]
    fitted = CoOp(**AT_START, position=position).fit(labelled(names), small())
    expected = small().embed_texts([text.replace("{}", name) for name in names])
    assert torch.allclose(vectors_of(fitted, names, small()), expected, atol=1e-6)


def test_loss_and_gradient_equal_the_tower_run_by_hand(small: Any, labelled: Any, cross_entropy: Any) -> None:
    given, source = labelled(NAMES[:3]), small()
    addon = CoOp(context=3, epochs=1).fit(given, source)
    examples = addon.examples(given)
    task = addon.task(given, source, examples)
    context = parameter(torch.randn(3, 32, generator=torch.Generator().manual_seed(5)))
    rows = torch.tensor([0, 5, 9])
    loss = addon.objective(task, {"vectors": context})(rows)
    model = source.embedder.encoder.model.text  # open_clip's own modules, one prompt at a time
    logits = []
    for name in NAMES[:3]:
        ids = source.embedder.encoder.tokenize([f"x x x {name}."])[0]
        x = model.token_embedding(ids)
        x = torch.cat([x[:1], context, x[4:]]) + model.positional_embedding[: len(ids)]
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        for block in model.transformer.resblocks:
            x = block(x[None], attn_mask=mask)[0]
        feature = model.ln_final(x[ids.argmax()]) @ model.text_projection
        logits.append(source.logit_scale * task.images[rows] @ (feature / feature.norm()))
    slow = torch.stack(logits, 1)
    assert loss.item() == pytest.approx(cross_entropy(slow, examples.labels[rows]), abs=1e-5)
    by_hand = torch.autograd.grad(torch.nn.functional.cross_entropy(slow, examples.labels[rows]), context)[0]
    assert torch.allclose(torch.autograd.grad(loss, context)[0], by_hand, atol=1e-5)


def test_training_the_words_helps_the_classes_learned(small: Any, labelled: Any, cross_entropy: Any) -> None:
    given, source = labelled(NAMES, noise=0.3), small()
    assert given.few_shot is not None
    images, labels = given.few_shot.vectors, given.few_shot.labels
    losses = []
    for lr in (0.0, 0.2):
        fitted = Pipeline([CoOp(words="a photo of a", lr=lr, epochs=12)]).fit(given, source)
        losses.append(cross_entropy(fitted.classifier(given.class_names, source).logits(images), labels))
    assert losses[1] < losses[0] - 0.02


def test_repeats_saves_and_names_other_classes(small: Any, labelled: Any, tmp_path: Any) -> None:
    given = labelled(NAMES)
    one, two = (CoOp(context=2, epochs=2, lr=0.1).fit(given, small()) for _ in range(2))
    assert one.key == two.key and one.steps == 2
    back = load_addon(save_addon(one, tmp_path / "coop"))
    assert torch.equal(vectors_of(back, ["zebra", "dog"], small()), vectors_of(one, ["zebra", "dog"], small()))
    alone = CoOp(context=2, epochs=1, per_class=True).fit(given, small())
    with pytest.raises(ConfigError, match="'zebra' is new"):
        vectors_of(alone, ["zebra", "dog"], small())


def test_synonyms_score_the_best(small: Any, labelled: Any) -> None:
    given = labelled(["dog | hound", "cat"])
    made = CoOp(**AT_START).fit(given, small()).weights(given.class_names, small())
    assert isinstance(made, ClassWeights) and made.class_of.tolist() == [0, 0, 1]


def test_options_of_training(small: Any, labelled: Any) -> None:
    given = labelled(NAMES[:2], noise=0.3)
    plain, again = (CoOp(context=2, epochs=2, lr=0.1, checkpointing=on).fit(given, small()) for on in (False, True))
    assert torch.allclose(plain.vectors, again.vectors, atol=1e-6)  # type: ignore[arg-type]
    half = CoOp(context=2, epochs=2, lr=0.1, precision="bf16").fit(given, small())
    assert not torch.equal(half.vectors, plain.vectors)  # type: ignore[arg-type]
    assert torch.allclose(half.vectors, plain.vectors, atol=0.02)  # type: ignore[arg-type]
    short = CoOp(context=2, epochs=1000, max_seconds=1e-9).fit(given, small())
    assert short.steps == 1
    encoder = small().embedder.encoder
    assert all(one.requires_grad and one.grad is None for one in encoder.parameters() if one.is_leaf)


def test_bad_input(small: Any, labelled: Any) -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 class names are too long: 'a b c d e f g h'"):
        CoOp(context=16).fit(labelled(["dog", "a b c d e f g h"]), small())
    with pytest.raises(ConfigError, match="at least one"):
        CoOp(context=0).fit(labelled(["dog", "cat"]), small())
    with pytest.raises(ConfigError, match="diverged in step"):
        CoOp(context=2, lr=1e38, epochs=4).fit(labelled(["dog", "cat"], noise=0.3), small())


def test_another_tokenizer_is_refused(small: Any, labelled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = labelled(["dog", "cat"])
    monkeypatch.setattr(small().embedder.encoder.tokenize, "tokenizer_id", "hf:bert")
    with pytest.raises(ConfigError, match="end-of-text"):
        CoOp().learn(replace(given, weights=None), small())
