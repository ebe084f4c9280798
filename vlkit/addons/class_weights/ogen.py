"""OGEN: while words are learned, a small network makes image features of classes that have none.

    G(q; K, V) = unit(FFN(q) + attention(q, K, V))                       dropped after training

    A  own class from its neighbours     G(w_y; w_near, mu_near + r sigma_near)     near x_i
    B  neighbours from the own image     G(w_near; w_y, x_i)                        near mu_near + r sigma_near
    C  unknown names from the image      G(w'_j; w_y, x_i), j the unknown nearest w_y

    loss = D (MSE(A) + MSE(B)) in the first fifth of the epochs, later also
           learner / 4 + CE(A W) / 4 + CE(B W) / 12 + CE(C W') / 6
           + distill D (MSE(A, A*) + MSE(B, B*) + MSE(C, C*))

A*, B*, C* are what the teacher makes of the same images: words and network as their mean over the last epochs, over a
window that grows with the training ("adaptive local mean teacher", `vlkit.addons.local_mean`).

Source: Zang, Goh, Susskind and Huang 2024, "Overcoming the Pitfalls of Vision-Language Model Finetuning for OOD
Generalization", arXiv:2401.15914, and the authors' code: 3 neighbours, r uniform in [0,1) in each channel.
Differs: their code takes the names of the classes it is tested on as unknown ones. Here `unknown` names them, so that
it is in the settings for all to see; without, half of the base classes, drawn in each step, play the unknown. Means and
deviations are those of the few-shot images. Of the distillation the code has but a teacher that nothing uses, and the
paper's text could not be had; public reviews say that it averages past checkpoints in a local window which adapts.
Chosen: plain means, after each epoch, of the last 2 epochs at first and 9 in the end by half a cosine, squared distance
between the features made, weight 1, no dropout in the teacher. Weights of distances are beside logits of 100 x cosine.
`distill=0` is the authors' code. Training as `coop`.
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
from vlkit.addons.local_mean import LocalMean
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
        features: weight of the two distances between features beside cross-entropy of 100 x cosine, D where None.
        distill: weight of the distance from what the teacher makes, beside `features`.
        parts: of the later loss: "all", or "learner" for its own loss alone, at weight 1.
    """

    words: str = "a photo of a"
    learner: Literal["coop", "kgcoop"] = "coop"
    unknown: str = ""
    features: float | None = None
    distill: float = 1.0
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
        plan = self.plan(Examples(task.vectors, task.labels), len(task.class_names))
        per_epoch = math.ceil(len(task.labels) / plan.batch_size)
        quiet = QUIET * plan.epochs * per_epoch
        weight = task.from_paper(task.images.shape[1] if self.features is None else self.features)
        steps = iter(range(2**62))
        teacher = LocalMean(found, plan.epochs) if self.distill else None
        step = _Step(task, found, self._further_text(task), torch.Generator().manual_seed(task.seed + 2))

        def loss(rows: Tensor) -> Tensor:
            done = next(steps)
            if teacher and done and done % per_epoch == 0:
                teacher.add(done // per_epoch - 1)
                if done >= quiet:
                    step.taught(teacher.values())
            parts = step(rows)
            apart = weight * parts.features
            if done < quiet:
                return apart
            share = Weights()
            named = share.own * parts.own + share.neighbours * parts.neighbours + share.unknown * parts.unknown
            return apart + share.learner * own(rows) + named + self.distill * weight * parts.taught

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
    taught: Tensor  # the distances from the teacher's features; 0 without one


class _Made(NamedTuple):
    """Features (B,1 or k,D) that the network makes."""

    own: Tensor
    neighbours: Tensor
    unknown: Tensor


class _Texts(NamedTuple):
    """Features of names with some words."""

    base: Tensor  # (C,D)
    further: Tensor | None  # (U,D)


class _Step:
    """The network's part of the loss, step by step."""

    def __init__(self, task: PromptTask, found: Learned, further: PromptedText | None, random: torch.Generator) -> None:
        self.task, self.found, self.further, self.random = task, found, further, random
        self.means, self.deviations = class_statistics(task.images, task.labels, len(task.class_names))
        self.near = nearest(self.means)
        self._teacher: tuple[Learned, _Texts] | None = None

    def taught(self, teacher: Learned) -> None:
        """Go on with another teacher."""
        with torch.no_grad():
            self._teacher = teacher, self._texts(teacher)

    def __call__(self, rows: Tensor) -> Parts:
        """Parts of some images."""
        task, images, labels = self.task, self.task.images[rows], self.task.labels[rows]
        texts, near = self._texts(self.found), self.near[labels]
        noise = torch.rand(images.shape[1], generator=self.random).to(images)
        around = self.means[near] + noise * self.deviations[near]  # (B,k,D)
        columns = self._held(len(texts.base)) if texts.further is None else None
        names = chosen(texts, columns)
        far = wanted(texts.base.detach()[labels], labels, names.detach(), columns)

        def make(found: Learned, of: _Texts, random: torch.Generator | None) -> _Made:
            fixed, unknown = of.base.detach(), chosen(of, columns)
            own = fixed[labels][:, None]
            return _Made(
                generate(found, own, fixed[near], around, random),
                generate(found, fixed[near], own, images[:, None], random),
                generate(found, unknown[far], own, images[:, None], random),
            )

        made = make(self.found, texts, self.random)
        taught = images.new_zeros(())
        if self._teacher:
            with torch.no_grad():
                wished = make(*self._teacher, None)
            taught = torch.stack([F.mse_loss(one, other) for one, other in zip(made, wished, strict=True)]).sum()
        return Parts(
            F.mse_loss(made.own[:, 0], images) + F.mse_loss(made.neighbours, around),
            F.cross_entropy(task.scale * made.own[:, 0] @ texts.base.T, labels),
            _summed(task.scale * made.neighbours @ texts.base.T, near),
            _summed(task.scale * made.unknown @ names.T, far),
            taught,
        )

    def _texts(self, found: Learned) -> _Texts:
        further = None if self.further is None else self.further.features(found["vectors"])
        return _Texts(self.task.text.features(found["vectors"]), further)

    def _held(self, num_classes: int) -> Tensor:
        """(U,) base classes that play the unknown."""
        count = max(2, num_classes // 2)
        return torch.randperm(num_classes, generator=self.random)[:count].to(self.task.labels.device)


def chosen(texts: _Texts, columns: Tensor | None) -> Tensor:
    """(U,D) of the unknown names: those further ones, or these base classes."""
    if texts.further is not None:
        return texts.further
    assert columns is not None
    return texts.base[columns]


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
