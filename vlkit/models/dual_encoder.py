"""The interface of every image-text model: what training, evaluation and the add-ons may ask of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkit.contracts import CosineScore, Features, ImageTextBatch, PairScore
from vlkit.data.transforms import Preprocess
from vlkit.errors import ModelError
from vlkit.models.tokenizers import TextTokenizer
from vlkit.models.tower import TextTower, VisionTower


class TowerParameters(NamedTuple):
    """How many numbers one tower holds."""

    trainable: int
    total: int


class DualEncoder(nn.Module, ABC):
    """Images and texts into one space of D dimensions.

    Images are uint8, or float in [0,1]; mean and std are applied inside. Features are unit norm unless
    `normalize=False`. What a tower cannot give (see `gives`) raises a ModelError that names the tower.

    Args:
        embed_dim: D.
        image_size: side of the square input in pixels.
        preprocess: how an image of any size becomes that square for evaluation, and the mean and std of its
            channels: the record of the weights.
        tokenize: texts -> tokens (R,T); small and picklable, so it may be handed to worker processes.
        gives: names among image, text, patch_tokens, patches, words, vision_tower, text_tower, logit_bias.
    """

    mean: Tensor
    std: Tensor

    # Further sizes that are taken besides `image_size`, while a run trains on smaller images first.
    stage_sizes: frozenset[int] = frozenset()

    def __init__(
        self,
        *,
        embed_dim: int,
        image_size: int,
        preprocess: Preprocess,
        tokenize: TextTokenizer,
        gives: frozenset[str] = frozenset({"image", "text"}),
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.preprocess = preprocess
        self.tokenize = tokenize
        self.gives = gives
        self.score: PairScore = CosineScore()
        # Not persistent: the weights keep the names and the number of the library they come from.
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)

    @abstractmethod
    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Images (B,3,H,W) -> (B,D)."""

    @abstractmethod
    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Tokens (R,T) -> (R,D). T may be anything up to the context length."""

    @abstractmethod
    def logit_scale(self) -> Tensor:
        """() multiplier of the similarity, already exponentiated."""

    @property
    @abstractmethod
    def logit_bias(self) -> Tensor | None:
        """() added after scaling, or None for a model trained with a softmax loss."""

    @property
    @abstractmethod
    def text_tower(self) -> TextTower:
        """The way into the text tower. Raises ModelError where there is none."""

    @property
    @abstractmethod
    def vision_tower(self) -> VisionTower:
        """The way into the vision tower. Raises ModelError where there is none."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Everything needed to build this encoder again, without its weights, as JSON types."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The state dict under the names of the library the encoder is built on."""

    @property
    def tokenizer_id(self) -> str:
        """Names the vocabulary and cleaning: equal ids give equal token ids."""
        return self.tokenize.tokenizer_id

    @property
    def context_length(self) -> int:
        """The most tokens a text may have, start and end included."""
        return self.tokenize.context_length

    @property
    def training_family(self) -> Literal["softmax", "sigmoid"]:
        """Which probabilities the scores stand for: over the classes, or of each class on its own."""
        return "softmax" if self.logit_bias is None else "sigmoid"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def normalize_pixels(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) uint8, or float in [0,1], to what the vision tower was trained on.

        Raises:
            ModelError: another shape, size or type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ModelError(f"Images have shape {tuple(images.shape)}; expected (B,3,{self.image_size},...), square.")
        if images.shape[2] != self.image_size and images.shape[2] not in self.stage_sizes:
            raise ModelError(
                f"Images are {images.shape[2]} pixels wide, this model takes {self.image_size}. "
                "Apply its `preprocess` first."
            )
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        elif not images.is_floating_point():
            raise ModelError(f"Images are {images.dtype}; expected uint8, or float in [0,1].")
        return (images - self.mean) / self.std

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) -> patches (B,P,W) after the last block and the tower's own norm, not projected."""
        tower = self._dense_vision_tower()
        return tower.patches(tower.through_blocks(images))

    def encode_patches(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Images (B,3,H,W) -> patches (B,P,D) in the joint space, unit norm unless `normalize=False`.

        Raises:
            ModelError: this tower pools in a way that leaves its patches outside the joint space.
        """
        tower = self._dense_vision_tower()
        return self._in_joint_space(tower, tower.through_blocks(images), normalize)

    def encode_words(self, tokens: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens (R,T) -> words (R,T,D) in the joint space, and the mask (R,T) of those that are words."""
        tower = self.text_tower
        words = tower.words(tower.through_blocks(tokens))
        return (F.normalize(words, dim=-1) if normalize else words), tower.word_mask(tokens)

    def forward(self, batch: ImageTextBatch, local: bool = False) -> Features:
        """Features of a batch; with `local` also of its patches and words, from the same pass."""
        if local:
            return self._forward_local(batch)
        return Features(
            image=self.encode_image(batch.images),
            text=self.encode_text(batch.tokens),
            text_to_image=batch.text_to_image,
            logit_scale=self.logit_scale(),
            logit_bias=self.logit_bias,
        )

    def _forward_local(self, batch: ImageTextBatch) -> Features:
        vision, text = self._dense_vision_tower(), self.text_tower
        pixels, words = vision.through_blocks(batch.images), text.through_blocks(batch.tokens)
        return Features(
            image=F.normalize(vision.finish(pixels), dim=-1),
            text=F.normalize(text.finish(words, batch.tokens), dim=-1),
            text_to_image=batch.text_to_image,
            logit_scale=self.logit_scale(),
            logit_bias=self.logit_bias,
            patches=self._in_joint_space(vision, pixels, normalize=True),
            words=F.normalize(text.words(words), dim=-1),
            word_mask=text.word_mask(batch.tokens),
            extra={"patch_tokens": vision.patches(pixels)},
        )

    def _in_joint_space(self, tower: VisionTower, x: Tensor, normalize: bool) -> Tensor:
        if tower.project is None:
            raise ModelError(
                "This vision tower normalises after pooling, so its patches have no place in the joint space. "
                "Use patch_tokens, or a model that normalises before pooling (any CLIP ViT)."
            )
        patches = tower.project(tower.patches(x))
        return F.normalize(patches, dim=-1) if normalize else patches

    def _dense_vision_tower(self) -> VisionTower:
        tower = self.vision_tower
        # A tower that is frozen stays in eval mode while the rest trains, and drops nothing.
        if self.training and tower.blocks[0].module.training and getattr(self, "drops_patches", False):
            raise ModelError("Patch dropout is on: the remaining patches have no fixed place. Call eval() first.")
        return tower


# transformers keeps each tower's projection beside it.
_TOWER_OF = {"visual": "image", "vision_model": "image", "visual_projection": "image"} | dict.fromkeys(
    ("text_model", "text_projection"), "text"
)


def parameters_per_tower(encoder: nn.Module) -> Mapping[str, TowerParameters]:
    """Trainable and total parameters of each tower, "image" and "text" first, the rest by name."""
    counts: dict[str, TowerParameters] = {"image": TowerParameters(0, 0), "text": TowerParameters(0, 0)}
    for name, parameter in encoder.named_parameters():
        top = name.removeprefix("model.").split(".")[0]
        tower = _TOWER_OF.get(top, top)
        old = counts.get(tower, TowerParameters(0, 0))
        new = parameter.numel()
        counts[tower] = TowerParameters(old.trainable + new * parameter.requires_grad, old.total + new)
    return counts
