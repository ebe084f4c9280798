"""DEAL: fine-tuning that makes heat maps of a class's concepts differ from each other and add up to the class's map.

    h_k: map of concept k, h_c: of the class name, each scaled to [0,1] over the patches
    loss = InfoNCE + separate L_sep + consistent L_con + sparse L_spa
    L_sep = mean over pairs k < l and patches of h_k h_l
    L_con = mean over patches of (sum_k h_k - h_c)^2
    L_spa = mean of |h_k|

A map is the attention of the last block from the class position to the patches, times its gradient for the similarity,
where positive, mean over heads (`interpret/relevance.py`, last layer). Here the graph is kept: the maps' gradient
reaches the weights, through the attention and through its gradient (a second derivative).

Source: Li, Ma and Peng 2024, "DEAL: Disentangle and Localize Concept-level Explanations for VLMs", ECCV,
arXiv:2407.14412, and the authors' code: 5 concepts a class, InfoNCE with class names, Adam (0.9, 0.98), weight decay
1e-3, lr 5e-7, one epoch, a batch below the number of classes.
Differs: in the authors' code attention and gradient are detached before the maps are made, so the three terms have no
effect there; here they have. The terms are means over pairs and patches, so that weights do not depend on the grid:
24.5, 0.49 and 0.12 give what 0.05, 0.01 and 0.0005 give for sums over 7 x 7 patches and 10 pairs (the authors' last one
grows with the batch as well). L_spa is taken of maps scaled each by itself. AdamW with betas (0.9, 0.999); the
temperature stays. What the published gains come from is open: compare with all three weights at 0, which is contrastive
fine-tuning.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.class_texts import read_class_texts, texts_of
from vlkit.addons.prompt_fit import Plan
from vlkit.addons.tower_learning import Learned, Loss, TowerTask
from vlkit.addons.tower_weights import WeightLearner
from vlkit.errors import ConfigError, DataError
from vlkit.models.attention import attention_map, attention_parts, feed_forward, mix_values
from vlkit.models.dual_encoder import DualEncoder


class Maps(NamedTuple):
    """What an image makes of its class."""

    image: Tensor  # (B,D) unit norm features
    concepts: Tensor  # (B,K,P) in [0,1]
    category: Tensor  # (B,P) in [0,1]


class Terms(NamedTuple):
    """() each."""

    separate: Tensor
    consistent: Tensor
    sparse: Tensor


@dataclass(frozen=True)
class Deal(WeightLearner):
    """Both towers fine-tuned for consistent explanations.

    Attributes:
        file: JSON of class name -> concepts, as for `descriptions`.
        concepts: of each class, the first of its list.
        separate, consistent, sparse: weights of the three terms beside InfoNCE of 100 x cosine (with another multiplier
            they shrink with it, for so do its gradients); all 0 is contrastive fine-tuning.
    """

    epochs: int = 1
    lr: float = 5e-7
    file: str = ""
    concepts: int = 5
    separate: float = 24.5
    consistent: float = 0.49
    sparse: float = 0.12

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: fewer than two concepts.
        """
        if self.concepts < 2:
            raise ConfigError(f"deal: concepts is {self.concepts}; maps can differ from two on.")

    def plan(self, task: TowerTask) -> Plan:
        """With the authors' optimizer and weight decay."""
        return replace(super().plan(task), optimizer="adamw", weight_decay=1e-3, warmup_epochs=0)

    def objective(self, task: TowerTask, found: Learned) -> Loss:
        """Contrastive loss, and the three terms.

        Raises:
            ConfigError, DataError: no file of concepts, or too few for a class.
        """
        concepts = self._concept_tokens(task)
        assert task.prompts is not None
        class_of = task.prompts.class_of.tolist()
        first = torch.tensor([class_of.index(place) for place in range(len(concepts))])
        names = task.prompts.tokens[first].to(task.encoder.device)

        def loss(rows: Tensor) -> Tensor:
            classes, which = task.labels[rows].unique(return_inverse=True)
            of_class = task.autocast(lambda: task.encoder.encode_text(names[classes]))[which]
            flat = task.autocast(lambda: task.encoder.encode_text(concepts[classes].flatten(0, 1)))
            of_concepts = flat.unflatten(0, (len(classes), self.concepts))[which]
            with torch.autocast(task.encoder.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                maps = concept_maps(task.encoder, task.images(rows), of_class, of_concepts)
            held = terms(maps.concepts, maps.category)
            kept = self.separate * held.separate + self.consistent * held.consistent + self.sparse * held.sparse
            total: Tensor = contrast(task.scale * maps.image @ of_class.T) + task.from_paper(1.0) * kept
            return total

        return loss

    def _concept_tokens(self, task: TowerTask) -> Tensor:
        """(C,K,T) of the first concepts of each class."""
        classes = task.reference.class_names
        lists = texts_of(classes, read_class_texts(self.file, self.name), self.file)
        few = [item.shown for item, texts in zip(classes, lists, strict=True) if len(texts) < self.concepts]
        if few:
            raise DataError(
                f"{self.file}: {len(few)} of {len(classes)} classes have fewer than {self.concepts} concepts (first: "
                f"{few[0]!r}). Write more, or lower concepts."
            )
        tokens = task.encoder.tokenize([text for texts in lists for text in texts[: self.concepts]])
        return tokens.to(task.encoder.device).view(len(classes), self.concepts, -1)


def concept_maps(encoder: DualEncoder, images: Tensor, category: Tensor, concepts: Tensor) -> Maps:
    """Heat maps of each image for its class and for K concepts, with gradients into the weights.

    Args:
        encoder: with an open_clip ViT.
        images: (B,3,S,S).
        category: (B,D) unit-norm text features.
        concepts: (B,K,D) unit-norm text features.

    Raises:
        ModelError: the encoder has no way into its vision tower.
    """
    tower = encoder.vision_tower
    x = tower.embed(images)
    for block in tower.blocks[:-1]:
        x = block(x)
    last = tower.blocks[-1]
    parts = attention_parts(last.module, x)
    weights = attention_map(parts, last.mask(x))
    x = x + mix_values(last.module, weights, parts.value)
    x = x + feed_forward(last.module, x)
    features = F.normalize(tower.finish(x).float(), dim=-1)
    made = []
    for text in (category, *concepts.unbind(1)):
        # The graph of the gradient is kept: without it the maps would be constants for the optimizer.
        (gradient,) = torch.autograd.grad((features * text).sum(), weights, create_graph=True)
        made.append((gradient * weights).clamp(min=0).mean(1)[:, 0, 1:].float())
    return Maps(features, scaled_to_one(torch.stack(made[1:], dim=1)), scaled_to_one(made[0]))


def scaled_to_one(maps: Tensor) -> Tensor:
    """Maps (...,P) with smallest value 0 and largest 1; a constant one becomes 0."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    span = high - low
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1.0), 0.0)


def terms(concepts: Tensor, category: Tensor) -> Terms:
    """Overlap of concept maps (B,K,P), distance of their sum from the class's map (B,P), size."""
    count, total = concepts.shape[1], concepts.sum(1)
    overlap = (total.square() - concepts.square().sum(1)) / 2  # sum over k < l of h_k h_l
    return Terms(
        separate=overlap.mean() / (count * (count - 1) / 2),
        consistent=(total - category).square().mean(),
        sparse=concepts.abs().mean(),
    )


def contrast(logits: Tensor) -> Tensor:
    """Symmetric InfoNCE of logits (B,B), partners on the diagonal."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


ADDON = Deal
