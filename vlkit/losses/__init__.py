"""Losses, one file each: a pure function of features, and the module that makes it a term of an objective."""

from torch import nn

from vlkit.contracts import MethodRow
from vlkit.losses.clip import ClipLoss, clip_loss
from vlkit.losses.objective import LossOutput, Objective
from vlkit.losses.sigmoid import SigmoidLoss, sigmoid_loss

# The keys of [loss] in a run file.
TERMS: dict[str, type[nn.Module]] = {"clip": ClipLoss, "sigmoid": SigmoidLoss}

METHODS: dict[str, MethodRow] = {
    "clip": MethodRow(
        name="clip",
        slot="loss",
        needs="pairs",
        cost="two products of all images with all texts, memory linear in the batch",
        source="Radford et al. 2021, arXiv:2103.00020",
        when="The default for pretraining: batches of some hundred pairs or more.",
    ),
    "sigmoid": MethodRow(
        name="sigmoid",
        slot="loss",
        needs="pairs",
        cost="one product of all images with all texts, memory linear in the batch",
        source="Zhai et al. 2023, arXiv:2303.15343",
        when="When scores are to be probabilities of each pair on its own, or to go on from SigLIP weights.",
    ),
}

__all__ = [
    "METHODS",
    "TERMS",
    "ClipLoss",
    "LossOutput",
    "Objective",
    "SigmoidLoss",
    "clip_loss",
    "sigmoid_loss",
]
