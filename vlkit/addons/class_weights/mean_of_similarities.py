"""A template ensemble by scores: a class scores the mean of its prompts' similarities.

    s_c(x) = mean_t x . t_c,t        beside `templates`: x . unit(mean_t t_c,t)

Both differ by one factor a class, the length of its mean vector: `templates` lifts classes whose prompts lie far apart.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020,
section 3.1.4 ensembles features; scores are averaged in Menon and Vondrick 2023, "Visual Classification via Description
from Large Language Models", arXiv:2210.07183.
Differs: a class's synonyms count as further prompts, where `templates` takes the best of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlkit.addons.class_names import ClassName
from vlkit.addons.class_texts import mean_of_similarities
from vlkit.addons.class_weights.templates import TemplateWeighting
from vlkit.addons.exchange import ClassWeights
from vlkit.models.prompt_templates import load_templates

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class MeanOfSimilarities(TemplateWeighting):
    """The mean of the prompts' similarities."""

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """A vector for each prompt."""
        templates = load_templates(self.templates)
        prompts = [[t.replace("{}", name) for name in item.names for t in templates] for item in class_names]
        return mean_of_similarities(embedder, prompts)


ADDON = MeanOfSimilarities
