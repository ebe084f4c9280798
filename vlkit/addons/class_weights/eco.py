"""ECO: several short learned contexts whose class vectors are averaged into one, so that use costs nothing.

    W_c = unit( mean over n of unit(g([v_n1 ... v_nM] name_c .)) )        loss: cross-entropy of scale x cos(x, W)

Source: Agnolucci et al. 2023, "ECO: Ensembling Context Optimization for Vision-Language Models", arXiv:2307.14063.
There is no code, and only the abstract and introduction could be had.
Differs: how many contexts, their length, start and averaging are not known from those. Chosen: 4 contexts of 4 vectors,
the budget of one CoOp context of 16; each starts at random from a draw of its own; all are trained together on the
loss of the mean; training as `coop`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.text_prompts import Learned, Loss, PromptTask, TextPrompts, features_of, made_weights
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Eco(TextPrompts):
    """Several contexts, one set of class vectors; see `TextPrompts` for the other settings.

    Attributes:
        contexts: n.
    """

    context: int = 4
    contexts: int = 4

    def start(self, task: PromptTask) -> Learned:
        """(n,M,W)."""
        if self.contexts < 1:
            raise ConfigError(f"eco: contexts is {self.contexts}; at least one is learned.")
        return {"vectors": self.first_vectors(task, sets=self.contexts)}

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """Cross-entropy of the mean's weights."""
        return lambda rows: task.loss(rows, averaged(task.text.features(found["vectors"][:, None])))

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """One vector a name."""
        assert self.vectors is not None
        text = self.prompted(class_names, embedder)
        return made_weights(text, averaged(features_of(text, self.vectors[:, None])))


def averaged(features: Tensor) -> Tensor:
    """Unit features (n,R,D) to (R,D) of unit norm."""
    return F.normalize(features.mean(0), dim=-1)


ADDON = Eco
