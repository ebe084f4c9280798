"""What all methods share that learn something inside the towers: settings, images, texts, the loop.

A method is a `TowerLearner` that says what it learns (`start`), how that acts on the model (`acting`) and, where it is
not plain cross-entropy, its loss (`objective`). Training and use go through the same `acting`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import AddOn, Kind, Need, Task, TowerEdit, learned
from vlkit.addons.confidence import Confidence, beside, training_scale
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.labelled_pixels import LabelledPixels
from vlkit.addons.prompt_fit import Plan, fit_prompts, parameter
from vlkit.addons.prompted_text import Precision, Prompts, encoder_of, prompt_tokens, word_ids
from vlkit.addons.worded import WordedEdit
from vlkit.contracts import Progress
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

Learned = Mapping[str, Tensor]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TowerTask:
    """One training.

    Attributes:
        encoder: frozen but for what is learned.
        source: the same with its cache; embeds texts.
        pixels: n labelled images.
        labels: (n,) on the model's device.
        scale: multiplier of the cosine in the loss.
        reference: everything else that is there.
        prompts: tokens of the classes in the method's own words; None where its texts stay as they are.
        precision: of the towers.
        known: (R,D) the classes' names in many templates, by the text tower before; for those that hold on to it.
    """

    encoder: DualEncoder
    source: "FeatureSource"
    pixels: LabelledPixels
    labels: Tensor
    scale: float
    reference: "Reference"
    prompts: Prompts | None
    precision: Precision
    known: Tensor | None = None

    def images(self, rows: Tensor) -> Tensor:
        """(b,3,S,S) uint8 of some of the images, each time cut otherwise."""
        return self.pixels.batch(rows).to(self.encoder.device)

    def encode(self, images: Tensor) -> Tensor:
        """(b,D) unit norm."""
        return self.autocast(lambda: self.encoder.encode_image(images))

    def texts(self) -> ClassWeights:
        """Of the classes, by the text tower as it is now where the method has its own words, else those given."""
        given = self.reference.weights
        if self.prompts is None:
            assert given is not None
            device = self.encoder.device
            return replace(given, vectors=given.vectors.to(device), class_of=given.class_of.to(device))
        tokens = self.prompts.tokens.to(self.encoder.device)
        features = self.autocast(lambda: self.encoder.encode_text(tokens))
        return ClassWeights(features, self.prompts.class_of.to(self.encoder.device))

    def autocast(self, encode: Callable[[], Tensor]) -> Tensor:
        """What a tower makes in the precision asked for, in float32 and unit norm."""
        with torch.autocast(self.encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            made = encode()
        return F.normalize(made.float(), dim=-1)

    def logits(self, images: Tensor, texts: ClassWeights) -> Tensor:
        """(b,C) of image features (b,D)."""
        return self.scale * texts.scores(images)

    def from_paper(self, weight: float) -> float:
        """A paper's weight of a term beside cross-entropy of 100 x cosine, for the multiplier of this training."""
        return beside(weight, self.scale)


class EpochMean:
    """Mean of what is learned over the epochs.

    Args:
        found: changed in place by the training.
        weights: (epochs,) of the values after each epoch.
    """

    def __init__(self, found: Learned, weights: Tensor) -> None:
        self.found, self.weights = found, weights
        self._sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in found.items()}
        self._total = 0.0

    def add(self, epoch: int) -> None:
        """The values after an epoch, from 0."""
        weight = self.weights[epoch].item()
        self._total += weight
        for name, value in self.found.items():
            self._sums[name] += weight * value.detach().double()

    def values(self) -> Learned:
        """The mean over the epochs that were added; the last values where there is none."""
        if not self._total:
            return self.found
        return {name: (total / self._total).float() for name, total in self._sums.items()}


