"""Active prompt learning: which images to ask labels for, round by round, around any learner.

    for one in active_learning(CoOp(per_class=True), reference, source, oracle, rounds=8):
        one.questions, one.addon          # labels asked so far, the learner fitted on all labels

Each image is a point h = unit([x ; sum_c p_c w_c]), so that images lie together that look alike and are taken for the
same. Round 0 asks for the image nearest to each of C cluster centres. Later rounds cluster labelled and unlabelled
images anew and ask in the clusters with the least share of labels. With `selective`, an image the model is as sure of
as of the labelled images of the class it predicts gets that class without a question.

Source: Kim, Jin, Sung, Kim and Ok 2025, "Active Prompt Learning with Vision-Language Model Priors", arXiv:2411.16722,
and the authors' code, commit 105a662: C labels a round, C + n clusters (selective: 4 C + n) with n labels there.
Differs: labels that were asked for and labels that were assumed are kept apart, so that sureness is measured on asked
ones alone; in the authors' code assumed labels become true ones. Questions are counted over all rounds. Where a round
cannot ask for as many because images have run out, it asks for fewer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.adapted import AdaptedClassifier
from vlkit.addons.base import AddOn
from vlkit.addons.channels import single_vectors
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource

# Rows of the pool to their classes: a person, or labels that are known to somebody else.
Oracle = Callable[[Sequence[int]], Sequence[int]]
Strategy = Literal["clusters", "random", "entropy"]


@dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        number: from 0.
        asked: rows of the pool whose labels were asked for in it.
        assumed: rows that got the predicted class without a question.
        questions: labels asked for so far.
        addon: the learner, fitted on all labels so far.
    """

    number: int
    asked: tuple[int, ...]
    assumed: tuple[int, ...]
    questions: int
    addon: AddOn


class Clusters(NamedTuple):
    """Of n points."""

    centres: Tensor  # (k,E)
    of: Tensor  # (n,)


def active_learning(
    learner: AddOn,
    reference: Reference,
    source: FeatureSource,
    oracle: Oracle,
    *,
    rounds: int = 8,
    budget: int | None = None,
    strategy: Strategy = "clusters",
    selective: bool = False,
    templates: str | Sequence[str] = DEFAULT_TEMPLATES,
    progress: Progress | None = None,
) -> Iterator[Round]:
    """Ask, fit the learner from its beginning, and ask again.

    Args:
        learner: not fitted; it is shown the labelled images, which may leave classes out.
        reference: with `images`, the pool, and class names; its seed draws clusters and the training.
        source: the model.
        oracle: answers for rows of the pool.
        rounds: how often.
        budget: images chosen in a round; None: as many as classes.
        strategy: clusters, or what others are compared with: at random, or by the entropy of the prediction.
        selective: leave out questions the model knows the answer to.
        templates: of the zero-shot weights of round 0.
        progress: called with (done, total) rounds.

    Raises:
        ConfigError: no pool, no class names, no round or no budget; or a learner inside the towers and a pool of
            features alone.
        DataError: an answer that is no class.
    """
    names, pool = reference.class_names, reference.images
    count = len(names) if budget is None else budget
    if pool is None or not names or rounds < 1 or count < 1:
        raise ConfigError(
            f"Active learning needs a pool of images, class names, a round and a budget; there are "
            f"{0 if pool is None else len(pool)} images, {len(names)} names, {rounds} rounds, a budget of {count}."
        )
    zero_shot = PLAIN.classifier(names, source, templates)
    classifier, texts, fitted = zero_shot, _texts(zero_shot), PLAIN
    asked: dict[int, int] = {}
    assumed: dict[int, int] = {}
    for number in range(rounds):
        images = _as_used(pool, fitted, reference)
        chances = classifier.probabilities(images)
        points = priors(images, chances, texts)
        known = sorted({*asked, *assumed})
        chosen = _chosen(strategy, points, chances, known, count, 4 if selective else 1, reference.seed + number)
        free = sure_rows(chosen, chances, thresholds(chances, asked)) if selective and number else []
        questions = [row for row in chosen if row not in free]
        asked |= zip(questions, _answers(oracle, questions, len(names)), strict=True)
        assumed |= {row: int(chances[row].argmax()) for row in free}
        shown = _shown(pool, asked | assumed)
        fitted = Pipeline([learner]).fit(replace(reference, few_shot=shown, partial=True), source, templates, None)
        classifier = fitted.classifier(names, source, templates)
        texts = _texts(classifier) if isinstance(classifier.weights[0], ClassWeights) else texts
        yield Round(number, tuple(questions), tuple(free), len(asked), fitted.addons[0])
        if progress:
            progress(number + 1, rounds)


def priors(images: Vectors, chances: Tensor, texts: Tensor) -> Tensor:
    """(n,2D) points h.

    Args:
        images: n of them.
        chances: (n,C) probabilities.
        texts: (C,D) unit norm.
    """
    return F.normalize(torch.cat([F.normalize(images.pooled, dim=-1), chances @ texts], dim=1), dim=-1)


