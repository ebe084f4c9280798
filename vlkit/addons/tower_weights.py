"""Methods that train all weights of both towers: what they start from, how these act, how they are put back.

A method is a `WeightLearner` with its own loss. While it trains, the model holds copies; what is learned is one vector.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from vlkit.addons.base import learned
from vlkit.addons.tower_learning import Learned, TowerTask, WordedLearner
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class WeightLearner(WordedLearner):
    """Both towers fine-tuned; see `TowerLearner` for the settings. The scale and bias of the logits stay."""

    weights: Tensor | None = learned()  # (N,) of both towers, one tensor after the other

    def start(self, task: TowerTask) -> Learned:
        """The model's own weights."""
        return {"weights": parameters_to_vector(tower_weights(task.encoder)).detach()}

    @contextmanager
    def acting(self, encoder: DualEncoder, found: Learned) -> Iterator[None]:
        """Other weights."""
        weights, values = tower_weights(encoder), found["weights"]
        sizes = [one.numel() for one in weights]
        if values.numel() != sum(sizes):
            raise ConfigError(
                f"{self.name}: {values.numel()} weights do not fit this model of {sum(sizes)}. Fit them for it."
            )
        given = [one.data for one in weights]
        try:
            for one, part in zip(weights, values.split(sizes), strict=True):
                one.data = part.view_as(one).to(one)
            yield
        finally:
            _put_back(weights, given)

    @contextmanager
    def training(self, task: TowerTask) -> Iterator[Learned]:
        """The model's own weights, copied for the time being."""
        weights = tower_weights(task.encoder)
        given, wanted = [one.data for one in weights], [one.requires_grad for one in weights]
        try:
            for one in weights:
                one.data = one.data.clone()
                one.requires_grad_(True)
            yield {str(place): one for place, one in enumerate(weights)}
        finally:
            _put_back(weights, given)
            for one, before in zip(weights, wanted, strict=True):
                one.grad = None
                one.requires_grad_(before)

    def kept(self, found: Learned) -> Learned:
        """All weights as one vector."""
        return {"weights": parameters_to_vector(list(found.values()))}


def tower_weights(encoder: DualEncoder) -> list[nn.Parameter]:
    """All parameters but the scale and bias of the logits, by name: their own order may differ between two runs."""
    named = sorted(encoder.named_parameters(), key=lambda pair: pair[0])
    return [one for name, one in named if name.rpartition(".")[2] not in ("logit_scale", "logit_bias")]


def _put_back(weights: list[nn.Parameter], given: list[Tensor]) -> None:
    for one, data in zip(weights, given, strict=True):
        one.data = data
