"""Triplets for conditional similarity, mined from captions: a reference, a condition in words, and what it asks for.

    facts = read_facts(records)                          # (image, subject, relation, object)
    triplets = mine_triplets(facts, num_triplets=20_000)
    triplets.conditions[triplets.condition[0]]           # "on beach": what the target shows, and the reference does not

"A dog on a sofa" and "A dog on the beach" share the subject, so the first image under "on beach" asks for the second.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlkit.addons.words import noun_spans
from vlkit.data.randomness import generator
from vlkit.data.records import Record
from vlkit.data.sources.annotated import read_lines
from vlkit.errors import ConfigError, DataError

MIN_IMAGES = 5  # with a subject
CONCRETENESS = 4.8  # of 1 to 5
_UNKNOWN = -1.0
_ARTICLES = re.compile(r"\b(?:a|an|the|his|her|their|its|some|one|two|three|four|five|several|many|another)\b")
# Draws before a triplet that is concrete enough is given up.
_MOST_TRIES = 1000


class Fact(NamedTuple):
    """What one caption says of one of its things."""

    image: int  # row of the records
    subject: str
    relation: str
    object: str

    @property
    def condition(self) -> str:
        """As a query says it."""
        return f"{self.relation} {self.object}".strip()


@dataclass(frozen=True)
class Triplets:
    """T mined triplets.

    Attributes:
        reference, target, distractor: (T,) rows of the records. The distractor shows the target's object, whatever its
            subject: words alone cannot tell it from the target.
        condition: (T,) rows of `conditions`.
        conditions: the texts, each once.
    """

    reference: Tensor
    target: Tensor
    distractor: Tensor
    condition: Tensor
    conditions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.reference)

    def at(self, rows: Tensor) -> "Triplets":
        """Some of them."""
        return Triplets(
            self.reference[rows], self.target[rows], self.distractor[rows], self.condition[rows], self.conditions
        )

    def among(self, rows: Sequence[int]) -> "Triplets":
        """Those whose images are all left, their rows counted anew.

        Args:
            rows: (N,) new row of each record, -1 where it is gone.
        """
        new = torch.tensor(rows)
        columns = [new[column] for column in (self.reference, self.target, self.distractor)]
        kept = (torch.stack(columns) >= 0).all(0)
        reference, target, distractor = (column[kept] for column in columns)
        return Triplets(reference, target, distractor, self.condition[kept], self.conditions)


def facts_of(caption: str, image: int = 0) -> list[Fact]:
    """The first noun of a caption is its subject, each later one an object; the words before an object relate them.

    Differs: the released code takes (subject, relation, object) from a parser of scene graphs; here nouns are found by
    `vlkit.addons.words`, and a relation is what stands between an object and the noun before it, without articles.
    """
    nouns = noun_spans(caption)
    found = []
    for before, (word, start, _) in pairwise(nouns):
        if word != nouns[0][0]:
            between = _ARTICLES.sub(" ", caption[before[2] : start].lower())
            relation = " ".join(re.findall(r"[a-z]+", between))
            found.append(Fact(image, nouns[0][0], relation, word))
    return found


def read_facts(records: Sequence[Record]) -> list[Fact]:
    """The facts of all captions.

    Raises:
        DataError: the captions relate no two things.
    """
    found = [fact for row, record in enumerate(records) for text in record.captions for fact in facts_of(text, row)]
    if not found:
        raise DataError(f"No caption of {len(records)} images relates two things; triplets come from captions.")
    return found


def mine_triplets(
    facts: Sequence[Fact],
    num_triplets: int,
    concreteness: Mapping[str, float] | None = None,
    threshold: float = CONCRETENESS,
    min_images: int = MIN_IMAGES,
    seed: int = 0,
) -> Triplets:
    """Draw triplets; the same ones may come twice.

    A subject is drawn in proportion to its images, then one of its facts, then another of its objects and a fact with
    that one. Reference and target share the subject and differ in object and image.

    Args:
        facts: of the captions.
        num_triplets: T.
        concreteness: of words, 1 to 5, see `read_concreteness`; None takes every triplet.
        threshold: the mean over subjects and objects of the three images has to lie above it.
        min_images: that show a subject.
        seed: of the draws.

    Raises:
        ConfigError: no triplet asked for.
        DataError: no subject has enough images and two objects, or none is concrete enough.

    Source: Vaze et al. 2023, "GeneCIS", arXiv:2306.07969, section 4; released code, datasets/cc_3m_dataset.py.
    Differs: a subject whose objects all lie in one image, of which the released code takes the reference for the
    target after 100 draws, is left out. Concreteness is off without a list of words; the paper's is Brysbaert's.
    """
    if num_triplets < 1:
        raise ConfigError(f"{num_triplets} triplets asked for; expected 1 or more.")
    of_subject: dict[str, dict[str, list[Fact]]] = {}
    of_object: dict[str, list[Fact]] = {}
    for fact in facts:
        of_subject.setdefault(fact.subject, {}).setdefault(fact.object, []).append(fact)
        of_object.setdefault(fact.object, []).append(fact)
    weights = {}
    for subject, objects in of_subject.items():
        images = {fact.image for own in objects.values() for fact in own}
        if len(images) >= min_images and len(objects) >= 2:
            weights[subject] = len(images)
    if not weights:
        raise DataError(
            f"None of {len(of_subject)} subjects is seen in {min_images} images with two objects; give more captions."
        )
    names, share = list(weights), np.array(list(weights.values()), np.float64)
    share /= share.sum()
    drawn: list[tuple[Fact, Fact, Fact]] = []
    draw = generator(seed, 0, 0, "caption triplets")
    tries = 0
    while len(drawn) < num_triplets:
        found = _draw(of_subject[names[draw.choice(len(names), p=share)]], of_object, draw)
        if found is not None and (concreteness is None or _mean(found, concreteness) > threshold):
            drawn.append(found)
            tries = 0
            continue
        tries += 1
        if tries == _MOST_TRIES:
            raise DataError(
                f"{tries} draws in a row gave no triplet"
                + ("" if concreteness is None else f" of concreteness above {threshold:g}")
                + ". Give more captions, or lower the threshold."
            )
    return _as_triplets(drawn)


def read_concreteness(file: str | Path) -> dict[str, float]:
    """A list of words with how concrete they are: `word<TAB>score`, or Brysbaert's table (`Word`, ..., `Conc.M`, ...).

    Raises:
        DataError: it cannot be read, or has no score.
    """
    found: dict[str, float] = {}
    column = 1
    for number, line in enumerate(read_lines(Path(file))):
        cells = line.split("\t")
        if number == 0 and "Conc.M" in cells:
            column = cells.index("Conc.M")
            continue
        try:
            found[cells[0].lower()] = float(cells[column])
        except (IndexError, ValueError) as error:
            raise DataError(f"{file}, line {number + 1}: expected `word<TAB>score`, found {line[:60]!r}.") from error
    if not found:
        raise DataError(f"{file} holds no word.")
    return found


def _draw(
    objects: Mapping[str, list[Fact]], of_object: Mapping[str, list[Fact]], draw: np.random.Generator
) -> tuple[Fact, Fact, Fact] | None:
    """Reference, target and distractor of one subject."""
    own = [fact for facts in objects.values() for fact in facts]
    reference = own[draw.integers(len(own))]
    names = [name for name in objects if name != reference.object]
    name = names[draw.integers(len(names))]
    target = objects[name][draw.integers(len(objects[name]))]
    distractor = of_object[name][draw.integers(len(of_object[name]))]
    return None if target.image == reference.image else (reference, target, distractor)


def _mean(facts: Sequence[Fact], concreteness: Mapping[str, float]) -> float:
    words = [word for fact in facts for word in (fact.subject, fact.object)]
    return sum(concreteness.get(word, _UNKNOWN) for word in words) / len(words)


def _as_triplets(drawn: Sequence[tuple[Fact, Fact, Fact]]) -> Triplets:
    place: dict[str, int] = {}
    condition = [place.setdefault(target.condition, len(place)) for _, target, _ in drawn]
    reference, target, distractor = (torch.tensor([facts[side].image for facts in drawn]) for side in range(3))
    return Triplets(reference, target, distractor, torch.tensor(condition), tuple(place))