def clustered(points: Tensor, count: int, seed: int) -> Clusters:
    """K-means."""
    from sklearn.cluster import KMeans

    found = KMeans(min(count, len(points)), n_init=10, random_state=seed).fit(points.numpy())
    return Clusters(torch.from_numpy(found.cluster_centers_).to(points), torch.from_numpy(found.labels_).long())


def first_choice(points: Tensor, count: int, seed: int) -> list[int]:
    """The row nearest to each of `count` centres."""
    clusters = clustered(points, count, seed)
    return nearest_rows(points, clusters, torch.bincount(clusters.of, minlength=len(clusters.centres)).clamp(max=1), [])


def balanced_choice(points: Tensor, known: Sequence[int], count: int, clusters: Clusters) -> list[int]:
    """Rows of the clusters with the least share of labelled images.

    Args:
        points: (n,E).
        known: rows with a label.
        count: rows to choose.
        clusters: of all points.
    """
    size = torch.bincount(clusters.of, minlength=len(clusters.centres))
    labelled = torch.bincount(clusters.of[list(known)], minlength=len(size))
    wanted = torch.zeros_like(size)
    for _ in range(min(count, len(points) - len(known))):
        shares = [
            ((labelled[c] + wanted[c]).item() / size[c].item(), -size[c].item(), c)
            for c in range(len(size))
            if labelled[c] + wanted[c] < size[c]
        ]
        wanted[min(shares)[2]] += 1
    return nearest_rows(points, clusters, wanted, known)


def nearest_rows(points: Tensor, clusters: Clusters, wanted: Tensor, known: Sequence[int]) -> list[int]:
    """In each cluster the `wanted` rows without a label that lie nearest to its centre by cosine."""
    similarity = (F.normalize(points, dim=-1) * F.normalize(clusters.centres, dim=-1)[clusters.of]).sum(1)
    similarity[list(known)] = -torch.inf
    rows: list[int] = []
    for one in wanted.nonzero().flatten().tolist():
        own = (clusters.of == one).nonzero().flatten()
        rows += own[similarity[own].argsort(descending=True, stable=True)[: int(wanted[one])]].tolist()
    return rows


def thresholds(chances: Tensor, labelled: dict[int, int]) -> Tensor:
    """(C,) mean of the highest probability over the labelled images of each class; infinite without any."""
    found = torch.full((chances.shape[1],), torch.inf)
    for one in set(labelled.values()):
        rows = [row for row, label in labelled.items() if label == one]
        found[one] = chances[rows].max(1).values.mean()
    return found


def sure_rows(chosen: Sequence[int], chances: Tensor, limits: Tensor) -> list[int]:
    """Those whose highest probability reaches the limit (C,) of the class it stands for."""
    highest, predicted = chances.max(1)
    return [row for row in chosen if highest[row] >= limits[predicted[row]]]


def _chosen(
    strategy: Strategy, points: Tensor, chances: Tensor, known: Sequence[int], count: int, finer: int, seed: int
) -> list[int]:
    rest = [row for row in range(len(points)) if row not in set(known)]
    if strategy == "random":
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
        return [rest[place] for place in order[:count]]
    if strategy == "entropy":
        entropy = torch.special.entr(chances[rest]).sum(1)
        return [rest[place] for place in entropy.argsort(descending=True, stable=True)[:count].tolist()]
    if not known:
        return first_choice(points, count, seed)
    clusters = clustered(points, finer * chances.shape[1] + len(known), seed)
    return balanced_choice(points, known, count, clusters)


def _answers(oracle: Oracle, rows: Sequence[int], num_classes: int) -> list[int]:
    answers = list(oracle(rows)) if rows else []
    if len(answers) != len(rows) or any(not 0 <= one < num_classes for one in answers):
        raise DataError(f"Asked for {len(rows)} labels from 0 to {num_classes - 1}, the answer was {answers[:10]}.")
    return answers


def _shown(pool: Part, labels: dict[int, int]) -> Part:
    rows = sorted(labels)
    return Part(
        pool.split,
        pool.vectors.rows(rows),
        torch.tensor([labels[row] for row in rows]),
        tuple(pool.records[row] for row in rows) if pool.records else (),
    )


def _as_used(pool: Part, fitted: Pipeline, reference: Reference) -> Vectors:
    """The pool as the fitted learner sees it: a learner inside the towers changes its features too."""
    if not (fitted.edits or fitted.views or fitted.local):
        return pool.vectors
    if reference.passes is None or not pool.records:
        names = ", ".join(one.name for one in fitted.addons)
        raise ConfigError(f"{names} changes images or wants more of them: the pool needs records, and `passes`.")
    return reference.passes.read(pool.records, fitted.edits, fitted.views).vectors


def _texts(classifier: AdaptedClassifier) -> Tensor:
    weights = classifier.weights[0]
    assert isinstance(weights, ClassWeights), "zero-shot weights are vectors"
    return single_vectors(weights.vectors, weights.class_of)
