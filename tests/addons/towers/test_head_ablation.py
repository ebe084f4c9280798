"""Head ablation against the decomposition it stands for, and against one head taken out in plain loops."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.class_names import parse_class
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.saved import load_addon, save_addon
from vlkit.addons.towers.head_ablation import HeadAblation
from vlkit.errors import ConfigError, DataError
from vlkit.interpret.decomposition import decompose
from vlkit.interpret.text_span import without_heads

HEADS = [(0, 1), (2, 0), (2, 3)]


def ablation_of(slow: Any, images: Tensor, heads: Sequence[tuple[int, int]] = HEADS) -> HeadAblation:
    """With means over some images, taken by one image and one head at a time."""
    visual, rows = slow.visual, []
    for row in range(len(images)):
        last = type(slow)(slow.encoder, images).stream(row, 3)[0]
        deviation = (last.var(unbiased=False) + visual.ln_post.eps).sqrt()
        length = (visual.ln_post(last) @ visual.proj).norm()
        terms = []
        for layer, head in heads:
            block, x = slow.blocks[layer], type(slow)(slow.encoder, images).stream(row, layer)
            query, key, value = slow.heads(block, x)[head]
            weights = (key @ query[0] / 16**0.5).softmax(0)
            mixed = torch.zeros(x.shape[1], dtype=x.dtype)
            mixed[head * 16 : (head + 1) * 16] = weights @ value
            written = block.attn.out_proj.weight @ mixed
            terms.append((written - written.mean()) * visual.ln_post.weight / deviation / length)
        rows.append(torch.stack(terms))
    return HeadAblation(chosen=[list(head) for head in heads], means=torch.stack(rows).mean(0))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)).double()


def test_the_feature_is_the_mean_ablated_sum(slow: Any, others: Tensor) -> None:
    encoder, addon = slow.encoder, ablation_of(slow, others)
    expected = without_heads(decompose(encoder, slow.images), HEADS, decompose(encoder, others).heads.mean(0))
    stock = encoder.encode_image(slow.images)
    with addon.edit(encoder):
        found = encoder.encode_image(slow.images)
        through_stages = F.normalize(encoder.vision_tower.run(slow.images), dim=-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(through_stages, expected)
    assert (found - stock).abs().max() > 1e-3


def test_whatever_an_ablated_head_writes_no_longer_counts(slow: Any, others: Tensor) -> None:
    """The idea: what a head of the last layer sees moves the feature, but not when the head is ablated."""
    encoder, block = slow.encoder, slow.blocks[2]
    addon = ablation_of(slow, others, [(2, 1)])
    values = slice(2 * 64 + 16, 2 * 64 + 32)  # rows of head 1 among queries, keys and values
    kept = {name: value.clone() for name, value in block.state_dict().items()}
    try:
        for parameter in block.mlp.parameters():  # which would pass on what the head wrote
            parameter.zero_()
        stock = encoder.encode_image(slow.images)
        with addon.edit(encoder):
            before = _direction(slow, addon)
        block.attn.in_proj_weight[values] *= -3
        assert (encoder.encode_image(slow.images) - stock).abs().max() > 1e-2
        with addon.edit(encoder):
            torch.testing.assert_close(_direction(slow, addon), before)
    finally:
        block.load_state_dict(kept)


def _direction(slow: Any, addon: HeadAblation) -> Tensor:
    """The feature less the mean that was put in, up to the norm's deviation: what the other parts write."""
    tower, visual = slow.encoder.vision_tower, slow.visual
    x = tower.through_blocks(slow.images)
    out = visual.ln_post(x)[:, 0]
    handle = visual.ln_post._forward_hooks
    hooks = dict(handle)
    handle.clear()
    length = (visual.ln_post(x)[:, 0] @ visual.proj).norm(dim=-1, keepdim=True)
    deviation = (x[:, 0].var(dim=-1, unbiased=False) + visual.ln_post.eps).sqrt()[:, None]
    handle.update(hooks)
    assert addon.means is not None
    # The norm's bias is no residual term: it is not divided by the deviation.
    found: Tensor = (out - length * addon.means.sum(0) - visual.ln_post.bias) * deviation
    return found


