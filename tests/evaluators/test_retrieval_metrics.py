"""Retrieval ranks against hand-made matrices, an enumeration of all tie orders, and CLIP_benchmark's definition."""

from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from eval.metrics import expected_rank, hit_probability, retrieval_ranks, retrieval_recall

DIRECTIONS = ("image_to_text", "text_to_image")


def from_matrix(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N,N), (M,N) whose inner products text @ image.T are exactly `scores` (M,N)."""
    return torch.eye(scores.shape[1]), scores


def enumerated(scores: Tensor, text_to_image: Tensor, k: int) -> dict[str, float]:
    """Recall@k averaged over every order of the gallery in which no lower score stands above a higher one."""

    def hit(of_query: list[float], right: set[int]) -> float:
        orders = [
            order
            for order in permutations(range(len(of_query)))
            if all(of_query[a] >= of_query[b] for a, b in pairwise(order))
        ]
        return sum(bool(right & set(order[:k])) for order in orders) / len(orders)

    captions = [{row for row, owner in enumerate(text_to_image.tolist()) if owner == i} for i in range(scores.shape[1])]
    by_image = [hit(scores[:, image].tolist(), captions[image]) for image in range(scores.shape[1])]
    by_text = [hit(scores[text].tolist(), {int(text_to_image[text])}) for text in range(len(scores))]
    return {"image_to_text": sum(by_image) / len(by_image), "text_to_image": sum(by_text) / len(by_text)}


def clip_benchmark_recall(scores: Tensor, positive_pairs: Tensor, k: int) -> float:
    """CLIP_benchmark's recall_at_k and its `> 0`, dense; queries in rows."""
    k = min(k, scores.shape[1])
    one_hot = torch.nn.functional.one_hot(scores.topk(k, dim=1).indices, scores.shape[1])
    found = (one_hot * positive_pairs[:, None]).sum(dim=(1, 2))
    return ((found / positive_pairs.sum(dim=1)) > 0).float().mean().item()


