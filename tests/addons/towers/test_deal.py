import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.pipeline import Pipeline
from vlkit.addons.towers.deal import Deal, concept_maps, contrast, scaled_to_one, terms
from vlkit.errors import ConfigError, DataError
from vlkit.interpret.relevance import image_relevance

CONCEPTS = {"red": ["fire", "blood", "rust"], "Lime": ["grass", "leaf"], "blue": ["sky", "sea"]}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(CONCEPTS))
    return str(path)


@pytest.fixture
def short(file: str) -> Callable[..., Deal]:
    return lambda **settings: Deal(file=file, concepts=2, crop=0.5, batch_size=3, epochs=4, lr=1e-3, **settings)


def test_learns_and_leaves_the_model_as_it_was(learned_well: Any, short: Any, tower_case: Any) -> None:
    fitted = learned_well(short())
    names = [name for name, _ in tower_case.encoder.named_parameters() if "logit_scale" not in name]
    assert fitted.weights.numel() == sum(tower_case.encoder.get_parameter(name).numel() for name in names)


def test_maps_are_the_relevance_of_the_last_layer(tower_case: Any) -> None:
    encoder, images = tower_case.encoder, tower_case.images
    texts = F.normalize(torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    maps = concept_maps(encoder, images, texts[:, 0], texts[:, 1:])
    torch.testing.assert_close(maps.image, encoder.encode_image(images))
    for k, found in enumerate((maps.category, *maps.concepts.unbind(1))):
        relevance = image_relevance(encoder, images, texts[:, k]).flatten(1)
        torch.testing.assert_close(found, scaled_to_one(relevance), atol=1e-4, rtol=1e-3)


def test_maps_reach_the_weights(tower_case: Any) -> None:
    # The fault of the released code: attention and gradient detached, so that the three terms train nothing.
    texts = F.normalize(torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    maps = concept_maps(tower_case.encoder, tower_case.images, texts[:, 0], texts[:, 1:])
    blocks = tower_case.encoder.model.visual.transformer.resblocks
    for term in terms(maps.concepts, maps.category):
        gradients = torch.autograd.grad(term, [block.attn.in_proj_weight for block in blocks], retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_terms_by_hand() -> None:
    disjoint = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 1, 0]]])
    found = terms(disjoint, torch.tensor([[1.0, 1, 1, 0]]))
    assert found.separate == 0 and found.consistent == 0, "a partition of the class's map"
    assert found.sparse == pytest.approx(3 / 8)
    same = torch.tensor([0.5, 1.0, 0.0]).expand(1, 4, 3)
    assert terms(same, torch.zeros(1, 3)).separate == pytest.approx((0.25 + 1) / 3), "each of six pairs, each of 3"
    random = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    category = torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    overlap = sum(
        float(random[b, k, p] * random[b, m, p])
        for b in range(2) for k in range(5) for m in range(k + 1, 5) for p in range(7)
    )  # fmt: skip
    distance = sum(float((random[b, :, p].sum() - category[b, p]) ** 2) for b in range(2) for p in range(7))
    found = terms(random, category)
    assert found.separate.item() == pytest.approx(overlap / (2 * 10 * 7), rel=1e-5)
    assert found.consistent.item() == pytest.approx(distance / 14, rel=1e-5)


def test_a_constant_map_costs_nothing() -> None:
    maps = torch.tensor([[2.0, 2, 2], [1, 3, 2]], requires_grad=True)
    found = scaled_to_one(maps)
    assert found.tolist() == [[0, 0, 0], [0, 1, 0.5]]
    found.sum().backward()
    assert maps.grad is not None and maps.grad.isfinite().all()


def test_the_contrastive_part(tower_case: Any, short: Any, task_of: Any) -> None:
    addon = short(separate=0.0, consistent=0.0, sparse=0.0)
    rows = torch.tensor([0, 5, 9])
    with addon.training(task := task_of(addon)) as found:
        loss = addon.objective(task, found)(rows).item()
    images = tower_case.encoder.encode_image(task_of(addon).pixels.batch(rows))
    texts = tower_case.source.embed_texts([f"a photo of a {name}." for name in ("red", "green", "blue")])
    logits = tower_case.source.logit_scale * images @ texts.T
    expected = -sum((logits[i].log_softmax(0)[i] + logits[:, i].log_softmax(0)[i]).item() for i in range(3)) / 6
    assert loss == pytest.approx(expected, abs=1e-4) == contrast(logits).item()


def test_terms_keep_their_share_beside_a_smaller_multiplier(short: Any, task_of: Any) -> None:
    rows, plain = torch.tensor([0, 5, 9]), {"consistent": 0.0, "sparse": 0.0}
    shares = []
    for scale in (100.0, 2.0):
        losses = []
        for weight in (0.0, 10.0):
            addon = short(separate=weight, **plain)
            with addon.training(task := replace(task_of(addon), scale=scale)) as found:
                losses.append(addon.objective(task, found)(rows).item())
        shares.append((losses[1] - losses[0]) / scale)
    assert shares[0] > 0 and shares[0] == pytest.approx(shares[1], rel=1e-2)


def test_separated_maps_overlap_less(tower_case: Any, file: str) -> None:
    shots = tower_case.reference.few_shot
    pixels = torch.cat([chunk.images for chunk in tower_case.source.embedder.iterate_pixels(shots.records)])
    lists = [CONCEPTS["red"][:2], CONCEPTS["Lime"], CONCEPTS["blue"]]
    found = []
    plan: Any = {"crop": 1.0, "batch_size": 6, "epochs": 10, "lr": 3e-4}
    for weight in (0.0, 3000.0 / tower_case.source.logit_scale):
        addon = Deal(file=file, concepts=2, separate=weight, consistent=0.0, sparse=0.0, **plan)
        fitted: Any = Pipeline([addon]).fit(tower_case.reference, tower_case.source).addons[0]
        with fitted.edit(tower_case.encoder):
            texts = tower_case.source.embedder.embed_texts([text for texts in lists for text in texts]).clone()
            chosen = texts.view(3, 2, -1)[shots.labels]
            maps = concept_maps(tower_case.encoder, pixels, chosen[:, 0], chosen)
            found.append(terms(maps.concepts, maps.category).separate.item())
    assert found[1] < 0.5 * found[0]


def test_bad_concepts(tower_case: Any, file: str) -> None:
    with pytest.raises(ConfigError, match="maps can differ from two on"):
        Deal(concepts=1)
    with pytest.raises(ConfigError, match="deal needs a file of texts"):
        Pipeline([Deal()]).fit(tower_case.reference, tower_case.source)
    with pytest.raises(DataError, match=r"2 of 3 classes have fewer than 3 concepts \(first: 'green'\)"):
        Pipeline([Deal(file=file, concepts=3)]).fit(tower_case.reference, tower_case.source)
