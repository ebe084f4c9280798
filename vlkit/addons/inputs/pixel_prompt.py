"""EVP: a learned frame of pixels around each image, which is made smaller for it.

    x' = pad_0(x resized to 164 of 224) + M delta            M: 1 on the frame of 30 pixels, 0 inside
    delta <- delta - lr M g / (|g| + 1e-10)                  g: gradient of the loss, |g| one number for all of it

Nothing is drawn over the image itself. Mean and std are applied behind, to frame and image alike.

Source: Wu et al. 2024, "Unleashing the Power of Visual Prompting At the Pixel Level", TMLR, arXiv:2212.10556, and the
authors' code: starts at 0, lr 70 with half a cosine, no momentum, no weight decay, batch 256, 1000 epochs; values are
not kept within [0,1].
Differs: the last epoch is kept, not the best one of the test set. The frame is 30 of 224 pixels of whatever size the
model takes; the image is resized from the model's own square. Images are mirrored in training, cropped where `crop` is
below 1. The class weights are the zero-shot ones of the chosen templates, made once. `confidence` is not theirs, the
default is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import InputEdit, Need, Task, learned
from vlkit.addons.confidence import Confidence, training_scale
from vlkit.addons.prompt_fit import Plan, fit_prompts, parameter
from vlkit.addons.prompted_text import Precision
from vlkit.addons.tower_learning import TowerTask, task_of
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

EPS = 1e-10


@dataclass(frozen=True)
class PixelPrompt(InputEdit):
    """A frame of pixels.

    Attributes:
        frame: width of the frame on each side, as a share of the model's input.
        epochs: passes over the images.
        lr: length of a step over all pixels together; half a cosine to zero.
        batch_size: images a step.
        crop: smallest share of an image that a training crop shows; 1: no crops, mirroring only.
        confidence: multiplier of the cosine in the loss: "model" for its own, "fitted" for the one at which its
            zero-shot answers to the images are as sure as they are right. A step's length does not depend on it, but
            a model that is surer than it is right is led by the images it is most wrong about.
        max_seconds: training comes to its end in this time.
        precision: of the tower while training.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "pixels", "grad_image"})
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})
    # Which classes a frame helps with is in the frame; others can be asked for, as with any prompt.
    any_classes: ClassVar[bool] = True

    frame: float = 30 / 224
    epochs: int = 1000
    lr: float = 70.0
    batch_size: int = 256
    crop: float = 1.0
    confidence: Confidence = "model"
    max_seconds: float | None = None
    precision: Precision = "fp32"
    delta: Tensor | None = learned()  # (3,S,S), 0 inside the frame
    steps: int | None = learned()  # taken in training

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a frame that leaves no room for the image.
        """
        if not 0 < self.frame < 0.5:
            raise ConfigError(f"pixel_prompt: frame is {self.frame:g}; expected a share above 0 and below 0.5.")

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train the frame.

        Raises:
            ConfigError: other edits before it, or training that diverged.
        """
        with torch.inference_mode(False):
            task, shots = task_of(self, reference, embedder, self.crop, self.precision), reference.few_shot
            assert shots is not None and shots.labels is not None
            images = shots.vectors.pooled
            scale = training_scale(self, self.confidence, reference.weights, images, shots.labels)
            task = replace(task, scale=scale)
            size = task.encoder.image_size
            delta = parameter(torch.zeros(3, size, size, device=task.encoder.device))
            mask = self._mask(size).to(delta)
            delta.register_hook(lambda gradient: direction(gradient, mask))
            plan = Plan(
                self.epochs,
                self.lr,
                self.batch_size,
                self.max_seconds,
                momentum=0.0,
                weight_decay=0.0,
                warmup_epochs=0,
            )
            loss = self._objective(task, delta)
            steps = fit_prompts([delta], plan, len(task.labels), loss, task.encoder, reference.seed, progress)
        return replace(self, delta=delta.detach().cpu(), steps=steps)

    def edit_image(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1], made smaller, in their frame.

        Raises:
            ConfigError: images of another size than it was learned for.
        """
        assert self.delta is not None
        if images.shape[-2:] != self.delta.shape[-2:]:
            raise ConfigError(
                f"The frame was learned for images of {self.delta.shape[-1]} pixels; these have {images.shape[-1]}."
            )
        return self._framed(images, self.delta.to(images))

    @property
    def trained(self) -> int | None:
        """Numbers changed by training: those of the frame."""
        return None if self.delta is None else int(3 * self._mask(self.delta.shape[-1]).sum())

    def border(self, size: int) -> int:
        """Width of the frame in pixels."""
        return max(1, round(self.frame * size))

    def _mask(self, size: int) -> Tensor:
        border = self.border(size)
        mask = torch.ones(size, size)
        mask[border : size - border, border : size - border] = 0
        return mask

    def _framed(self, images: Tensor, delta: Tensor) -> Tensor:
        border, size = self.border(images.shape[-1]), images.shape[-1]
        small = F.interpolate(images, (size - 2 * border,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        return F.pad(small, (border,) * 4) + self._mask(size).to(delta) * delta

    def _objective(self, task: TowerTask, delta: Tensor) -> Callable[[Tensor], Tensor]:
        texts = task.texts()

        def loss(rows: Tensor) -> Tensor:
            framed = self._framed(task.images(rows).float() / 255, delta)
            return F.cross_entropy(task.logits(task.encode(framed), texts), task.labels[rows])

        return loss


def direction(gradient: Tensor, mask: Tensor) -> Tensor:
    """(3,S,S) of a step: the gradient with norm 1, and then only the frame's part of it."""
    length: Tensor = gradient.norm() + EPS
    return mask * gradient / length


ADDON = PixelPrompt
