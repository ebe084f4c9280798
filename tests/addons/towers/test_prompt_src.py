import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.pipeline import Pipeline
from vlkit.addons.tower_learning import EpochMean
from vlkit.addons.towers.prompt_src import PromptSrc, Sides, gaussian, regularisers
from vlkit.errors import ConfigError
from vlkit.models.prompt_templates import load_templates

SHORT = {"epochs": 6, "lr": 0.05, "batch_size": 6, "crop": 0.5, "templates": "simple", "text_tokens": 2}

LONGER = {**SHORT, "epochs": 20, "lr": 0.01, "crop": 1.0}


def test_learns_and_leaves_the_model_as_it_was(learned_well: Any) -> None:
    weak = {"keep_text": 1.0, "keep_image": 1.0, "centre": 20.0}
    fitted = learned_well(PromptSrc(**LONGER, **weak))
    assert fitted.text.shape == (2, 2, 24) and fitted.image.shape == (2, 4, 32)


def test_gaussian_over_epochs() -> None:
    weights = gaussian(20, None, 1.0)
    assert weights.sum().item() == pytest.approx(1) and weights.argmax().item() == 14, "epoch 15 of 20"
    raw = [math.exp(-((epoch - 15) ** 2) / 2) for epoch in range(1, 21)]
    assert weights.tolist() == pytest.approx([one / sum(raw) for one in raw])
    assert gaussian(50, 45, 5.0).argmax().item() == 44
    with pytest.raises(ConfigError, match="spread is 0"):
        gaussian(5, None, 0.0)


def test_what_is_kept_is_the_mean_over_epochs(tower_case: Any) -> None:
    value = torch.tensor([0.0])
    mean = EpochMean({"a": value}, gaussian(4, 2.0, 1.0))
    assert mean.values()["a"] is value, "no epoch done"
    seen = []
    for epoch in range(3):  # the fourth is cut off
        value += epoch + 1
        seen.append(value.item())
        mean.add(epoch)
    weights = gaussian(4, 2.0, 1.0)[:3]
    expected = sum(w * v for w, v in zip(weights.tolist(), seen, strict=True)) / weights.sum().item()
    assert mean.values()["a"].item() == pytest.approx(expected) and value.item() == 6
    # Through `fit`: all weight on the first epoch keeps less than all on the last.
    early, late = (
        PromptSrc(**SHORT, centre=centre, spread=0.1).fit(prepared(tower_case), tower_case.source)
        for centre in (1.0, 6.0)
    )
    start = tower_case.encoder.text_tower.embed(tower_case.tokens)[0, 1:3]
    moved = [(one.text[0] - start).norm().item() for one in (early, late)]
    assert moved[0] < 0.01 * moved[1], "one epoch, at the warm-up's learning rate"


def test_regularisers_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = (
        Sides(*(torch.randn(shape, generator=random) for shape in ((2, 4), (3, 4), (2, 3)))) for _ in range(2)
    )
    found = regularisers(one, other)
    image = sum(abs(a - b) for a, b in zip(one.image.flatten().tolist(), other.image.flatten().tolist(), strict=True))
    text = sum(abs(a - b) for a, b in zip(one.text.flatten().tolist(), other.text.flatten().tolist(), strict=True))
    assert found.image.item() == pytest.approx(image / 8) and found.text.item() == pytest.approx(text / 12)
    p, p0 = one.logits.softmax(1), other.logits.softmax(1)
    divergence = sum(float(p0[b, c] * (p0[b, c] / p[b, c]).log()) for b in range(2) for c in range(3))
    assert found.logits.item() == pytest.approx(divergence / 6, abs=1e-6)
    assert all(value.item() == 0 for value in regularisers(one, one))


def test_all_three_are_0_without_prompts(tower_case: Any, task_of: Any) -> None:
    rows = torch.tensor([1, 7])
    losses = []
    for weight in (0.0, 1e4):
        held = PromptSrc(
            depth=1,
            image_tokens=0,
            templates="photo",
            crop=1.0,
            keep_text=weight,
            keep_image=weight,
            keep_logits=weight,
        )
        task = task_of(held)
        with held.training(task) as found:
            losses.append(held.objective(task, found)(rows).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-2), "1e4 times rounding"


def test_the_whole_loss(tower_case: Any, task_of: Any) -> None:
    addon = PromptSrc(**{**SHORT, "crop": 1.0})
    encoder, rows = tower_case.encoder, torch.tensor([0, 6, 9])
    images = task_of(addon).pixels.batch(rows)
    with addon.training(task := task_of(addon)) as found, torch.no_grad():
        loss = addon.objective(task, found)(rows).item()
        x, t = encoder.encode_image(images), task.texts().vectors
    with torch.no_grad():
        x0 = encoder.encode_image(images)
    scale = tower_case.source.logit_scale

    def logits(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        cosines = image @ text.T
        return scale * torch.stack([cosines[:, 0], cosines[:, 1:3].amax(1), cosines[:, 3]], dim=1)

    t0 = known(tower_case)
    p, p0 = logits(x, t).log_softmax(1), logits(x0, t0).log_softmax(1)
    held = 25 * (t - t0).abs().mean() + 10 * (x - x0).abs().mean()
    expected = -p[torch.arange(3), rows // 4].mean() + scale / 100 * held
    expected += (p0.exp() * (p0 - p)).sum() / 9
    assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_held_prompts_stay_nearer(tower_case: Any) -> None:
    texts = [f"a photo of a {name}." for name in ("red", "green", "lime", "blue")]
    before, far = known(tower_case), []
    for weight in (0.0, 700.0):
        addon = PromptSrc(**LONGER, keep_text=weight, keep_image=0.0, centre=20.0)
        fitted = addon.fit(prepared(tower_case), tower_case.source)
        with fitted.edit(tower_case.encoder):
            far.append((tower_case.source.embedder.embed_texts(texts) - before).abs().mean().item())
    assert far[1] < 0.9 * far[0]


def known(case: Any) -> torch.Tensor:
    """(R,D) names in many templates, by the plain tower."""
    found = []
    for name in ("red", "green", "lime", "blue"):
        texts = [template.replace("{}", name) for template in load_templates("simple")]
        found.append(F.normalize(case.source.embed_texts(texts).mean(0), dim=0))
    return torch.stack(found)


def prepared(case: Any) -> Any:
    return Pipeline()._seen_by(PromptSrc(), case.reference, case.source, "photo")
