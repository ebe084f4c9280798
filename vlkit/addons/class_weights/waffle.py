"""WaffleCLIP: descriptions without meaning, the control for every method that describes classes.

    "A photo of a {class}, which has {junk}."       a class scores the mean similarity over all junk

Half of the junk is random words, half random characters, the same for all classes. A description file that does not
beat this has not shown that its words count.

Source: Roth et al. 2023, "Waffling around for Performance: Visual Classification with Random Words and Broad Concepts",
arXiv:2306.07282, and the authors' code: 15 pairs; words and characters as many and as long as in the class names.
Differs: the authors' list of words and the characters of their descriptors are not at hand; ours are everyday English
words (or a file of the user's) and the letters a to z. The mean over 7 repetitions in the paper's tables is a mean of
accuracies: run it with seeds 0 to 6.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, ClassVar, Self

from vlkit.addons.base import ClassWeighting, Need, learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.class_texts import mean_of_similarities
from vlkit.addons.class_weights.descriptions import described
from vlkit.addons.exchange import ClassWeights
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

_EVERYDAY = """
about above across after again almost along already always among another answer around because become before
began behind being below better between both bring build carry cause change clear close common complete could
course cover decide different during each early earth easy either enough even every example explain fall fast
feel fill final find follow force form friend front full general give govern great group grow half happen hard
heard help hold hour hundred idea inch interest just keep kind knew know language large last late laugh lead
learn leave less letter life listen little live long machine main many mark mean measure might mind minute money
month more morning most move much multiply name near need never next night north note notice number object often
once only open order other over own page part pass pattern people perhaps piece place plain plan point possible
pound power press problem produce product question quick reach ready real reason record remember rest right
round rule same school second seem sentence serve several shape short should show simple since slow small some
sound south special spell stand start state stay step still stood strong study such sudden sure system tail take
talk teach tell test than thing think though thought thousand through time together told took top toward travel
true turn under unit until upon usual verb very voice vowel wait want warm watch week weigh west what where
which while whole will wind word work world would write wrong year
"""
WORDS = tuple(_EVERYDAY.split())


@dataclass(frozen=True)
class Waffle(ClassWeighting):
    """Random descriptions.

    Attributes:
        pairs: of random words and random characters; 0 leaves the bare prompt.
        concept: what all classes are ("food"): "A photo of a food: a {class}, ..."; None: none.
        words: a file with one word a line; None: a list of everyday words.
        seed: of the junk; None: the reference's.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"class_names"})

    pairs: int = 15
    concept: str | None = None
    words: str | None = None
    seed: int | None = None
    junk: list[str] | None = learned()

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Draw the junk.

        Raises:
            ConfigError: fewer than no pairs, or a file without words.
        """
        if self.pairs < 0:
            raise ConfigError(f"waffle has pairs = {self.pairs}; expected 0 or more.")
        seed = reference.seed if self.seed is None else self.seed
        names = [item.shown.replace("_", " ") for item in reference.class_names]
        return replace(self, seed=seed, junk=draw_junk(names, self.pairs, self._words(), seed))

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Of the junk prompts."""
        return mean_of_similarities(embedder, self.prompts(class_names))

    def prompts(self, class_names: Sequence[ClassName]) -> list[list[str]]:
        """What is embedded for each class."""
        assert self.junk is not None
        before = "A photo of a " if self.concept is None else f"A photo of a {self.concept}: a "
        names = [item.shown.replace("_", " ") for item in class_names]
        if not self.junk:
            return [[f"{before}{name}."] for name in names]
        return [[f"{before}{described(name, junk)}." for junk in self.junk] for name in names]

    def _words(self) -> Sequence[str]:
        if self.words is None:
            return WORDS
        try:
            found = [line.strip() for line in Path(self.words).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"waffle cannot read the words in {self.words}: {error}.") from error
        if not found:
            raise ConfigError(f"There is no word in {self.words}; write one a line.")
        return found


def draw_junk(names: Sequence[str], pairs: int, words: Sequence[str], seed: int) -> list[str]:
    """2 x pairs texts, words and characters in turn, as many and as long as in the names of the classes."""
    source = random.Random(seed)
    num_words = max(1, round(mean(len(name.split()) for name in names)))
    word_length = max(1, round(mean(len(word) for name in names for word in name.split())))
    longest = round(mean(max(len(word) for word in name.split()) for name in names))
    junk = []
    for _ in range(pairs):
        junk.append(" ".join(source.choice(words)[:word_length] for _ in range(num_words)))
        groups = [
            "".join(source.choices(string.ascii_lowercase, k=max(1, longest // num_words))) for _ in range(num_words)
        ]
        junk.append(", ".join(groups))
    return junk


ADDON = Waffle
