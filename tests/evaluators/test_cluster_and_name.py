"""Rate reduction by its identities and a loop, the number of clusters, votes by hand, and the command."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eval.cluster_and_name import ClusterAndNameEvaluator, cluster_images, name_clusters
from eval.metrics.matching import cluster_accuracy
from eval.rate_reduction import (
    Codes,
    CppSettings,
    coding_length,
    cpp_loss,
    membership,
    rate,
    rate_of_groups,
    spectral_clusters,
    train_head,
)
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def log_det(matrix: torch.Tensor) -> float:
    return torch.logdet(matrix.double()).item()


def test_rates_against_loops_and_identities() -> None:
    features, dim, size = unit(12, 5, 0), 5, 12
    whole = 0.5 * log_det(torch.eye(dim) + dim / (size * 0.1) * features.T @ features)
    assert rate(features).item() == pytest.approx(whole, abs=1e-5)
    # One group of all, and every image a twelfth of each group: nothing is gained.
    assert rate_of_groups(features, torch.ones(12, 1)).item() == pytest.approx(whole, abs=1e-4)
    assert rate_of_groups(features, torch.full((12, 12), 1 / 12)).item() == pytest.approx(whole, abs=1e-4)
    member = membership(unit(12, 5, 1), 0.5)
    slow = 0.0
    for group in member.T:
        total = group.sum().item() + 1e-8
        gram = features.T @ torch.diag(group) @ features
        slow += total / (2 * size) * log_det(torch.eye(dim) + dim / (total * 0.1) * gram)
    assert rate_of_groups(features, member).item() == pytest.approx(slow, abs=1e-4)
    loss = cpp_loss(Codes(features, unit(12, 5, 1)), 0.5).item()
    assert loss == pytest.approx(slow - whole + 0.025 * member.square().sum().item(), abs=1e-4)
    # Hard groups never code longer than all together.
    hard = F.one_hot(torch.arange(12) % 3).float()
    assert rate(features) >= rate_of_groups(features, hard)


def test_memberships() -> None:
    codes = unit(30, 6, 2)
    member = membership(codes, 0.2)
    assert torch.allclose(member.sum(1), torch.ones(30), atol=1e-5)
    assert torch.allclose(member.sum(0), torch.ones(30), atol=0.05)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(membership(codes[order], 0.2), member[order][:, order], atol=1e-6)


def test_the_right_number_of_clusters_has_the_shortest_code() -> None:
    # Three orthogonal subspaces of three dimensions in thirty, a hundred points each.
    features = torch.zeros(300, 30)
    for part in range(3):
        features[100 * part : 100 * part + 100, 3 * part : 3 * part + 3] = unit(100, 3, part)
    member = (features @ features.T).abs() + 1e-6
    lengths = {count: coding_length(features, spectral_clusters(member, count)) for count in (1, 2, 3, 6)}
    assert min(lengths, key=lambda count: lengths[count]) == 3
    # One cluster by the formula: (m + d) / 2 logdet(I + d / (eps m) X^T X), and no nats for its name.
    expected = (300 + 30) / 2 * log_det(torch.eye(30) + 30 / (0.1 * 300) * features.T @ features)
    assert lengths[1] == pytest.approx(expected, rel=1e-5)
    halves = torch.arange(300) % 2
    split = sum(
        (150 + 30)
        / 2
        * log_det(torch.eye(30) + 30 / (0.1 * 150) * features[halves == side].T @ features[halves == side])
        for side in (0, 1)
    )
    assert coding_length(features, halves) == pytest.approx(split + 300 * math.log(2), rel=1e-5)


def noisy_clusters() -> tuple[torch.Tensor, torch.Tensor]:
    centres, labels = unit(4, 24, 5), torch.arange(160) % 4
    return F.normalize(centres[labels] + 0.75 * unit(160, 24, 6), dim=-1), labels


SMALL = CppSettings(hidden=64, dim=8, eta=0.2, epochs=60, warm_up=20, batch_size=80, lr=0.02)


def test_training_reduces_the_loss_and_finds_clusters() -> None:
    images, labels = noisy_clusters()
    before = train_head(images, CppSettings(64, 8, 0.2, 1, 0, 160, 1e-9)).run(images)
    after = train_head(images, SMALL).run(images)
    assert cpp_loss(after, 0.2) < cpp_loss(before, 0.2) - 0.5
    found = cluster_images(images, (4,), SMALL)
    assert cluster_accuracy(labels, found.clusters) > 0.9 and found.lengths == {}
    assert torch.equal(found.clusters, cluster_images(images, (4,), SMALL).clusters)


def test_several_numbers_are_tried() -> None:
    images, _ = noisy_clusters()
    found = cluster_images(images, (2, 4, 12), CppSettings(hidden=16, dim=8, epochs=1, batch_size=80))
    assert sorted(found.lengths) == [2, 4, 12]
    assert int(found.clusters.max()) + 1 == min(found.lengths, key=lambda count: found.lengths[count])


def test_votes_by_hand() -> None:
    words = torch.eye(3)
    features = F.normalize(torch.tensor([[1.0, 0.99, 0.0], [1.0, 0.99, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), dim=-1)
    # Two images lean to word 0 with 0.67 each at scale 100, one is all for word 1: 1.34 against 0.66 + 1.
    clusters = torch.tensor([0, 0, 0, 1])
    assert name_clusters(features, clusters, words) == [1, 2]
    assert name_clusters(features[[0, 1, 3]], torch.tensor([0, 0, 1]), words) == [0, 2]


def test_evaluator(named_vectors: Callable[..., Any]) -> None:
    images, labels = noisy_clusters()
    names = ["dog", "boat", "tree", "lamp"]
    centres = F.normalize(torch.zeros(4, 24).index_add_(0, labels, images), dim=-1)
    vectors = {f"{row}": image for row, image in enumerate(images)}
    vectors |= {f"a {name}": centre for name, centre in zip(names, centres, strict=True)}
    records = [Record(f"{row}", ImageRef(data=b""), label=int(label)) for row, label in enumerate(labels)]
    evaluator = ClusterAndNameEvaluator(records, names, [*names, "fish"], (4,), SMALL, "a {}")
    evaluation = evaluator.run(named_vectors(vectors))
    assert evaluation.metrics["cluster_accuracy"] > 0.9 and evaluation.metrics["exact_match"] > 0.9
    assert sorted(evaluation.figures["cluster_names"]) == sorted(names)
    assert 0 < evaluation.metrics["k_means/normalized_mutual_information"] <= 1
    bare = [Record(record.key, record.image) for record in records]
    unlabelled = ClusterAndNameEvaluator(bare, (), (), (4,), SMALL).run(named_vectors(vectors))
    assert (
        set(unlabelled.metrics) == {"largest_cluster"}
        and unlabelled.counts["clusters"] == 4
        and unlabelled.figures["cluster_names"] == ()
    )
    with pytest.raises(ConfigError, match="from 2"):
        ClusterAndNameEvaluator(records, names, (), (1,))
    with pytest.raises(DataError, match="160 readable images for 200 clusters"):
        ClusterAndNameEvaluator(records, names, (), (200,), SMALL).run(named_vectors(vectors))
    with pytest.raises(ConfigError, match="must be positive"):
        CppSettings(eta=0.0)


def test_command(vlkit_data: Path, general_encoder: Path, tmp_path: Path, call_vlkit: Callable[..., Any]) -> None:
    called = call_vlkit(
        "eval", "cluster-and-name", "--model", f"local-dir:{general_encoder}", "--data",
        vlkit_data / "coco_small" / "val2017", "--clusters", "3,6", "--captions", vlkit_data / "coco_small", "--hidden",
        64, "--dim", 8, "--head-batch", 64, "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["counts"]["clusters"] in {3, 6} and set(line["protocol"]["coding_length"]) == {"3", "6"}
    assert called.err.count("cluster ") >= 3