def ragged(num_images: int, seed: int) -> Tensor:
    """Captions of every image, between 1 and 7, in random order."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 8, (num_images,), generator=generator)
    owners = torch.arange(num_images).repeat_interleave(counts)
    return owners[torch.randperm(len(owners), generator=generator)]


def chance_image_to_text(text_to_image: Tensor, num_images: int, k: int) -> float:
    """The mean over images of the probability that k of M captions, drawn blindly, hold one of its own."""
    num_texts, total = len(text_to_image), 0.0
    for own in text_to_image.bincount(minlength=num_images).tolist():
        miss = 1.0
        for drawn in range(min(k, num_texts)):
            miss *= max(num_texts - own - drawn, 0) / (num_texts - drawn)
        total += 1 - miss
    return total / num_images


def test_three_images_with_two_captions_each_by_hand() -> None:
    #            image 0  1    2
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2],  # caption 0 of image 0: first
            [0.5, 0.8, 0.2],  # caption 1 of image 0: second
            [0.1, 0.7, 0.7],  # caption 2 of image 1: first or second, tied with image 2
            [0.3, 0.2, 0.1],  # caption 3 of image 1: second
            [0.4, 0.4, 0.4],  # caption 4 of image 2: one of three
            [0.6, 0.5, 0.3],  # caption 5 of image 2: third
        ]
    )
    text_to_image = torch.tensor([0, 0, 1, 1, 2, 2])
    recall = retrieval_recall(*from_matrix(scores), text_to_image, ks=(1, 2))
    assert recall["text_to_image/recall@1"] == pytest.approx((1 + 0 + 0.5 + 0 + 1 / 3 + 0) / 6)
    assert recall["text_to_image/recall@2"] == pytest.approx((1 + 1 + 1 + 1 + 2 / 3 + 0) / 6)
    # Image 0: caption 0 is first. Image 1: 0.8 is caption 1's, its own 0.7 second. Image 2: 0.7 is caption 2's,
    # its own 0.4 second.
    assert recall["image_to_text/recall@1"] == pytest.approx(1 / 3)
    assert recall["image_to_text/recall@2"] == pytest.approx(1.0)
    ranks = retrieval_ranks(*from_matrix(scores), text_to_image)
    assert expected_rank(ranks.text_to_image).tolist() == [1, 2, 1.5, 2, 2, 3]
    assert expected_rank(ranks.image_to_text).tolist() == [1, 2, 2]


@pytest.mark.parametrize("seed", range(8))
def test_ties_equal_the_mean_over_all_orders(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (6, 4), generator=generator) / 4
    text_to_image = torch.randint(0, 4, (6,), generator=generator)  # some images have no caption: a miss
    for k in (1, 2, 3, 5):
        expected = enumerated(scores, text_to_image, k)
        measured = retrieval_recall(*from_matrix(scores), text_to_image, ks=(k,), tile=2)
        assert measured == pytest.approx({f"{way}/recall@{k}": expected[way] for way in DIRECTIONS})


@pytest.mark.parametrize(("num_images", "tile"), [(37, 16), (64, 64), (50, 7), (129, 1024), (3, 1)])
def test_equals_clip_benchmark_without_ties(num_images: int, tile: int) -> None:
    text_to_image = ragged(num_images, seed=num_images)
    generator = torch.Generator().manual_seed(num_images)
    image = normalize(torch.randn(num_images, 48, generator=generator), dim=1)
    text = normalize(image[text_to_image] + 0.35 * torch.randn(len(text_to_image), 48, generator=generator), dim=1)
    scores = text @ image.T
    positive = text_to_image[:, None] == torch.arange(num_images)
    recall = retrieval_recall(image, text, text_to_image, ks=(1, 5, 10), tile=tile)
    for k in (1, 5, 10):
        assert recall[f"text_to_image/recall@{k}"] == pytest.approx(clip_benchmark_recall(scores, positive, k))
        assert recall[f"image_to_text/recall@{k}"] == pytest.approx(clip_benchmark_recall(scores.T, positive.T, k))


def test_vectors_of_any_length_equal_clip_benchmark() -> None:
    text_to_image = ragged(40, seed=5)
    generator = torch.Generator().manual_seed(5)
    image, text = torch.randn(40, 32, generator=generator), torch.randn(len(text_to_image), 32, generator=generator)
    recall = retrieval_recall(image, text, text_to_image, ks=(5,), tile=13)
    positive = text_to_image[:, None] == torch.arange(40)
    assert recall["text_to_image/recall@5"] == pytest.approx(clip_benchmark_recall(text @ image.T, positive, 5))


@pytest.mark.parametrize("dim", [192, 512])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_constant_random_vectors_score_chance(dim: int, unit_norm: bool) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        num_images, tile = 61 + 7 * seed, (32, 50, 1024)[seed % 3]
        text_to_image = ragged(num_images, seed)
        one_image, one_text = torch.randn(2, dim, generator=generator)
        if unit_norm:
            one_image, one_text = normalize(one_image, dim=0), normalize(one_text, dim=0)
        image, text = one_image.repeat(num_images, 1), one_text.repeat(len(text_to_image), 1)
        recall = retrieval_recall(image, text, text_to_image, ks=(1, 5), tile=tile)
        for k in (1, 5):
            assert recall[f"text_to_image/recall@{k}"] == pytest.approx(k / num_images)
            chance = chance_image_to_text(text_to_image, num_images, k)
            assert recall[f"image_to_text/recall@{k}"] == pytest.approx(chance)


def test_constant_images_among_distinct_captions_score_chance() -> None:
    text_to_image = ragged(90, seed=1)
    generator = torch.Generator().manual_seed(1)
    image = normalize(torch.randn(1, 192, generator=generator), dim=1).repeat(90, 1)
    text = normalize(torch.randn(len(text_to_image), 192, generator=generator), dim=1)
    assert retrieval_recall(image, text, text_to_image, tile=40)["text_to_image/recall@10"] == pytest.approx(10 / 90)


@pytest.mark.parametrize("dim", [192, 512])
def test_duplicated_captions_in_different_tiles_count_half(dim: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        image = normalize(torch.randn(90, dim, generator=generator), dim=1)
        # Caption 45 + i repeats caption i word for word, 45 rows on: in another tile, with another remainder.
        text = normalize(image[:45] + image[45:], dim=1).repeat(2, 1)
        recall = retrieval_recall(image, text, torch.arange(90), ks=(1, 2), tile=32)
        assert recall["image_to_text/recall@1"] == 0.5
        assert recall["image_to_text/recall@2"] == 1.0


def test_scores_closer_than_the_tolerance_tie_and_others_do_not() -> None:
    text_to_image = torch.tensor([0, 1])
    for gap, expected in ((4e-7, 0.5), (4e-6, 0.0), (-4e-6, 1.0)):
        scores = torch.tensor([[0.5, 0.5 + gap], [0.5 + gap, 0.5]])
        assert retrieval_recall(*from_matrix(scores), text_to_image, ks=(1,))["text_to_image/recall@1"] == expected


def test_k_beyond_the_gallery_is_certain() -> None:
    features = torch.eye(4)
    recall = retrieval_recall(features, -features, torch.arange(4), ks=(3, 4, 100))
    assert [recall[f"text_to_image/recall@{k}"] for k in (3, 4, 100)] == [0.0, 1.0, 1.0]


def test_image_without_caption_stands_in_the_gallery_and_is_a_miss() -> None:
    image = torch.eye(3)
    ranks = retrieval_ranks(image, image[:2], torch.tensor([0, 1]))
    assert hit_probability(ranks.image_to_text, 1).tolist() == [1, 1, 0]
    assert hit_probability(ranks.image_to_text, 9).tolist() == [1, 1, 0]


def test_score_callback_decides_and_keeps_its_matrix() -> None:
    text_to_image = ragged(30, seed=2)
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(len(text_to_image), 30, generator=generator)
    before = matrix.clone()
    rows, columns = torch.arange(len(text_to_image))[:, None], torch.arange(30)[:, None]

    def score(text: Tensor, image: Tensor) -> Tensor:
        if torch.equal(text, rows) and torch.equal(image, columns):
            return matrix  # a view of the caller's own data
        return matrix[text, image.T]

    expected = retrieval_recall(*from_matrix(matrix.double()), text_to_image, tile=8)
    assert retrieval_recall(columns, rows, text_to_image, score=score, tile=8) == pytest.approx(expected)
    assert retrieval_recall(columns, rows, text_to_image, score=score) == pytest.approx(expected)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    ("image", "text", "text_to_image", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 1]), "expected"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2]), "integers from 0 to 1"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0]), "expected"),
        (torch.full((2, 3), torch.nan), torch.ones(2, 3), torch.tensor([0, 1]), "image features are not finite: 2"),
        (torch.ones(0, 3), torch.ones(0, 3), torch.zeros(0, dtype=torch.int64), "0 images"),
    ],
)
def test_what_does_not_fit_is_refused(image: Tensor, text: Tensor, text_to_image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_recall(image, text, text_to_image)
