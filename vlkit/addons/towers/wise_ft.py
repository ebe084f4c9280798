"""WiSE-FT: the towers with weights between those of the model and those of the same model after fine-tuning.

    theta = (1 - alpha) theta_0 + alpha theta_1

    vlkit eval classification --model run:runs/base --data photos --addon wise_ft:tuned=run:runs/mine,alpha=0.5

Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903, equation 1; alpha 0.5.
Differs: only the towers are mixed: the scale and bias of the logits stay those of the model, and the paper's classifier
head is the text tower here. `vlkit.models.weight_space.interpolate` makes a whole model that can be saved.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from vlkit.addons.base import Need, TowerEdit, learned
from vlkit.addons.exchange import Kind
from vlkit.contracts import Progress
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.load import load_encoder
from vlkit.models.weight_space import interpolate_weights, require_mixable

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class WiseFt(TowerEdit):
    """Weights between two models.

    Attributes:
        tuned: the fine-tuned model, as for --model.
        alpha: 0 is the model, 1 the fine-tuned one.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"extra_model"})
    towers: ClassVar[frozenset[Kind]] = frozenset({"image", "text"})

    tuned: str = ""
    alpha: float = 0.5
    weights: Tensor | None = learned()  # (number of weights,) of the fine-tuned model, one tensor after the other

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Read the fine-tuned model; its weights are saved with the add-on.

        Raises:
            ConfigError: no model is named.
            ModelError, CheckpointError: it cannot be had, or is of another architecture.
        """
        if not self.tuned:
            raise ConfigError("wise_ft needs the fine-tuned model: --addon wise_ft:tuned=run:FOLDER,alpha=0.5")
        tuned, start = load_encoder(self.tuned), embedder.embedder.encoder
        require_mixable(start, tuned)
        found = tuned.weights()
        return replace(self, weights=torch.cat([found[name].float().flatten() for name in _mixed(start)]))

    @contextmanager
    def edit(self, encoder: DualEncoder) -> Iterator[None]:
        """Within it the encoder has the weights between."""
        assert self.weights is not None
        there = _mixed(encoder)
        before = {name: value.clone() for name, value in there.items()}
        pieces = self.weights.split([value.numel() for value in there.values()])
        tuned = {
            name: piece.view(value.shape).to(value.device, value.dtype)
            for (name, value), piece in zip(there.items(), pieces, strict=True)
        }
        try:
            _set(there, interpolate_weights(before, tuned, self.alpha))
            yield
        finally:
            _set(there, before)


def _mixed(encoder: DualEncoder) -> dict[str, Tensor]:
    """The weights of the towers, in order; the logits' scale and bias, and whole numbers, stay."""
    return {
        name: value
        for name, value in encoder.weights().items()
        if value.is_floating_point() and name not in ("logit_scale", "logit_bias")
    }


def _set(there: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            there[name].copy_(value)


ADDON = WiseFt
