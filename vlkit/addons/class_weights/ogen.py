"""OGEN: while words are learned, a small network makes image features of classes that have none.

    G(q; K, V) = unit(FFN(q) + attention(q, K, V))                       dropped after training

    A  own class from its neighbours     G(w_y; w_near, mu_near + r sigma_near)     near x_i
    B  neighbours from the own image     G(w_near; w_y, x_i)                        near mu_near + r sigma_near
    C  unknown names from the image      G(w'_j; w_y, x_i), j the unknown nearest w_y

    loss = D (MSE(A) + MSE(B)) in the first fifth of the epochs, later also
           learner / 4 + CE(A W) / 4 + CE(B W) / 12 + CE(C W') / 6

Source: Zang, Goh, Susskind and Huang 2024, "Overcoming the Pitfalls of Vision-Language Model Finetuning for OOD
Generalization", arXiv:2401.15914, and the authors' code: 3 neighbours, r uniform in [0,1) in each channel.
Differs: their code takes the names of the classes it is tested on as unknown ones. Here `unknown` names them, so that
it is in the settings for all to see; without, half of the base classes, drawn in each step, play the unknown.
Means and deviations are those of the few-shot images. The distillation of the paper, which their code does not do, is
left out. Training as `coop`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.class_names import ClassName, check_classes, parse_class
from vlkit.addons.class_weights.kgcoop import KgCoOp
from vlkit.addons.prompted_text import PromptedText, first_names
from vlkit.addons.text_prompts import Examples, Learned, Loss, PromptTask, TextPrompts
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

HEADS, DROPOUT, NEAR = 4, 0.1, 3
# Share of the epochs in which only the network learns.
QUIET = 0.2
GENERATOR = ("queries", "keys", "values", "out", "up", "down")


class Weights(NamedTuple):
    """Of the four parts of the later loss; the learner's own alone, at 1, is the learner."""

    learner: float = 1 / 4
    own: float = 1 / 4
    neighbours: float = 1 / 12
    unknown: float = 1 / 6


@dataclass(frozen=True)
class Ogen(TextPrompts):
    """A regulariser around a learner; see `TextPrompts` for the other settings.

    Attributes:
        learner: the learner whose words these are.
        unknown: further class names, `a|b|c`; empty holds out base classes.
        features: weight of the two distances between features, D where None.
        parts: of the later loss: "all", or "learner" for its own loss alone, at weight 1.
    """

    words: str = "a photo of a"
    learner: Literal["coop", "kgcoop"] = "coop"
    unknown: str = ""
    features: float | None = None
    parts: Literal["all", "learner"] = "all"
    trained_with: tuple[str, ...] | None = learned()  # unknown names, for the record

    def start(self, task: PromptTask) -> Learned:
        """The words, and the network, which is left behind."""
        if len(task.class_names) < 2:
            raise ConfigError("ogen works with neighbours of classes; one class has none.")
        dim = task.images.shape[1]
        if dim % HEADS:
            raise ConfigError(f"ogen attends with {HEADS} heads, which {dim} dimensions cannot be divided among.")
        random = torch.Generator().manual_seed(task.seed + 1)
        drawn = {
            name: ((torch.rand(dim, dim + 1, generator=random) * 2 - 1) / math.sqrt(dim)).to(task.images)
            for name in GENERATOR
        }
        return super().start(task) | drawn

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train.

        Raises:
            ConfigError: fewer than two classes, unknown names that are base names, or what `TextPrompts.learn` refuses.
        """
        further = self._unknown()
        if further:
            check_classes([*reference.class_names, *further], "the base and the unknown classes together")
        done = super().learn(reference, embedder, progress)
        return replace(done, trained_with=tuple(item.shown for item in further) or None)

    def prompted(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> PromptedText:
        """With the first name of each class."""
        return super().prompted(first_names(class_names), embedder)

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """The learner's loss and the three kinds of features."""
        own = KgCoOp.objective(KgCoOp(), task, found) if self.learner == "kgcoop" else super().objective(task, found)
        if self.parts == "learner":
            return own
        step = _Step(task, found, self._further_text(task), torch.Generator().manual_seed(task.seed + 2))
        plan = self.plan(Examples(task.vectors, task.labels), len(task.class_names))
        first = QUIET * plan.epochs * math.ceil(len(task.labels) / plan.batch_size)
        weight, done = task.images.shape[1] if self.features is None else self.features, iter(range(2**62))

        def loss(rows: Tensor) -> Tensor:
            parts = step(rows)
            apart = weight * parts.features
            if next(done) < first:
                return apart
            share = Weights()
            named = share.own * parts.own + share.neighbours * parts.neighbours + share.unknown * parts.unknown
            return apart + share.learner * own(rows) + named

        return loss

    def _unknown(self) -> list[ClassName]:
        return [parse_class(name) for name in self.unknown.split("|")] if self.unknown else []

    def _further_text(self, task: PromptTask) -> PromptedText | None:
        further = self._unknown()
        if not further:
            return None
        return replace(self.prompted(further, task.source), precision=self.precision, checkpointing=self.checkpointing)


