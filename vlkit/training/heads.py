"""Heads that are trained on top of an encoder: made with the loss that trains them, saved beside the model."""

from pathlib import Path

import torch

from vlkit.losses import PatchAlignmentLoss
from vlkit.losses.objective import Objective
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.embedder import Embedder
from vlkit.models.heads.patch_alignment import HEAD_FILE, PatchAlignment, save_head
from vlkit.run_sections import PatchAlignmentSettings


def head_term(settings: PatchAlignmentSettings, encoder: DualEncoder, seed: int) -> PatchAlignmentLoss:
    """The loss with a new head of the encoder's widths, on its device; its weights follow from the seed.

    Raises:
        ModelError: the encoder gives no patch tokens.
    """
    with torch.no_grad():
        size = encoder.image_size
        tower = encoder.vision_tower
        width = tower.embed(torch.zeros(1, 3, size, size, device=encoder.device)).shape[-1]
    torch.manual_seed(seed)
    head = PatchAlignment(width, encoder.embed_dim, settings.attention_scale, settings.learn_attention_scale)
    return PatchAlignmentLoss(head.to(encoder.device), **settings.arguments)


def save_heads(objective: Objective, encoder: DualEncoder, folder: Path) -> None:
    """Write the heads of an objective's terms below a run folder, with the hash of the encoder they belong to.

    Raises:
        CheckpointError: it cannot be written.
    """
    for term in objective.terms.values():
        if isinstance(term, PatchAlignmentLoss) and isinstance(term.head, PatchAlignment):
            save_head(term.head, folder / HEAD_FILE, Embedder(encoder, folder.name).weights_hash)
