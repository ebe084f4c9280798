"""Class weights from descriptions in a file of the user's own: a language model's, or written by hand.

    descriptors   {"hen": ["two legs", "a red comb"]}      "hen, which has two legs"; a class scores the mean similarity
    sentences     {"hen": ["A hen has feathers.", ...]}    texts as they are; a class is the mean of their vectors

Source: Menon and Vondrick 2023, "Visual Classification via Description from Large Language Models" (DCLIP),
arXiv:2210.07183, and Pratt et al. 2023, "What does a platypus look like? Generating customized prompts for zero-shot
image classification" (CuPL), arXiv:2209.03320, and the code of both.
Differs: no text is made here. "which is" stands before descriptors that begin with an article; the authors' code does
so for every word with an a in front ("antlers" too). A class without texts in the file is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from vlkit.addons.base import ClassWeighting, Need, learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.class_texts import mean_of_features, mean_of_similarities, read_class_texts, texts_of
from vlkit.addons.exchange import ClassWeights
from vlkit.contracts import Progress
from vlkit.models.prompt_templates import load_templates

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

_VERBS = ("has ", "have ", "often ", "typically ", "may ", "can ", "is ", "are ")
_NOUNS = ("a ", "an ", "used ")


@dataclass(frozen=True)
class Descriptions(ClassWeighting):
    """Class weights from a file of descriptions.

    Attributes:
        file: JSON, class name -> list of texts.
        form: whether the texts are descriptors (DCLIP) or sentences (CuPL).
        mean: of "similarities" or of "features"; "auto": as the form's authors do.
        templates: a set's name, a file, or one template, whose prompts join each class's texts; None: none.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"class_names"})

    file: str = ""
    form: Literal["descriptors", "sentences"] = "descriptors"
    mean: Literal["auto", "features", "similarities"] = "auto"
    templates: str | None = None
    texts: dict[str, list[str]] | None = learned()

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Read the file; its texts are saved with the add-on.

        Raises:
            ConfigError: there is no file, or no such templates.
            DataError: the file is no such table, or lacks a class.
        """
        table = read_class_texts(self.file, self.name)
        texts_of(reference.class_names, table, self.file)
        if self.templates is not None:
            load_templates(self.templates)
        return replace(self, texts=table)

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Of each class's texts."""
        prompts = self.prompts(class_names)
        features = self.mean == "features" or (self.mean == "auto" and self.form == "sentences")
        return mean_of_features(embedder, prompts) if features else mean_of_similarities(embedder, prompts)

    def prompts(self, class_names: Sequence[ClassName]) -> list[list[str]]:
        """What is embedded for each class.

        Raises:
            DataError: a class that the file lacked.
        """
        assert self.texts is not None
        templates = () if self.templates is None else load_templates(self.templates)
        found = texts_of(class_names, self.texts, self.file)
        return [
            [described(item.shown, text) if self.form == "descriptors" else text for text in texts]
            + [template.replace("{}", item.shown) for template in templates]
            for item, texts in zip(class_names, found, strict=True)
        ]


def described(name: str, descriptor: str) -> str:
    """`hen` and `two legs` as `hen, which has two legs`."""
    lowered = descriptor.lower()
    if lowered.startswith(_VERBS):
        return f"{name}, which {descriptor}"
    return f"{name}, which {'is' if lowered.startswith(_NOUNS) else 'has'} {descriptor}"


ADDON = Descriptions