def test_all_is_restored_to_the_bit(slow: Any, others: Tensor) -> None:
    encoder, images, addon = slow.encoder, slow.images, ablation_of(slow, others)
    pooled, patches = encoder.encode_image(images), encoder.encode_patches(images)
    with addon.edit(encoder):
        assert torch.equal(encoder.encode_patches(images), patches), "patches stay"
        alone = encoder.encode_image(images[1:])
        torch.testing.assert_close(alone, encoder.encode_image(images)[1:])  # no batch leaks into another
    with pytest.raises(RuntimeError, match="stop"), addon.edit(encoder):
        raise RuntimeError("stop")
    assert torch.equal(encoder.encode_image(images), pooled)
    assert torch.equal(encoder.encode_patches(images), patches)
    modules = list(encoder.modules())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in modules)


def test_fitted_on_unlabelled_images_and_saved(tower_case: Any, tmp_path: Path) -> None:
    case = tower_case
    reference = _unlabelled(case)
    fitted = Pipeline([HeadAblation(heads="-1.0+0.1")]).fit(reference, case.source).addons[0]
    assert isinstance(fitted, HeadAblation) and fitted.chosen == [[0, 1], [1, 0]]
    images = torch.stack([case.encoder.preprocess(_pixels(one)) for one in reference.images.records])
    means = decompose(case.encoder, images).heads.mean(0)
    expected = without_heads(decompose(case.encoder, case.images), [(0, 1), (1, 0)], means)
    loaded = load_addon(save_addon(fitted, tmp_path / "addon"))
    for addon in (fitted, loaded):
        with addon.edit(case.encoder):  # type: ignore[attr-defined]
            torch.testing.assert_close(case.encoder.encode_image(case.images), expected)


def test_heads_by_the_words_of_their_spans(tower_case: Any, tmp_path: Path) -> None:
    spans = [
        {"layer": 0, "head": 0, "explained": 0.5, "texts": ["a red wall", "snow"]},
        {"layer": 1, "head": 1, "explained": 0.5, "texts": ["deep water", "a dog"]},
        {"layer": 1, "head": 0, "explained": 0.5, "texts": ["two people", "The Sea"]},
    ]
    (tmp_path / "heads.json").write_text(json.dumps(spans))
    addon = HeadAblation(spans=str(tmp_path / "heads.json"), about="water|sea")
    fitted: Any = Pipeline([addon]).fit(_unlabelled(tower_case), tower_case.source).addons[0]
    assert fitted.chosen == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({}, ConfigError, "needs heads: head_ablation:heads=4.2"),
        ({"heads": "4"}, ConfigError, "expected layer.head"),
        ({"heads": "0.9"}, ConfigError, "No head 9 in layer 0: this tower has 2 layers of 2"),
        ({"spans": "missing.json", "about": "sea"}, DataError, "no heads.json"),
    ],
)
def test_heads_that_are_not_there(tower_case: Any, settings: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        Pipeline([HeadAblation(**settings)]).fit(_unlabelled(tower_case), tower_case.source)


def test_words_that_no_head_is_about(tower_case: Any, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text(json.dumps([{"layer": 0, "head": 0, "explained": 1, "texts": ["snow"]}]))
    addon = HeadAblation(spans=str(tmp_path / "heads.json"), about="water")
    with pytest.raises(ConfigError, match="has a text with water"):
        Pipeline([addon]).fit(_unlabelled(tower_case), tower_case.source)


def _unlabelled(case: Any) -> Any:
    from dataclasses import replace

    shots = case.reference.few_shot
    images = replace(shots, labels=None)
    return replace(case.reference, images=images, few_shot=None, class_names=(parse_class("red"),))


def _pixels(record: Any) -> Tensor:
    from vlkit.data.images import read_image

    return read_image(record)
