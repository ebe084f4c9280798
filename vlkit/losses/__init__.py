"""Losses, one file each: a pure function of features, and the module that makes it a term of an objective."""

from torch import nn

from vlkit.contracts import MethodRow
from vlkit.losses.clip import ClipLoss, clip_loss
from vlkit.losses.distillation import DistillationLoss, distillation_loss
from vlkit.losses.fast_clip import FastClipLoss
from vlkit.losses.objective import LossOutput, Objective
from vlkit.losses.patch_alignment import PatchAlignmentLoss, alignment_scores, patch_alignment_loss
from vlkit.losses.sigmoid import SigmoidLoss, sigmoid_loss

# The keys of [loss] in a run file.
TERMS: dict[str, type[nn.Module]] = {
    "clip": ClipLoss,
    "sigmoid": SigmoidLoss,
    "fast_clip": FastClipLoss,
    "distillation": DistillationLoss,
    "patch_alignment": PatchAlignmentLoss,
}

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
    "fast_clip": MethodRow(
        name="fast_clip",
        slot="loss",
        needs="pairs",
        cost="as clip, and two numbers kept for each sample",
        source="Wei et al. 2024, arXiv:2407.01445",
        when="Small batches: each sample is contrasted with what it met over the whole run.",
    ),
    "distillation": MethodRow(
        name="distillation",
        slot="loss",
        needs="a teacher model, or its features stored in the shards",
        cost="a forward of the teacher without gradient; nothing when its features are stored",
        source="Vasu et al. 2024, arXiv:2311.17049",
        when="A small model is to learn from a large one; beside clip, with a weight of its own.",
    ),
    "patch_alignment": MethodRow(
        name="patch_alignment",
        slot="loss",
        needs="pairs and patch tokens (any ViT)",
        cost="an attention of all texts over all patches; with frozen towers only its head is trained",
        source="Mukhoti et al. 2023, arXiv:2212.04994",
        when="Patches are to match texts, for segmentation: beside frozen towers, with few GPU hours.",
    ),
}

__all__ = [
    "METHODS",
    "TERMS",
    "ClipLoss",
    "DistillationLoss",
    "FastClipLoss",
    "LossOutput",
    "Objective",
    "PatchAlignmentLoss",
    "SigmoidLoss",
    "alignment_scores",
    "clip_loss",
    "distillation_loss",
    "patch_alignment_loss",
    "sigmoid_loss",
]
