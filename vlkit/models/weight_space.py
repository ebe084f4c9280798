"""WiSE-FT: a model between a pretrained one and what became of it by fine-tuning.

    between = interpolate(load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k"), load_encoder("run:runs/mine"), 0.5)
    save_encoder(between, "models/between")         # vlkit export run:runs/mine --interpolate START=0.5 --to ...

Fine-tuning gains on its own data and loses elsewhere; somewhere along the straight line between both sets of weights
there is often a model that is nearly as good on the one and hardly worse on the other, at no cost in inference.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from vlkit.errors import ModelError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.export import as_open_clip
from vlkit.models.weight_files import differences

# What two models must agree on so that their weights can be mixed.
_SAME = ("library", "model_cfg", "preprocess_cfg", "tokenizer")


def interpolate(start: DualEncoder, tuned: DualEncoder, alpha: float) -> DualEncoder:
    """A new encoder with the weights (1 - alpha) start + alpha tuned; neither of both is changed.

    Args:
        start: the pretrained model; a CLIP model of transformers is turned into open_clip's form where `tuned` is on
            open_clip, as training does.
        tuned: the same model after fine-tuning.
        alpha: 0 gives exactly the weights of `start`, 1 exactly those of `tuned`; beyond both ends extrapolates.

    Raises:
        ModelError: they differ in architecture, preprocessing or tokenizer; the message lists in what.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903, equation 1.
    Differs: whole numbers (counters of batch statistics) are taken from the nearer model.
    """
    if tuned.record()["library"] == "open_clip" and start.record()["library"] == "transformers":
        start = as_open_clip(start)
    require_mixable(start, tuned)
    between = copy.deepcopy(tuned)
    mixed = interpolate_weights(start.weights(), tuned.weights(), alpha)
    with torch.no_grad():
        for name, value in between.weights().items():
            value.copy_(mixed[name])
    return between


def interpolate_weights(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) start + alpha tuned, tensor by tensor; at the ends bit for bit."""
    if alpha in (0, 1):
        return {name: value.clone() for name, value in (tuned if alpha else start).items()}
    return {name: _between(value, tuned[name], alpha) for name, value in start.items()}


def _between(start: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    if not start.is_floating_point():
        return (start if alpha < 0.5 else tuned).clone()
    tuned = tuned.to(start.device, start.dtype)
    # Equal numbers stay what they are, bit for bit; infinite ones (of a mask) too.
    return torch.where(start == tuned, start, start + alpha * (tuned - start))


def require_mixable(start: DualEncoder, tuned: DualEncoder) -> None:
    """Refuse models whose weights do not stand for the same things.

    Raises:
        ModelError: they differ in architecture, preprocessing or tokenizer; the message lists in what.
    """
    one, other = start.record(), tuned.record()
    unlike = [name for name in _SAME if one.get(name) != other.get(name)]
    wrong = differences(found=tuned.weights(), expected=start.weights())
    if not unlike and not wrong:
        return
    found = [f"{name}: {one.get(name)} and {other.get(name)}" for name in unlike] + ([str(wrong)] if wrong else [])
    raise ModelError(
        "Only weights of one and the same architecture can be mixed; these two differ in " + "; ".join(found) + "."
    )
