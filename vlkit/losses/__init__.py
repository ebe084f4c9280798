"""Losses, one file each: a pure function of features, and the module that makes it a term of an objective."""

from torch import nn

from vlkit.contracts import MethodRow
from vlkit.losses.clip import ClipLoss, clip_loss
from vlkit.losses.objective import LossOutput, Objective

# The keys of [loss] in a run file.
TERMS: dict[str, type[nn.Module]] = {"clip": ClipLoss}

METHODS: dict[str, MethodRow] = {
    "clip": MethodRow(
        name="clip",
        slot="loss",
        needs="pairs",
        cost="two products of all images with all texts, memory linear in the batch",
        source="Radford et al. 2021, arXiv:2103.00020",
        when="The default for pretraining: batches of some hundred pairs or more.",
    ),
}

__all__ = ["METHODS", "TERMS", "ClipLoss", "LossOutput", "Objective", "clip_loss"]