class Parts(NamedTuple):
    """Of the loss, each ()."""

    features: Tensor  # the two distances
    own: Tensor
    neighbours: Tensor  # sum over the neighbours, mean over images
    unknown: Tensor  # likewise


class _Step:
    """The network's part of the loss, step by step."""

    def __init__(self, task: PromptTask, found: Learned, further: PromptedText | None, random: torch.Generator) -> None:
        self.task, self.found, self.further, self.random = task, found, further, random
        self.means, self.deviations = class_statistics(task.images, task.labels, len(task.class_names))
        self.near = nearest(self.means)

    def __call__(self, rows: Tensor) -> Parts:
        """Parts of some images."""
        task, images, labels = self.task, self.task.images[rows], self.task.labels[rows]
        weights = task.text.features(self.found["vectors"])
        fixed, near = weights.detach(), self.near[labels]  # (C,D), (B,k)
        noise = torch.rand(images.shape[1], generator=self.random).to(images)
        around = self.means[near] + noise * self.deviations[near]  # (B,k,D)
        made_own = self._generate(fixed[labels][:, None], fixed[near], around)[:, 0]
        made_near = self._generate(fixed[near], fixed[labels][:, None], images[:, None])
        names, columns = self._names(weights)
        far = wanted(fixed[labels], labels, names.detach(), columns)
        made_far = self._generate(names[far], fixed[labels][:, None], images[:, None])
        return Parts(
            F.mse_loss(made_own, images) + F.mse_loss(made_near, around),
            F.cross_entropy(task.scale * made_own @ weights.T, labels),
            _summed(task.scale * made_near @ weights.T, near),
            _summed(task.scale * made_far @ names.T, far),
        )

    def _generate(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return generate(self.found, query, keys, values, self.random)

    def _names(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of the unknown names, and which base classes they are, if they are."""
        if self.further is not None:
            return self.further.features(self.found["vectors"]), None
        count = max(2, len(weights) // 2)
        held = torch.randperm(len(weights), generator=self.random)[:count].to(weights.device)
        return weights[held], held


def class_statistics(images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Means and deviations (C,D) of the images of each class."""
    groups = [images[labels == one] for one in range(num_classes)]
    return torch.stack([one.mean(0) for one in groups]), torch.stack([one.std(0, correction=0) for one in groups])


def nearest(means: Tensor) -> Tensor:
    """(C,k) the other classes whose means lie nearest, by cosine."""
    unit = F.normalize(means, dim=-1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.topk(min(NEAR, len(means) - 1)).indices


def wanted(own: Tensor, labels: Tensor, names: Tensor, columns: Tensor | None) -> Tensor:
    """(B,k) the unknown names nearest to each image's own, which is none of them.

    Args:
        own: (B,D) of the images' classes.
        labels: (B,).
        names: (U,D).
        columns: (U,) the base class that each is, or None.
    """
    similarity = own @ names.T
    room = len(names)
    if columns is not None:
        similarity = similarity.masked_fill(columns == labels[:, None], -torch.inf)
        room -= 1
    return similarity.topk(min(NEAR, room)).indices


def generate(found: Learned, query: Tensor, keys: Tensor, values: Tensor, random: torch.Generator | None) -> Tensor:
    """unit(FFN(q) + attention): (B,Q,D) of queries (B,Q,D), keys and values (B,k,D).

    Args:
        found: six layers (D,D+1), the last column the bias.
        query: names to be made.
        keys: names that are there.
        values: their images.
        random: of the dropout of the attention; None for none.
    """
    heads = [
        _layer(found[name], part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name, part in (("queries", query), ("keys", keys), ("values", values))
    ]
    attention = (heads[0] @ heads[1].mT / math.sqrt(heads[0].shape[-1])).softmax(-1)
    if random is not None:
        kept = torch.rand(attention.shape, generator=random).to(attention) >= DROPOUT
        attention = attention * kept / (1 - DROPOUT)
    mixed = _layer(found["out"], (attention @ heads[2]).transpose(1, 2).flatten(-2))
    return F.normalize(_layer(found["down"], F.relu(_layer(found["up"], query))) + mixed, dim=-1)


def _layer(weights: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ weights[:, :-1].T + weights[:, -1]


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (B,k,C), mean over images and sum over their k."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * labels.shape[1]


ADDON = Ogen
