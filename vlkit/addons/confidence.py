"""How sure the logits are while something is learned from labels: as the model is, or as the labels say it may be.

A model that meets images unlike those it was trained on is surer than it is right. Words that all classes share then
lower the loss fastest by making all classes alike, and forget how classes differ. With the multiplier that fits, there
is nothing to be gained from that.

    scale = training_scale(addon, "fitted", reference.weights, images, labels)
"""

import math
from typing import Literal

from torch import Tensor

from vlkit.addons.base import PAPER_LOGIT_SCALE, AddOn
from vlkit.addons.exchange import ClassWeights
from vlkit.errors import ConfigError

Confidence = Literal["model", "fitted"]
# The fitted multiplier is not below this share of the model's own, and never above it.
LEAST = 1e-3
HALVINGS = 30


def fitted_scale(scores: Tensor, labels: Tensor, most: float) -> float:
    """The multiplier of least cross-entropy, up to `most`: at it a model without training is as sure as it is right.

    Args:
        scores: (n,C) cosine.
        labels: (n,).
        most: the model's own.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599 (temperature scaling).
    """
    cosine = scores.double()
    own = cosine.gather(1, labels[:, None])[:, 0]
    low, high = LEAST * most, most
    for _ in range(HALVINGS):  # the loss is convex in the multiplier: halve the span by the sign of its slope
        middle = math.sqrt(low * high)
        slope = ((middle * cosine).softmax(1) * cosine).sum(1).mean() - own.mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.sqrt(low * high)


def training_scale(
    addon: AddOn, confidence: Confidence, weights: ClassWeights | None, images: Tensor, labels: Tensor
) -> float:
    """The multiplier of the cosine that an add-on is trained with.

    Args:
        addon: its own is that of the model.
        confidence: "model" for that; "fitted" for the one that fits zero-shot answers.
        weights: zero-shot ones of the classes.
        images: (n,D) unit norm.
        labels: (n,).

    Raises:
        ConfigError: nothing to fit it to, as the method learns without labels.
    """
    require_labels(addon, confidence)
    if confidence == "model":
        return addon.logit_scale
    assert weights is not None, "the need `class_names` was declared"
    return fitted_scale(weights.scores(images), labels, addon.logit_scale)


def require_labels(addon: AddOn, confidence: Confidence) -> None:
    """Refuse `confidence` fitted for a method that learns without labels.

    Raises:
        ConfigError: it is asked for.
    """
    if confidence == "fitted" and "few_shot_labels" not in addon.needs:
        raise ConfigError(
            f"{addon.name}: confidence=fitted asks labelled images how sure the model may be, and {addon.name} is "
            "given none. Leave it at confidence=model."
        )


def beside(constant: float, scale: float) -> float:
    """A paper's weight of a term beside the cross-entropy of 100 x cosine, for that of scale x cosine.

    The gradient of cross-entropy grows with the multiplier; so must what is to hold it.
    """
    return constant * scale / PAPER_LOGIT_SCALE
