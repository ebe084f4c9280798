"""What all learners of text prompts share: settings, the words they start from, training on cached features.

A learner is a `TextPrompts` with, where it differs, its own `start` (what is learned), `objective` (the loss) and
`examples` (which images with which labels). Learned tensors go by the names of the learner's fields.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import ClassWeighting, Need, Weights, learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.confidence import Confidence, beside, training_scale
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.prompt_fit import RANDOM_STD, Plan, epochs_of, fit_prompts, frozen, parameter
from vlkit.addons.prompted_text import Position, Precision, PromptedText, encoder_of, prompt_tokens, word_ids
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

Learned = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]


class Examples(NamedTuple):
    """What is trained on."""

    vectors: Vectors  # n images
    labels: Tensor  # (n,)


@dataclass(frozen=True)
class PromptTask:
    """One training, with everything on the model's device.

    Attributes:
        text: prompts of the classes.
        images: (n,D) unit norm.
        labels: (n,).
        vectors: the same images with what was asked for besides.
        scale: multiplier of the cosine in the loss.
        seed: of draws.
        class_names: (C,).
        source: embeds texts.
    """

    text: PromptedText
    images: Tensor
    labels: Tensor
    vectors: Vectors
    scale: float
    seed: int
    class_names: tuple[ClassName, ...]
    source: "FeatureSource"

    def loss(self, rows: Tensor, features: Tensor) -> Tensor:
        """Cross-entropy () of some images with text features (R,D)."""
        return F.cross_entropy(self.scale * self.text.scores(self.images[rows], features), self.labels[rows])

    def from_paper(self, weight: float) -> float:
        """A paper's weight of a term beside cross-entropy of 100 x cosine, for the multiplier of this training."""
        return beside(weight, self.scale)

    def template_features(self, template: str) -> Tensor:
        """(R,D) features of the names in a template.

        Raises:
            ConfigError: a template without its one `{}`.
        """
        if template.count("{}") != 1:
            raise ConfigError(f"Template {template!r} needs one {{}} for the class name.")
        names = [name for item in self.class_names for name in item.names]
        found = self.source.embed_texts([template.replace("{}", name) for name in names])
        return found.to(self.images.device)


@dataclass(frozen=True)
class TextPrompts(ClassWeighting):
    """A learner of the words around class names.

    Attributes:
        context: M, learned vectors in a prompt; where `words` are given, as many as these have tokens.
        words: what they start from; empty starts at random.
        position: of the class name.
        epochs: passes over the images; None is CoOp's 50, 100 or 200 by images a class.
        lr: learning rate.
        optimizer: sgd, with momentum; or adamw, whose steps are of one length whatever the multiplier of the cosine.
        batch_size: images a step.
        confidence: multiplier of the cosine in the loss: "model" for its own, "fitted" for the one at which its
            zero-shot answers to the images are as sure as they are right.
        max_seconds: training comes to its end in this time.
        precision: of the text tower while training.
        checkpointing: trade time for memory.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "grad_text"})

    context: int = 16
    words: str = ""
    position: Position = "end"
    epochs: int | None = None
    lr: float = 0.002
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch_size: int = 32
    confidence: Confidence = "model"
    max_seconds: float | None = None
    precision: Precision = "fp32"
    checkpointing: bool = False
    vectors: Tensor | None = learned()  # (M,W)
    scale: float | None = learned()  # multiplier of the cosine in training
    steps: int | None = learned()  # taken in training
    trained: int | None = learned()  # numbers changed by it

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train.

        Raises:
            ConfigError: names too long for the context, another kind of tokenizer, or training that diverged.
        """
        examples = self.examples(reference)
        with torch.inference_mode(False):
            task = self.task(reference, embedder, examples)
            with frozen(task.text.encoder):
                found = {name: parameter(start) for name, start in self.start(task).items()}
                loss = self.objective(task, found)
            steps = fit_prompts(
                list(found.values()),
                self.plan(examples, len(reference.class_names)),
                len(examples.labels),
                loss,
                task.text.encoder,
                reference.seed,
                progress,
            )
        kept = set(found) & self.learned_names()
        values = {name: found[name].detach().cpu() for name in kept}
        trained = sum(one.numel() for one in found.values())
        return replace(self, **values, scale=task.scale, steps=steps, trained=trained)  # type: ignore[arg-type]

    @classmethod
    def learned_names(cls) -> set[str]:
        """Fields that training fills; what else is trained is left behind."""
        return {one.name for one in fields(cls) if one.metadata.get("learned")}

    def examples(self, reference: "Reference") -> Examples:
        """The images to train on."""
        shots = reference.few_shot
        assert shots is not None and shots.labels is not None
        return Examples(shots.vectors, shots.labels)

    def task(self, reference: "Reference", embedder: "FeatureSource", examples: Examples) -> PromptTask:
        """The training on these images.

        Raises:
            ConfigError: `confidence` fitted to images without labels.
        """
        text = self.prompted(reference.class_names, embedder)
        text = replace(text, precision=self.precision, checkpointing=self.checkpointing)
        device, images = text.encoder.device, F.normalize(examples.vectors.pooled, dim=-1)
        return PromptTask(
            text=text,
            images=images.to(device).clone(),
            labels=examples.labels.to(device),
            vectors=examples.vectors,
            scale=training_scale(self, self.confidence, reference.weights, images, examples.labels),
            seed=reference.seed,
            class_names=reference.class_names,
            source=embedder,
        )

    def plan(self, examples: Examples, num_classes: int) -> Plan:
        """How long and how fast."""
        epochs = epochs_of(round(len(examples.labels) / num_classes)) if self.epochs is None else self.epochs
        return Plan(epochs, self.lr, self.batch_size, self.max_seconds, optimizer=self.optimizer)

    def prompted(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> PromptedText:
        """The prompts of some classes, not yet with what was learned."""
        encoder = encoder_of(embedder)
        if not self.words and self.context < 1:
            raise ConfigError(f"{self.name}: context is {self.context}; at least one vector is learned.")
        ids = word_ids(encoder, self.words) if self.words else word_ids(encoder, "x") * self.context
        return PromptedText(encoder, prompt_tokens(encoder, class_names, ids, self.position))

    def start(self, task: PromptTask) -> Learned:
        """What is learned, before training, by the name of its field."""
        return {"vectors": self.first_vectors(task)[0]}

    def first_vectors(self, task: PromptTask, sets: int = 1) -> Tensor:
        """(sets,M,W): the words', or at random where there are none."""
        words = task.text.words[0].float()
        if self.words:
            return words.expand(sets, -1, -1)
        random = torch.Generator().manual_seed(task.seed)
        return RANDOM_STD * torch.randn(sets, *words.shape, generator=random).to(words)

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """The loss of some rows: cross-entropy."""
        return lambda rows: task.loss(rows, task.text.features(found["vectors"]))

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> Weights:
        """Of the prompts with what was learned."""
        assert self.vectors is not None
        text = self.prompted(class_names, embedder)
        return made_weights(text, features_of(text, self.vectors))


def features_of(text: PromptedText, context: Tensor) -> Tensor:
    """(...,R,D) on the CPU, without gradients; see `PromptedText.features`."""
    with torch.no_grad(), frozen(text.encoder):
        return text.features(context.to(text.words.device)).cpu()


def made_weights(text: PromptedText, features: Tensor) -> ClassWeights:
    """Finished features (R,D) as class weights on the CPU."""
    return ClassWeights(features.cpu(), text.prompts.class_of.cpu())
