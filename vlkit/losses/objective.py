"""The objective of a run: a weighted sum of loss terms, each a function of the features of a batch.

objective = Objective({"clip": (1.0, ClipLoss())}, gives=encoder.gives)
output = objective(encoder(batch), batch, step)     # output.total, output.parts["clip"]
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlkit.contracts import Features, ImageTextBatch
from vlkit.errors import ConfigError

# A number, or a function of the step.
Weight = float | Callable[[int], float]


class LossOutput(NamedTuple):
    """What a step reports."""

    total: Tensor  # () the weighted sum, differentiable
    parts: dict[str, Tensor]  # () each term before its weight, detached


class Objective(nn.Module):
    """Weighted sum of terms.

    A term is a module with `needs` (names of what it reads from the features or the batch) and
    `forward(features, batch, step) -> Tensor ()`. Terms with state keep it in buffers, so checkpoints hold it.

    Args:
        terms: name -> (weight, term); a weight may be a function of the step.
        gives: what the encoder and the data provide.

    Raises:
        ConfigError: a term needs what nothing gives; known before training starts.
    """

    def __init__(self, terms: Mapping[str, tuple[Weight, nn.Module]], gives: frozenset[str]) -> None:
        super().__init__()
        if not terms:
            raise ConfigError("The objective has no term: give at least one, e.g. clip = 1.0 under [loss].")
        for name, (_, term) in terms.items():
            lacking = sorted(frozenset(term.needs) - gives)  # type: ignore[arg-type]
            if lacking:
                raise ConfigError(
                    f"Loss {name} needs {', '.join(lacking)}, which neither this model nor the data gives "
                    f"(they give {', '.join(sorted(gives))}). Remove the loss, or take a model or data that does."
                )
        self.terms = nn.ModuleDict({name: term for name, (_, term) in terms.items()})
        self.weights = {name: weight for name, (weight, _) in terms.items()}

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> LossOutput:
        """The weighted sum and its parts for one batch."""
        values: dict[str, Tensor] = {name: term(features, batch, step) for name, term in self.terms.items()}
        total = sum((value * self.weight(name, step) for name, value in values.items()), start=_zero(values))
        return LossOutput(total, {name: value.detach() for name, value in values.items()})

    def begin(self, *, num_samples: int, steps_per_epoch: int, steps: int, device: torch.device) -> None:
        """Tell the terms that keep something for each sample what run this is; before a checkpoint is put in."""
        for term in self.terms.values():
            if hasattr(term, "begin"):
                term.begin(num_samples=num_samples, steps_per_epoch=steps_per_epoch, steps=steps, device=device)  # type: ignore[operator]

    def weight(self, name: str, step: int) -> float:
        """The weight of a term at a step."""
        weight = self.weights[name]
        return weight(step) if callable(weight) else weight


def _zero(values: Mapping[str, Tensor]) -> Tensor:
    return next(iter(values.values())).new_zeros(())
