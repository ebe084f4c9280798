"""CLIP-LoRA: low-rank updates of the queries, keys and values of both towers, learned from few labelled images.

    W + B A / sqrt(rank)        rank 2 beside each q, k, v of each layer; everything else stays

    merged_encoder(addon, encoder)      # a plain model for `save_encoder`: inference is free

Source: Zanella and Ben Ayed 2024, "Low-Rank Few-Shot Adaptation of Vision-Language Models", arXiv:2405.18541, and the
authors' code: rank 2, AdamW 2e-4, weight decay 0.01, batch 32, 500 steps for each shot, cosine, last values.
Differs: no dropout (0.25) on what enters A, because the update is part of the weight (`models/lora.py`); the cosine
ends at 0, not at 1e-6. The template's words stay "a photo of a" for every data set.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from vlkit.addons.base import learned
from vlkit.addons.prompt_fit import Plan
from vlkit.addons.tower_learning import Learned, TowerTask, WordedLearner
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.lora import Target, add_lora, remove_lora

_TARGETS: tuple[Target, ...] = ("q", "k", "v", "o", "mlp")


@dataclass(frozen=True)
class ClipLora(WordedLearner):
    """Low-rank updates in both towers.

    Attributes:
        rank: of each update.
        targets: matrices that get one: some of q, k, v, o, mlp, joined by +.
        strength: the update is strength / sqrt(rank) B A.
        steps_per_shot: of training, where `epochs` is 0.
    """

    epochs: int = 0
    lr: float = 2e-4
    rank: int = 2
    targets: str = "q+k+v"
    strength: float = 1.0
    steps_per_shot: int = 500
    update: Tensor | None = learned()  # (N,) all A and B, in the order of the encoder's modules

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: an unknown matrix, a rank below 1, no strength.
        """
        unknown = [name for name in self.targets.split("+") if name not in _TARGETS]
        if unknown or self.rank < 1 or self.strength <= 0:
            raise ConfigError(
                f"clip_lora: rank {self.rank}, strength {self.strength:g}, targets {self.targets!r}; expected a rank "
                f"of at least 1, a strength above 0 and some of {', '.join(_TARGETS)}, joined by +."
            )

    def start(self, task: TowerTask) -> Learned:
        """All A at random, all B zero."""
        with self._updates(task.encoder, task.reference.seed) as updates:
            return {"update": parameters_to_vector(updates).detach()}

    @contextmanager
    def acting(self, encoder: DualEncoder, found: Learned) -> Iterator[None]:
        """The updates beside their matrices."""
        with self._updates(encoder) as updates:
            fill(updates, found["update"])
            yield

    @contextmanager
    def training(self, task: TowerTask) -> Iterator[Learned]:
        """The updates' own parameters, in place of one vector."""
        start = self.start(task)["update"]
        with self._updates(task.encoder) as updates:
            fill(updates, start)
            yield {str(place): one for place, one in enumerate(updates)}

    def kept(self, found: Learned) -> Learned:
        """All of them as one vector."""
        return {"update": parameters_to_vector(list(found.values()))}

    def plan(self, task: TowerTask) -> Plan:
        """So many steps for each shot, in whole epochs."""
        epochs, images = self.epochs, len(task.labels)
        if not epochs:
            steps = self.steps_per_shot * images / len(task.reference.class_names)
            epochs = max(1, round(steps * self.batch_size / images))
        return Plan(
            epochs,
            self.lr,
            self.batch_size,
            self.max_seconds,
            optimizer="adamw",
            weight_decay=0.01,
            warmup_epochs=0,
        )

    def added(self, encoder: DualEncoder, seed: int = 0) -> list[nn.Parameter]:
        """Fresh updates beside an encoder's matrices, all of which are frozen."""
        targets = [target for target in _TARGETS if target in self.targets.split("+")]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return add_lora(encoder, rank=self.rank, alpha=self.strength * self.rank**0.5, targets=targets)

    @contextmanager
    def _updates(self, encoder: DualEncoder, seed: int = 0) -> Iterator[list[nn.Parameter]]:
        """Fresh updates beside the matrices; afterwards the encoder is what it was."""
        wanted = [one for one in encoder.parameters() if one.requires_grad]
        updates = self.added(encoder, seed)
        try:
            yield updates
        finally:
            remove_lora(encoder, merge=False)
            for one in wanted:
                one.requires_grad_(True)


def fill(updates: Sequence[nn.Parameter], values: Tensor) -> None:
    """Put a vector's numbers into parameters.

    Raises:
        ConfigError: another number of them.
    """
    count = sum(one.numel() for one in updates)
    if count != values.numel():
        raise ConfigError(
            f"Updates of {values.numel()} numbers do not fit this model, which has room for {count}. Fit them for it."
        )
    vector_to_parameters(values.detach().to(updates[0]).clone(), updates)


def merged_encoder(addon: ClipLora, encoder: DualEncoder) -> DualEncoder:
    """A plain model with the updates added to its matrices, for `save_encoder`; the one given stays as it is."""
    assert addon.update is not None
    merged = copy.deepcopy(encoder)
    fill(addon.added(merged), addon.update)
    remove_lora(merged, merge=True)
    return merged


ADDON = ClipLora
