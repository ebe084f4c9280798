"""CLIPScore by hand, Flickr8k's conventions, and Kendall's tau against scipy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kendalltau

from eval.caption_judgement import (
    PREFIX,
    CaptionJudgementEvaluator,
    clip_score,
    read_flickr8k_judgements,
    ref_clip_score,
)
from vlkit.errors import DataError

CAPTIONS = {
    "1.jpg": ["A dog runs .", "The dog is fast .", "A brown dog ."],
    "2.jpg": ["A cat sleeps .", "One cat ."],
    "3.jpg": ["A red car .", "The car  is parked ."],
}


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    (tmp_path / "Images").mkdir()
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "Images" / name)
    rows = [f"{name}#{n}\t{text}" for name, texts in CAPTIONS.items() for n, text in enumerate(texts)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(rows) + "\n")
    expert = [
        "1.jpg\t1.jpg#0\t4\t4\t4",  # a reference of its image: left out
        "1.jpg\t2.jpg#0\t1\t1\t2",
        "2.jpg\t3.jpg#1\t1\t2\t1",
        "3.jpg\t1.jpg#1\t1\t1\t3",
    ]
    (tmp_path / "ExpertAnnotations.txt").write_text("\n".join(expert) + "\n")
    crowd = ["1.jpg\t1.jpg#0\t1\t3\t0", "1.jpg\t2.jpg#1\t0\t0\t3", "2.jpg\t3.jpg#0\t0.333333333333333\t1\t2"]
    (tmp_path / "CrowdFlowerAnnotations.txt").write_text("\n".join(crowd) + "\n")
    return tmp_path


def test_the_formula_by_hand_on_ten_rows() -> None:
    """Unit vectors in the plane: the cosine of image at 0 degrees and caption at an angle is that angle's cosine."""
    angles = [0, 30, 45, 60, 75, 90, 105, 120, 150, 180]
    image = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    caption = torch.tensor([[np.cos(np.radians(a)), np.sin(np.radians(a))] for a in angles])
    # 2.5 x cos: 2.5, 2.1651, 1.7678, 1.25, 0.6470, and 0 from 90 degrees on.
    by_hand = [2.5, 2.165064, 1.767767, 1.25, 0.647048, 0, 0, 0, 0, 0]
    assert clip_score(image, caption).tolist() == pytest.approx(by_hand, abs=1e-6)
    # References at 0 and 90 degrees: the larger of cos(a) and sin(a).
    references = [torch.eye(2)] * 10
    largest = [1, 0.866025, 0.707107, 0.866025, 0.965926, 1, 0.965926, 0.866025, 0.5, 0]
    expected = [2 * c * r / (c + r) if c + r else 0.0 for c, r in zip(by_hand, largest, strict=True)]
    assert ref_clip_score(image, caption, references).tolist() == pytest.approx(expected, abs=1e-5)
    # 30 degrees, worked out: 2 x 2.165064 x 0.866025 / 3.031089 = 1.237179.
    assert expected[1] == pytest.approx(1.237179, abs=1e-5)


def test_scores_without_an_order_have_no_tau(miniature: Path, named_vectors: Callable[..., Any]) -> None:
    sets = read_flickr8k_judgements(miniature)
    texts = {PREFIX + item.caption: [-1.0, 0.0] for one in sets for item in one.judgements}
    texts |= {PREFIX + text: [-1.0, 0.0] for one in sets for item in one.judgements for text in item.references}
    source = named_vectors({**texts, **{key: [1.0, 0.0] for key in CAPTIONS}})
    evaluation = CaptionJudgementEvaluator(sets).run(source)
    assert not evaluation.metrics and evaluation.counts["expert_clip_score_without_order"] == 9


def test_conventions_of_the_two_sets(miniature: Path) -> None:
    expert, crowd = read_flickr8k_judgements(miniature)
    assert (expert.variant, crowd.variant) == ("c", "b")
    # Three ratings each by itself, the pair with a reference gone, white space folded.
    assert [(item.key, item.caption, item.rating) for item in expert.judgements[:4]] == [
        ("1.jpg", "A cat sleeps .", 1),
        ("1.jpg", "A cat sleeps .", 1),
        ("1.jpg", "A cat sleeps .", 2),
        ("2.jpg", "The car is parked .", 1),
    ]
    assert len(expert.judgements) == 9 and dict(expert.skipped)["pairs_with_a_reference"] == 1
    assert expert.judgements[0].references == tuple(CAPTIONS["1.jpg"])
    # Judged captions are no references of their image; the share of yes is the rating.
    assert crowd.judgements[0].references == ("The dog is fast .", "A brown dog .")
    assert [item.rating for item in crowd.judgements] == pytest.approx([1, 0, 1 / 3])


def test_tau_is_scipys_over_the_scored_pairs(miniature: Path, named_vectors: Callable[..., Any]) -> None:
    source = named_vectors(dim=3)
    evaluation = CaptionJudgementEvaluator(read_flickr8k_judgements(miniature)).run(source)
    assert all(text.startswith("A photo depicts ") for text in source.texts)
    assert len(source.texts) == len(set(source.texts)) and source.num_images == 3
    for one in read_flickr8k_judgements(miniature):
        scores, with_references = [], []
        for item in one.judgements:
            image, caption = source.vector(item.key), source.vector("A photo depicts " + item.caption)
            score = 2.5 * max((image @ caption).item(), 0)
            best = max((source.vector("A photo depicts " + text) @ caption).item() for text in item.references)
            scores.append(score)
            with_references.append(2 * score * max(best, 0) / (score + max(best, 0)) if score + max(best, 0) else 0)
        ratings = [item.rating for item in one.judgements]
        for name, values in (("clip_score", scores), ("ref_clip_score", with_references)):
            expected = kendalltau(values, ratings, variant=one.variant).statistic
            assert evaluation.metrics[f"{one.name}/{name}/tau_{one.variant}"] == pytest.approx(expected, abs=1e-6)
    assert evaluation.counts["expert_judgements"] == 9 and evaluation.counts["crowdflower_judgements"] == 3
    assert evaluation.per_item is not None and evaluation.per_item.num_rows == 12


def test_a_row_that_is_no_judgement_is_named(miniature: Path) -> None:
    with open(miniature / "ExpertAnnotations.txt", "a") as file:
        file.write("1.jpg\t9.jpg#0\t1\t1\t1\n")
    with pytest.raises(DataError, match=r"ExpertAnnotations.txt, line 5: .*9.jpg#0"):
        read_flickr8k_judgements(miniature)
    for name in ("ExpertAnnotations.txt", "CrowdFlowerAnnotations.txt"):
        (miniature / name).unlink()
    with pytest.raises(DataError, match=r"holds neither ExpertAnnotations\.txt"):
        read_flickr8k_judgements(miniature)


def test_the_real_files_have_the_published_sizes(vlkit_data: Path) -> None:
    expert, crowd = read_flickr8k_judgements(vlkit_data / "flickr8k")
    # 5,664 of 5,822 pairs stay, times three ratings; CF keeps all of its pairs.
    assert len(expert.judgements) == 16_992 and dict(expert.skipped)["pairs_with_a_reference"] == 158
    assert len(crowd.judgements) == 47_830
    assert all(item.references for item in (*expert.judgements, *crowd.judgements))
