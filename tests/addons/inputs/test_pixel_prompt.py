from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.confidence import fitted_scale
from vlkit.addons.inputs.pixel_prompt import PixelPrompt, direction
from vlkit.addons.labelled_pixels import LabelledPixels
from vlkit.addons.pipeline import Pipeline
from vlkit.errors import ConfigError

SHORT: Any = {"epochs": 12, "lr": 8.0, "batch_size": 6, "frame": 0.25}


def test_learns_and_leaves_the_model_as_it_was(learned_well: Any) -> None:
    fitted = learned_well(PixelPrompt(**SHORT))
    assert fitted.delta.shape == (3, 32, 32) and fitted.steps == 24
    assert (fitted.delta[:, 8:24, 8:24] == 0).all(), "nothing over the image itself"
    assert (fitted.delta[:, :8] != 0).float().mean() > 0.9
    assert fitted.trained == 3 * (32 * 32 - 16 * 16), "what is inside does not count"


def test_a_frame_of_0_is_padding(tower_case: Any) -> None:
    images = torch.rand(2, 3, 32, 32)
    found = PixelPrompt(frame=0.25, delta=torch.zeros(3, 32, 32)).edit_image(images)
    small = F.interpolate(images, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    expected = torch.zeros(2, 3, 32, 32)
    expected[:, :, 8:24, 8:24] = small
    assert torch.equal(found, expected)
    delta = torch.full((3, 32, 32), 7.0)  # not kept within [0,1]; what is inside does not count
    framed = PixelPrompt(frame=0.25, delta=delta).edit_image(images)
    assert torch.equal(framed[:, :, 8:24, 8:24], small) and (framed[:, :, :8] == 7).all()
    assert PixelPrompt().border(224) == 30


def test_a_step_has_the_length_of_the_rate_whatever_the_loss(tower_case: Any) -> None:
    gradient = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(direction(1000 * gradient, frame()), direction(gradient, frame()), atol=1e-7)
    assert direction(gradient, frame()).norm() < 1 and (direction(torch.zeros(3, 32, 32), frame()) == 0).all()
    once: Any = PixelPrompt(epochs=1, lr=5.0, frame=0.25).fit(prepared(tower_case), tower_case.source)
    once = once.delta
    # By hand: one step over all twelve images, the norm taken before the inside is left out.
    images = task_images(tower_case)
    delta = torch.zeros(3, 32, 32, requires_grad=True)
    small = F.interpolate(images, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    weights = prepared(tower_case).weights
    features = tower_case.encoder.encode_image(F.pad(small, (8,) * 4) + frame() * delta)
    logits = tower_case.source.logit_scale * weights.scores(features)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, tower_case.reference.few_shot.labels), delta)
    torch.testing.assert_close(once, -5.0 * frame() * gradient / gradient.norm(), atol=1e-4, rtol=1e-3)
    assert once.norm().item() <= 5.0


def test_the_confidence_that_fits_leads_elsewhere(tower_case: Any) -> None:
    found: Any = PixelPrompt(epochs=1, lr=5.0, frame=0.25, confidence="fitted").fit(
        prepared(tower_case), tower_case.source
    )
    delta = torch.zeros(3, 32, 32, requires_grad=True)
    small = F.interpolate(task_images(tower_case), (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    weights, shots = prepared(tower_case).weights, tower_case.reference.few_shot
    scale = fitted_scale(weights.scores(shots.vectors.pooled), shots.labels, tower_case.source.logit_scale)
    assert scale < 0.9 * tower_case.source.logit_scale
    features = tower_case.encoder.encode_image(F.pad(small, (8,) * 4) + frame() * delta)
    loss = F.cross_entropy(scale * weights.scores(features), shots.labels)
    (gradient,) = torch.autograd.grad(loss, delta)
    torch.testing.assert_close(found.delta, -5.0 * frame() * gradient / gradient.norm(), atol=1e-4, rtol=1e-3)
    plain: Any = PixelPrompt(epochs=1, lr=5.0, frame=0.25).fit(prepared(tower_case), tower_case.source)
    assert F.cosine_similarity(plain.delta.flatten(), found.delta.flatten(), dim=0) < 0.9999


def test_bad_input(tower_case: Any) -> None:
    with pytest.raises(ConfigError, match=r"frame is 0\.5"):
        PixelPrompt(frame=0.5)
    with pytest.raises(ConfigError, match="learned for images of 32 pixels; these have 40"):
        PixelPrompt(delta=torch.zeros(3, 32, 32)).edit_image(torch.zeros(1, 3, 40, 40))


def frame() -> torch.Tensor:
    mask = torch.ones(32, 32)
    mask[8:24, 8:24] = 0
    return mask


def task_images(case: Any) -> torch.Tensor:
    pixels = LabelledPixels(case.reference.few_shot.records, case.encoder.preprocess, 1.0, 0)
    return pixels.batch(torch.arange(12)).float() / 255


def prepared(case: Any) -> Any:
    return Pipeline()._seen_by(PixelPrompt(), case.reference, case.source, "photo")
