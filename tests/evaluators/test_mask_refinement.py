"""PAMR against a loop over pixels, and what it is for: masks that follow the edges of the photograph."""

import math
import statistics

import pytest
import torch

from eval.mask_refinement import refine_masks
from vlkit.errors import ConfigError


def by_hand(pixels: torch.Tensor, masks: torch.Tensor, steps: int, dilations: tuple[int, ...]) -> torch.Tensor:
    """Equations of the docstring, pixel by pixel."""
    channels, height, width = pixels.shape
    around = [(d * r, d * c) for d in dilations for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]

    def at(maps: torch.Tensor, channel: int, row: int, column: int) -> float:
        return float(maps[channel, min(max(row, 0), height - 1), min(max(column, 0), width - 1)])

    for _ in range(steps):
        found = torch.zeros_like(masks)
        for row in range(height):
            for column in range(width):
                closeness = [0.0] * len(around)
                for channel in range(channels):
                    own = at(pixels, channel, row, column)
                    others = [at(pixels, channel, row + r, column + c) for r, c in around]
                    spread = statistics.stdev([*others, *[own] * len(dilations)])
                    for place, other in enumerate(others):
                        closeness[place] -= abs(own - other) / (1e-8 + 0.1 * spread) / channels
                weights = [math.exp(value - max(closeness)) for value in closeness]
                for one in range(len(masks)):
                    values = [at(masks, one, row + r, column + c) for r, c in around]
                    total = sum(w * v for w, v in zip(weights, values, strict=True))
                    found[one, row, column] = total / sum(weights)
        masks = found
    return masks


@pytest.mark.parametrize("dilations", [(1,), (1, 3)])
def test_against_a_loop_over_pixels(dilations: tuple[int, ...]) -> None:
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 5, 6), generator=drawn, dtype=torch.uint8)
    masks = torch.randn(2, 5, 6, generator=drawn)
    expected = by_hand(pixels.double(), masks.double(), 2, dilations)
    assert torch.allclose(refine_masks(pixels, masks, 2, dilations).double(), expected, atol=1e-5)
    # The weights do not depend on the range of the pixels: a model's own normalisation changes nothing.
    assert torch.allclose(refine_masks(pixels.float() / 255, masks, 2, dilations), expected.float(), atol=1e-4)


def test_scores_flow_within_a_thing_and_not_over_its_edge() -> None:
    """A coarse mask, shifted by two pixels against the thing, comes to lie on it; in a plain photograph it only blurs.

    Every part of the method is needed: with equal weights, the edge is lost as in the plain photograph.
    """
    pixels = torch.full((3, 16, 16), 30, dtype=torch.uint8)
    pixels[:, :, 8:] = 220
    coarse = torch.zeros(2, 16, 16)
    coarse[0, :, :10], coarse[1, :, 10:] = 1.0, 1.0
    truth = (torch.arange(16) >= 8).long().expand(16, 16)
    before = (coarse.argmax(0) == truth).double().mean()
    refined = refine_masks(pixels, coarse, 20, (1, 2))
    assert before == 14 / 16 and (refined.argmax(0) == truth).double().mean() == 1.0
    assert torch.allclose(refined.sum(0), torch.ones(16, 16), atol=1e-5)  # the weights sum to 1
    plain = refine_masks(torch.full_like(pixels, 30), coarse, 20, (1, 2))
    assert (plain.argmax(0) == truth).double().mean() == before


def test_no_step_changes_nothing_and_nonsense_is_refused() -> None:
    pixels, masks = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.randn(2, 4, 4)
    assert torch.equal(refine_masks(pixels, masks, 0), masks)
    for steps, dilations in ((-1, (1,)), (1, ()), (1, (0,))):
        with pytest.raises(ConfigError, match="expected steps >= 0 and pixels"):
            refine_masks(pixels, masks, steps, dilations)
