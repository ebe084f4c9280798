"""Why prompt: vectors among the patches, learned so that an image finds its class together with the reason for it.

    loss = CE over all classes x reasons of tau cos(x, "This is a photo of a {class} because there is {reason}")

The caption of each few-shot image is its reason; `vlkit eval doubly-right` tells how often class and reason are both
right.

Source: Mao et al. 2023, "Doubly Right Object Recognition: A Why Prompt for Visual Rationales", CVPR, arXiv:2212.06202,
section 4, and the authors' code for small sets: 3 vectors behind the patches in front of the first layer,
normal(0,1); SGD with momentum, lr 40, no weight decay, 100 epochs, batch 32, tau at most 100.
Differs: the warm-up is one epoch at 1e-5 (CoOp's), not a rise over 1000 steps. The training for ImageNet (deep
prompts, pseudo-reasons, sampled distractors) is not part of it. Images come from the user: the authors' were found on
the web and cannot be passed on. Of several captions the first is the reason. Vectors come in behind the norm of the
embedded patches.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.prompt_fit import Plan
from vlkit.addons.tower_learning import Learned, Loss, TowerLearner, TowerTask
from vlkit.addons.tower_prompts import image_prompts, layers, width
from vlkit.data.records import Record
from vlkit.errors import DataError
from vlkit.models.dual_encoder import DualEncoder

TEMPLATE = "This is a photo of a {class} because there is {reason}"
MAX_SCALE = 100.0


class Rationales(NamedTuple):
    """All pairs of a class and a reason."""

    texts: list[str]  # (T,)
    classes: Tensor  # (T,) int64
    reasons: Tensor  # (T,) int64, into the distinct reasons


@dataclass(frozen=True)
class WhyPrompt(TowerLearner):
    """Prompts for class and reason.

    Attributes:
        tokens: vectors in front of a layer.
        depth: layers that have them, from the first; more than there are: all.
    """

    epochs: int = 100
    lr: float = 40.0
    tokens: int = 3
    depth: int = 1
    prompts: Tensor | None = learned()  # (J,n,W)

    def start(self, task: TowerTask) -> Learned:
        """Normal numbers."""
        blocks = task.encoder.vision_tower.blocks
        shape = layers(self.depth, blocks, self.name), self.tokens, width(blocks)
        return {"prompts": torch.randn(shape, generator=torch.Generator().manual_seed(task.reference.seed))}

    def acting(self, encoder: DualEncoder, found: Learned) -> AbstractContextManager[None]:
        """Prompts behind the patches."""
        return image_prompts(encoder, found["prompts"])

    def plan(self, task: TowerTask) -> Plan:
        """Without weight decay."""
        return replace(super().plan(task), weight_decay=0.0)

    def objective(self, task: TowerTask, found: Learned) -> Loss:
        """Cross-entropy over all pairs of class and reason.

        Raises:
            DataError: a few-shot image without a caption, or reasons that do not fit the text tower.
        """
        shots = task.reference.few_shot
        assert shots is not None
        distinct, own = reasons_of(shots.records)
        candidates = rationale_texts([item.shown for item in task.reference.class_names], distinct)
        require_room(candidates.texts, task.encoder)
        texts = task.source.embed_texts(candidates.texts).to(task.encoder.device)
        targets = task.labels * len(distinct) + own.to(task.labels.device)
        scale = min(task.scale, MAX_SCALE)

        def loss(rows: Tensor) -> Tensor:
            return F.cross_entropy(scale * task.encode(task.images(rows)) @ texts.T, targets[rows])

        return loss


def rationale_texts(class_names: Sequence[str], reasons: Sequence[str]) -> Rationales:
    """Every class with every reason, class by class."""
    texts = [_text(name, reason) for name in class_names for reason in reasons]
    classes = torch.arange(len(class_names)).repeat_interleave(len(reasons))
    return Rationales(texts, classes, torch.arange(len(reasons)).repeat(len(class_names)))


def reasons_of(records: Sequence[Record]) -> tuple[list[str], Tensor]:
    """The distinct reasons of images in their order, and which of them each image (n,) has.

    Raises:
        DataError: an image without a caption.
    """
    lacking = [record.key for record in records if not record.captions]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(records)} images have no reason (first: {lacking[0]}). Give each "
            "image one as its caption, e.g. in a table with columns image, class, caption."
        )
    given = [record.captions[0].strip().rstrip(".") for record in records]
    number = {reason: place for place, reason in enumerate(dict.fromkeys(given))}
    return list(number), torch.tensor([number[reason] for reason in given])


def require_room(texts: Sequence[str], encoder: DualEncoder) -> None:
    """Refuse texts longer than the text tower takes: reasons stand at their end, and cut off all would be alike.

    Raises:
        DataError: the longest.
    """
    sizes = [len(row) for row in encoder.tokenize.encode_whole(texts)]
    longest = max(range(len(texts)), key=lambda place: sizes[place])
    if sizes[longest] > encoder.context_length:
        raise DataError(
            f"{texts[longest]!r} has {sizes[longest]} tokens, this model takes {encoder.context_length}. "
            "Shorten the reason."
        )


def _text(name: str, reason: str) -> str:
    # One pass over the template's own pieces: names and reasons may hold braces themselves.
    before, between = TEMPLATE.removesuffix("{reason}").split("{class}")
    return f"{before}{name}{between}{reason}"


ADDON = WhyPrompt
