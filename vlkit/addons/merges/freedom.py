"""FreeDom: a query image becomes a few words, and each word with the query's text becomes a query.

    proxies = the image and its nearest images in the gallery (num_proxies in all)
    words   = of each proxy the words_each nearest ones; kept are the num_words most frequent,
              weighted by their count over that of the most frequent
    score   = sum over kept words of weight * similarity("{word} {text}")

Source: Efthymiadis et al. 2024, "Composed Image Retrieval for Training-Free Domain Conversion", WACV 2025,
arXiv:2412.03297; released code freedom (20 proxies, 7 words each, 7 kept; words of OpenImages-V7).
Differs: the words are those of a file, or the nouns of the reference's captions. Words that are equally frequent are
ordered by the similarity with which they were found, where the released code keeps the order of its counter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from vlkit.addons.base import Merge, Need, Task, learned
from vlkit.addons.words import caption_nouns
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


class QueryWords(NamedTuple):
    """What query images were turned into."""

    words: list[tuple[str, ...]]  # (Q,) num_words each
    weights: Tensor  # (Q,num_words), the most frequent word's is 1

    def prompts(self, texts: Sequence[str]) -> list[list[str]]:
        """num_words lists of Q prompts: the n-th word of every query with the query's text."""
        count = self.weights.shape[1]
        return [[f"{words[n]} {text}" for words, text in zip(self.words, texts, strict=True)] for n in range(count)]


@dataclass(frozen=True)
class FreeDom(Merge):
    """A weighted sum over the words of a query image.

    Attributes:
        words: file with a word a line; None takes the nouns of at least two reference captions.
        num_proxies, words_each, num_words: see the module.
        vocabulary: learned.
        vectors: learned, (V,D) of the vocabulary.
        weights: of the queries whose scores are merged; see `for_weights`.
    """

    tasks: ClassVar[frozenset[Task]] = frozenset({"retrieval"})
    uses: ClassVar[frozenset[Need]] = frozenset({"captions"})

    words: str | None = None
    num_proxies: int = 20
    words_each: int = 7
    num_words: int = 7
    vocabulary: list[str] | None = learned()
    vectors: Tensor | None = learned()  # (V,D)
    weights: Tensor | None = learned()  # (Q,num_words)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Embed the vocabulary.

        Raises:
            ConfigError: neither words nor captions, or numbers below 1.
            DataError: a vocabulary with fewer words than are kept.
        """
        if min(self.num_proxies, self.words_each, self.num_words) < 1:
            raise ConfigError("freedom: num_proxies, words_each and num_words must be at least 1.")
        if self.words is None and reference.captions is None:
            raise ConfigError("freedom needs words: a file (freedom:words=FILE), or captions to take nouns from.")
        if self.words is not None:
            found = _lines(Path(self.words))
        else:
            assert reference.captions is not None
            found = caption_nouns(reference.captions.texts)
        if len(found) < max(self.num_words, self.words_each):
            raise DataError(f"freedom found {len(found)} words; expected at least {self.num_words}.")
        return replace(self, vocabulary=found, vectors=embedder.embed_texts(found, progress=progress))

    def inverted(self, images: Tensor, gallery: Tensor) -> QueryWords:
        """Words of query images (Q,D), helped by the gallery (N,D); both unit norm."""
        assert self.vocabulary is not None and self.vectors is not None, "freedom is not fitted"
        similarity = images @ gallery.T
        # The released test for "the query is in the gallery already", here for each query by itself.
        inside = similarity.amax(1) >= 0.98
        count = min(self.num_proxies, len(gallery))
        near = gallery[similarity.topk(count, dim=1).indices]
        without = torch.cat([images[:, None], near[:, : count - 1]], dim=1)
        proxies = torch.where(inside[:, None, None], near, without)
        best = (proxies @ self.vectors.T).topk(min(self.words_each, len(self.vocabulary)), dim=-1)
        kept = [self._kept(rows, values) for rows, values in zip(best.indices, best.values, strict=True)]
        # Queries may have found fewer distinct words than are kept; a weight of 0 leaves no trace.
        longest = max(len(weights) for _, weights in kept)
        weights = torch.zeros(len(kept), longest)
        words = []
        for row, (chosen, given) in enumerate(kept):
            weights[row, : len(given)] = torch.tensor(given)
            words.append((*chosen, *[chosen[0]] * (longest - len(chosen))))
        return QueryWords(words, weights)

    def for_weights(self, weights: Tensor) -> Self:
        """The merge of the scores of the prompts of queries with these weights (Q,num_words)."""
        return replace(self, weights=weights)

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """(Q,N) scores of each prompt, in the order of `QueryWords.prompts`, to one (Q,N).

        Raises:
            ConfigError: scores that are not those of the prompts.
        """
        if self.weights is None or len(scores) != self.weights.shape[1] or len(scores[0]) != len(self.weights):
            raise ConfigError(
                "freedom merges the scores of the prompts it made of query images; it is of use in "
                "`vlkit eval composed-retrieval`. Take weicom or arithmetic here."
            )
        return (torch.stack(list(scores), dim=-1) * self.weights[:, None]).sum(-1)

    def _kept(self, rows: Tensor, values: Tensor) -> tuple[list[str], list[float]]:
        assert self.vocabulary is not None
        counts = Counter(rows.flatten().tolist())
        best: dict[int, float] = {}
        for row, value in zip(rows.flatten().tolist(), values.flatten().tolist(), strict=True):
            best[row] = max(value, best.get(row, value))
        order = sorted(counts, key=lambda row: (-counts[row], -best[row], row))[: self.num_words]
        most = counts[order[0]]
        return [self.vocabulary[row] for row in order], [counts[row] / most for row in order]


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the words {file}: {error}.") from error
    return list(dict.fromkeys(line for line in lines if line))


ADDON = FreeDom
