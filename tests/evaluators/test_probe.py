"""Linear probe, few-shot and kNN on features that are known, against scikit-learn and slow loops."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from eval.few_shot import FewShotEvaluator
from eval.knn import KnnEvaluator, neighbour_votes
from eval.labelled import Labelled, Parts, divide, draw_shots
from eval.logistic import COARSE, choose_strength, fit_logistic
from eval.probe import LinearProbeEvaluator, fit_probe
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError, GalleryError

CLASSES = ("cat", "dog", "owl")


def clusters(num: int, spread: float, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[Record]]:
    """`num` images of three classes around their centres in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=generator)
    vectors, records = {}, []
    for row in range(num):
        label = row % 3
        key = f"{CLASSES[label]}/{row}.jpg"
        vectors[key] = centres[label] + spread * torch.randn(8, generator=generator)
        records.append(Record(key, ImageRef(data=b"fine"), label=label))
    return vectors, records


def exact(c: float) -> LogisticRegression:
    """Newton's method: with strong regularisation the bias decides, and L-BFGS there stops early."""
    return LogisticRegression(C=c, solver="newton-cholesky", max_iter=1000, tol=1e-12)


def labelled(source: Any, records: list[Record]) -> Labelled:
    features = source.embed_images_where_readable(records).embeddings
    return Labelled(tuple(records), features, torch.tensor([r.label for r in records]), ())


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_the_fit_is_scikit_learns(c: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(80, 6, generator=generator), torch.arange(80) % 4
    head = fit_logistic(x, y, 4, c)
    oracle = exact(c).fit(x.double().numpy(), y.numpy())
    ours, theirs = head.scores(x), torch.from_numpy(oracle.decision_function(x.double().numpy()))
    # Equal up to a shift of all classes, which no probability sees.
    assert (ours - ours.mean(1, keepdim=True)).numpy() == pytest.approx(
        (theirs - theirs.mean(1, keepdim=True)).numpy(), abs=1e-3
    )
    warm = fit_logistic(x, y, 4, c, start=fit_logistic(x, y, 4, 10 * c))
    assert warm.weight.numpy() == pytest.approx(head.weight.numpy(), abs=1e-4)


def test_strong_regularisation_makes_no_ties() -> None:
    """Logits of 1e-7 order the classes as well as large ones."""
    head = fit_logistic(torch.eye(3).repeat(4, 1), torch.arange(12) % 3, 3, c=1e-8)
    assert head.scores(torch.eye(3)).abs().max() < 1e-6
    ranked = head.ranking_scores(torch.eye(3))
    assert ranked.argmax(1).tolist() == [0, 1, 2] and (ranked.diagonal() - ranked.flip(1).diagonal())[0] > 0.1


def test_strength_is_searched_on_a_grid_and_by_halving() -> None:
    asked: list[float] = []

    def accuracy(c: float) -> float:
        asked.append(c)
        return -abs(np.log10(c) - 1.3)

    chosen = choose_strength(accuracy)
    assert asked[:7] == list(COARSE) and asked[7:9] == pytest.approx([10.0, 1000.0]) and len(asked) == 17
    assert np.log10(chosen.c) == pytest.approx(1.3, abs=0.02)
    # Where all are as good, the least extreme.
    assert choose_strength(lambda c: 1.0).c == 1.0


def test_the_probe_refits_and_tests_like_scikit_learn(named_vectors: Callable[..., Any]) -> None:
    vectors, records = clusters(150, 2.0)
    records.append(Record("cat/broken.jpg", ImageRef(data=b"broken"), label=0))
    parts = divide(records)
    source = named_vectors(vectors)
    calls: list[tuple[int, int]] = []
    evaluation = LinearProbeEvaluator(parts, CLASSES, progress=lambda *call: calls.append(call)).run(source)
    c = evaluation.protocol["c"]
    train, test = (
        labelled(source, [r for r in part if r.image.data != b"broken"])
        for part in ([*parts.train, *parts.val], parts.test)
    )
    oracle = exact(c).fit(train.features.double().numpy(), train.labels)
    expected = oracle.score(test.features.double().numpy(), test.labels)
    assert evaluation.metrics["accuracy@1"] == pytest.approx(expected)
    assert 0.4 < expected < 1.0 and evaluation.intervals["accuracy@1"][0] < expected
    assert evaluation.counts["unreadable_images"] == 1 and calls[-1][0] == calls[-1][1] == 151
    assert "accuracy@5" not in evaluation.metrics and len(evaluation.figures["tried"]) == 17
    assert evaluation.per_item is not None and evaluation.per_item.num_rows == evaluation.counts["images"]


def test_division_is_per_class_disjoint_and_seeded() -> None:
    _, records = clusters(60, 1.0)
    parts = divide(records)
    keys = [{record.key for record in part} for part in parts[:3]]
    assert [len(one) for one in keys] == [30, 12, 18]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    for part in parts[:3]:
        assert np.bincount([record.label for record in part]).tolist() == [len(part) // 3] * 3
    assert divide(records) == parts and divide(records, seed=1) != parts
    named = [
        Record(r.key, r.image, label=r.label, split=("train", "val", "test")[i % 3]) for i, r in enumerate(records)
    ]
    assert divide(named).how == "the data's own splits" and len(divide(named).val) == 20
    with pytest.raises(DataError, match="both train and test are needed"):
        divide([record for record in named if record.split == "val"])
    with pytest.raises(DataError, match="None of the 1 images has a class"):
        divide([Record("a", ImageRef(data=b""))])


def test_shots_are_nested_and_apart_from_validation() -> None:
    labels = torch.arange(40) % 2
    two, two_val = draw_shots(labels, 2, seed=1)
    four, four_val = draw_shots(labels, 4, seed=1)
    assert set(two.tolist()) < set(four.tolist()) and len(two_val) == 4 and len(four_val) == 8
    assert not set(four.tolist()) & set(four_val.tolist())
    assert draw_shots(labels, 4, seed=2)[0].tolist() != four.tolist()
    all_of_it, none_left = draw_shots(labels, 30, seed=1)
    assert sorted(all_of_it.tolist()) == list(range(40)) and len(none_left) == 0


def test_few_shot_is_the_mean_of_probes_on_its_draws(named_vectors: Callable[..., Any]) -> None:
    vectors, records = clusters(120, 1.5)
    source, parts = named_vectors(vectors), divide(records)
    evaluation = FewShotEvaluator(parts, CLASSES, shots=(4,), seeds=(1, 2)).run(source)
    assert source.num_images == 120  # one pass, whatever the number of draws
    pool, test = labelled(source, [*parts.train, *parts.val]), labelled(source, list(parts.test))
    expected = []
    for seed in (1, 2):
        rows, val_rows = draw_shots(pool.labels, 4, seed)
        c = fit_probe(pool.at(rows), pool.at(val_rows), CLASSES, refit=False).chosen.c
        fitted = exact(c).fit(pool.features[rows].double().numpy(), pool.labels[rows])
        expected.append(fitted.score(test.features.double().numpy(), test.labels))
    assert evaluation.metrics["accuracy@1/4_shots"] == pytest.approx(np.mean(expected))
    assert evaluation.metrics["accuracy@1/4_shots/std"] == pytest.approx(np.std(expected))
    with pytest.raises(ConfigError, match="shots from 1"):
        FewShotEvaluator(parts, CLASSES, shots=(0,))


def test_knn_equals_a_loop_and_scikit_learn(named_vectors: Callable[..., Any]) -> None:
    vectors, records = clusters(120, 2.0)
    source, parts = named_vectors(vectors), divide(records)
    evaluation = KnnEvaluator(parts, CLASSES, ks=(1, 7)).run(source)
    train, test = labelled(source, [*parts.train, *parts.val]), labelled(source, list(parts.test))
    right = 0
    for query, label in zip(test.features, test.labels.tolist(), strict=True):
        similarity = train.features @ query
        votes = torch.zeros(3)
        for row in similarity.argsort(descending=True)[:7].tolist():
            votes[train.labels[row]] += torch.exp(similarity[row] / 0.07)
        right += int(votes.argmax() == label)
    assert evaluation.metrics["accuracy@1/7_neighbours"] == pytest.approx(right / len(test.labels))
    nearest = KNeighborsClassifier(1, metric="cosine").fit(train.features.numpy(), train.labels)
    expected = nearest.score(test.features.numpy(), test.labels)
    assert evaluation.metrics["accuracy@1/1_neighbours"] == pytest.approx(expected)


def test_bad_input_is_refused(named_vectors: Callable[..., Any]) -> None:
    vectors, records = clusters(30, 1.0)
    parts = divide(records)
    with pytest.raises(GalleryError, match="k is 50, but there are 21 training images"):
        KnnEvaluator(parts, CLASSES, ks=(50,)).run(named_vectors(vectors))
    with pytest.raises(DataError, match=r"label 2, but there are 2 class names"):
        LinearProbeEvaluator(parts, CLASSES[:2])
    only = Parts(tuple(r for r in parts.train if r.label != 2), parts.val, parts.test, "")
    with pytest.raises(DataError, match=r"1 of 3 classes have no image for training \(first: 'owl'\)"):
        LinearProbeEvaluator(only, CLASSES).run(named_vectors(vectors))
    vectors[parts.test[0].key] = torch.full((8,), torch.nan)
    for evaluator in (LinearProbeEvaluator(parts, CLASSES), KnnEvaluator(parts, CLASSES, ks=(1,))):
        with pytest.raises(GalleryError, match=r"not finite for 1 of 9 images"):
            evaluator.run(named_vectors(vectors))
    with pytest.raises(GalleryError, match="1 of 2 features are not finite"):
        fit_logistic(torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]), 2, 1.0)
    assert (
        neighbour_votes(torch.eye(3), torch.arange(3), torch.eye(3), (1,), 3, 1.0)[0].tolist() == torch.eye(3).tolist()
    )
