"""Learning to Name Classes: the words of the template stay, the names themselves are learned.

    prompt_c = template with e_c in place of the name's tokens      loss: cross-entropy of scale x cos(x, W)

Classes that were not learned keep their ordinary names, so both kinds stand side by side in one classifier, and
classes can be learned one after the other.

Source: Parisot, Yang and McDonagh 2023, "Learning to Name Classes for Vision and Language Models", arXiv:2304.01830.
There is no code.
Differs: the number of vectors of a name, their start and the learning rate are not known from abstract and summary.
Chosen: as many vectors as the name has tokens, from these tokens' own, or one, from their mean (`single`); SGD 0.002
without weight decay, otherwise as `coop`; optionally a pull lambda |e_c - e_c(0)|^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.prompt_fit import Plan
from vlkit.addons.prompted_text import PromptedText, Prompts, encoder_of, require_room, word_ids
from vlkit.addons.text_prompts import Examples, Learned, Loss, PromptTask, TextPrompts, features_of, made_weights
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource
    from vlkit.models.dual_encoder import DualEncoder


class _Named(NamedTuple):
    """Prompts whose names are replaced."""

    prompts: Prompts  # places beyond a name's own stand on the start token
    own: Tensor  # (R,M) bool: places of the name


@dataclass(frozen=True)
class LearningToName(TextPrompts):
    """Learned names; see `TextPrompts` for the other settings; `context`, `words` and `position` say nothing here.

    Attributes:
        template: one text with `{}`.
        single: one vector for each name.
        pull: lambda.
    """

    template: str = "a photo of a {}."
    single: bool = False
    pull: float = 0.0
    names: tuple[str, ...] | None = learned()  # the R names learned

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train.

        Raises:
            ConfigError: a template without its `{}`, a negative pull, or what `TextPrompts.learn` refuses.
        """
        if self.template.count("{}") != 1 or self.pull < 0:
            raise ConfigError(
                f"learning_to_name: template {self.template!r} (with one {{}}), pull {self.pull} (from 0)."
            )
        names = tuple(name for item in reference.class_names for name in item.names)
        return super(LearningToName, replace(self, names=names)).learn(reference, embedder, progress)

    def plan(self, examples: Examples, num_classes: int) -> Plan:
        """CoOp's without weight decay, which would pull names to nothing."""
        return replace(super().plan(examples, num_classes), weight_decay=0.0)

    def prompted(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> PromptedText:
        """The template with every name."""
        encoder = encoder_of(embedder)
        return PromptedText(encoder, self._named(encoder, class_names).prompts)

    def start(self, task: PromptTask) -> Learned:
        """(R,M,W): the tokens' own vectors, or their mean."""
        if not self.single:
            return {"vectors": task.text.words.float()}
        tower, encoder = task.text.encoder.text_tower, task.text.encoder
        names = [name for item in task.class_names for name in item.names]
        means = [
            tower.token_vectors(torch.tensor(word_ids(encoder, name), device=encoder.device)).float().mean(0)
            for name in names
        ]
        return {"vectors": torch.stack(means)[:, None]}

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """Cross-entropy, and the pull."""
        own = self._named(task.text.encoder, task.class_names).own.to(task.images.device)[..., None]
        first = found["vectors"].detach().clone()

        def loss(rows: Tensor) -> Tensor:
            context = torch.where(own, found["vectors"], task.text.words)
            apart = ((found["vectors"] - first) ** 2 * own).sum()
            return task.loss(rows, task.text.features(context)) + self.pull * apart

        return loss

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Learned names where there are, ordinary ones elsewhere."""
        assert self.vectors is not None and self.names is not None
        text = self.prompted(class_names, embedder)
        context, row_of = text.words.cpu().float().clone(), {name: row for row, name in enumerate(self.names)}
        own = self._named(text.encoder, class_names).own
        for row, name in enumerate(name for item in class_names for name in item.names):
            if name in row_of:
                count = int(own[row].sum())
                context[row, :count] = self.vectors[row_of[name], :count]
        return made_weights(text, features_of(text, context))

    def _named(self, encoder: "DualEncoder", class_names: Sequence[ClassName]) -> _Named:
        before, after = self.template.split("{}")
        names = [name for item in class_names for name in item.names]
        start, *left, end = encoder.tokenize.encode_whole([before])[0]
        whole = encoder.tokenize.encode_whole([name + after for name in names])
        rows, counts = [], []
        for name, closed in zip(names, whole, strict=True):
            count = len(word_ids(encoder, name))
            ids = closed[1:-1]
            if self.single and name in (self.names or ()):
                ids, count = [ids[0], *ids[count:]], 1
            rows.append([start, *left, *ids, end])
            counts.append(count)
        require_room(names, rows, 0, encoder.context_length)
        own = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        places = torch.where(own, 1 + len(left) + torch.arange(max(counts)), 0)
        class_of = torch.tensor([place for place, item in enumerate(class_names) for _ in item.names])
        return _Named(Prompts(encoder.tokenize.pad(rows), places, class_of), own)


ADDON = LearningToName