@dataclass(frozen=True)
class TowerLearner(TowerEdit):
    """Something small inside the towers, learned from a few labelled images.

    Attributes:
        epochs: passes over the images.
        lr: learning rate; a first epoch at 1e-5, then half a cosine to zero.
        batch_size: images a step.
        crop: smallest share of an image that a training crop shows; 1: no crops, mirroring only.
        confidence: multiplier of the cosine in the loss: "model" for its own, "fitted" for the one at which its
            zero-shot answers to the images are as sure as they are right.
        max_seconds: training comes to its end in this time.
        precision: of the towers while training.
        checkpointing: trade time for memory.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "pixels", "grad_image"})
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})

    epochs: int = 50
    lr: float = 0.002
    batch_size: int = 32
    crop: float = 0.08
    confidence: Confidence = "model"
    max_seconds: float | None = None
    precision: Precision = "fp32"
    checkpointing: bool = False
    steps: int | None = learned()  # taken in training

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train.

        Raises:
            ConfigError: other edits before it, texts too long for the context, or training that diverged.
            ModelError: a tower without a way in.
        """
        with torch.inference_mode(False):
            task = self.task(reference, embedder)
            with self.training(task) as found, recomputing(task.encoder, self.checkpointing):
                mean = self.average(found)
                steps = fit_prompts(
                    list(found.values()),
                    self.plan(task),
                    len(task.labels),
                    self.objective(task, found),
                    task.encoder,
                    reference.seed,
                    progress,
                    mean.add if mean else None,
                )
                values = self.kept(mean.values() if mean else found)
        made: dict[str, Any] = {name: value.detach().cpu().clone() for name, value in values.items()}
        return replace(self, **made, steps=steps)

    def edit(self, encoder: DualEncoder) -> AbstractContextManager[None]:
        """With what was learned."""
        return self.acting(encoder, self.state().tensors)

    @abstractmethod
    def start(self, task: TowerTask) -> Learned:
        """What is learned, before training, by the name of its field."""

    @abstractmethod
    def acting(self, encoder: DualEncoder, found: Learned) -> AbstractContextManager[None]:
        """Within it the model computes with what is learned."""

    def objective(self, task: TowerTask, found: Learned) -> Loss:
        """The loss of some rows: cross-entropy."""

        def loss(rows: Tensor) -> Tensor:
            return F.cross_entropy(task.logits(task.encode(task.images(rows)), task.texts()), task.labels[rows])

        return loss

    def average(self, found: Learned) -> "EpochMean | None":
        """What is kept in place of the last values; None keeps these."""
        return None

    def kept(self, found: Learned) -> Learned:
        """What was trained, by the name of its field."""
        return found

    def plan(self, task: TowerTask) -> Plan:
        """How long and how fast."""
        return Plan(self.epochs, self.lr, self.batch_size, self.max_seconds)

    def task(self, reference: "Reference", embedder: "FeatureSource") -> TowerTask:
        """The training on the few-shot images.

        Raises:
            ConfigError: other edits before it, or `confidence` fitted to images without labels.
        """
        task, shots = task_of(self, reference, embedder, self.crop, self.precision), reference.few_shot
        assert shots is not None and shots.labels is not None
        return replace(
            task, scale=training_scale(self, self.confidence, reference.weights, shots.vectors.pooled, shots.labels)
        )

    @contextmanager
    def training(self, task: TowerTask) -> Iterator[Learned]:
        """What is to be trained, acting on the model."""
        found = {name: parameter(value.to(task.encoder.device)) for name, value in self.start(task).items()}
        with self.acting(task.encoder, found):
            yield found


@dataclass(frozen=True)
class WordedLearner(TowerLearner, WordedEdit):
    """One that changes the text tower too, for texts of one template.

    Attributes:
        words: before the class name, whose first tokens are replaced.
    """

    needs: ClassVar[frozenset[Need]] = TowerLearner.needs | {"grad_text"}
    towers: ClassVar[frozenset[Kind]] = frozenset({"image", "text"})

    words: str = "a photo of a"

    @property
    def template(self) -> str:
        """The words, the class name, a period."""
        return f"{self.words} {{}}."

    def task(self, reference: "Reference", embedder: "FeatureSource") -> TowerTask:
        """With the texts of the classes."""
        plain = super().task(reference, embedder)
        encoder = encoder_of(embedder)
        prompts = prompt_tokens(encoder, reference.class_names, word_ids(encoder, self.words))
        return replace(plain, prompts=prompts)


def task_of(
    addon: AddOn, reference: "Reference", embedder: "FeatureSource", crop: float, precision: Precision
) -> TowerTask:
    """The training of an add-on on the few-shot images.

    Raises:
        ConfigError: other edits before it.
    """
    if reference.before:
        raise ConfigError(
            f"{addon.name} learns inside the model as it is, so no other add-on that changes features can stand before "
            "it. Fit it alone, or leave the others out."
        )
    shots, encoder = reference.few_shot, embedder.embedder.encoder
    assert shots is not None and shots.labels is not None
    return TowerTask(
        encoder=encoder,
        source=embedder,
        pixels=LabelledPixels(shots.records, encoder.preprocess, crop, reference.seed),
        labels=shots.labels.to(encoder.device),
        scale=addon.logit_scale,
        reference=reference,
        prompts=None,
        precision=precision,
    )


@contextmanager
def recomputing(encoder: DualEncoder, enable: bool) -> Iterator[None]:
    """Within it activations are computed again in backward, where that is asked for."""
    untyped: Any = encoder
    if enable:
        untyped.set_grad_checkpointing(True)
    try:
        yield
    finally:
        if enable:
            untyped.set_grad_checkpointing(False)
