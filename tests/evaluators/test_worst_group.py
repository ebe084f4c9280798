"""Accuracy by group, counted by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.classification import ClassificationEvaluator
from eval.worst_group import WorstGroupEvaluator, read_groups
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError

# Six images of cats and dogs, indoors and outdoors; the one at index 3 and the one at index 5 are taken for cats.
VECTORS = {
    "a cat": [1.0, 0.0],
    "a dog": [0.0, 1.0],
    **{f"photos/{row}.jpg": [1.0, 0.1] if row in {0, 1, 3, 5} else [0.1, 1.0] for row in range(6)},
}
RECORDS = [Record(f"photos/{row}.jpg", ImageRef(data=b""), label=0 if row < 2 else 1) for row in range(6)]
GROUPS = {"0.jpg": "indoors", "1.jpg": "outdoors", "2.jpg": "indoors", "3.jpg": "outdoors", "photos/4.jpg": "indoors"}


def classification() -> ClassificationEvaluator:
    return ClassificationEvaluator(RECORDS, ("cat", "dog"), "a {}")


def test_worst_mean_and_gap(named_vectors: Callable[..., Any]) -> None:
    evaluation = WorstGroupEvaluator(classification(), GROUPS).run(named_vectors(VECTORS))
    # Indoors: images 0, 2, 4, all right. Outdoors: 1 right, 3 wrong. Image 5 has no group.
    assert evaluation.metrics["group/indoors/accuracy@1"] == 1.0
    assert evaluation.metrics["worst_group/accuracy@1"] == 0.5 == evaluation.metrics["group/outdoors/accuracy@1"]
    assert evaluation.metrics["mean_group/accuracy@1"] == 0.75
    assert evaluation.metrics["accuracy@1"] == pytest.approx(4 / 5)
    assert evaluation.metrics["gap"] == pytest.approx(0.3)
    assert evaluation.protocol["worst_group"] == "outdoors" and evaluation.counts["images_without_group"] == 1


def test_class_and_group_together_and_small_groups(named_vectors: Callable[..., Any]) -> None:
    source = named_vectors(VECTORS)
    pairs = WorstGroupEvaluator(classification(), GROUPS, by_class=True).run(source)
    assert pairs.metrics["worst_group/accuracy@1"] == 0.0 and pairs.protocol["worst_group"] == "dog / outdoors"
    large = WorstGroupEvaluator(classification(), GROUPS, min_images=3).run(source)
    assert large.metrics["worst_group/accuracy@1"] == 1.0 and large.counts["groups_too_small"] == 1
    with pytest.raises(DataError, match="No group has 9 images; the largest has 3"):
        WorstGroupEvaluator(classification(), GROUPS, min_images=9).run(source)


def test_the_table_of_groups(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("file,place\n0.jpg,indoors\n1.jpg,outdoors\n2.jpg,\n")
    assert read_groups(table, "file", "place") == {"0.jpg": "indoors", "1.jpg": "outdoors"}
    with pytest.raises(DataError, match=r"has no column 'plaec'. Did you mean place"):
        read_groups(table, "file", "plaec")
    table.write_text("file,place\n0.jpg,indoors\n0.jpg,outdoors\n")
    with pytest.raises(DataError, match=r"'0.jpg' is in group 'outdoors' and in 'indoors'"):
        read_groups(table, "file", "place")
    with pytest.raises(DataError, match="None of the 6 images is among the 1 keys"):
        WorstGroupEvaluator(classification(), {"other.jpg": "x"})


def test_a_head_taken_out_is_measured_group_by_group(call_vlkit: Any, general_encoder: Path, tmp_path: Path) -> None:
    rows = ["file,ground"]
    for split in ("train", "test"):
        for label, name in enumerate(("dog", "boat")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(4):
                ground = "blue" if number % 2 else "green"
                Image.new("RGB", (40, 40), ground).save(place / f"{split}{label}{number}.png")
                rows.append(f"{split}{label}{number}.png,{ground}")
    (tmp_path / "groups.csv").write_text("\n".join(rows) + "\n")
    command = ("eval", "worst-group", "--model", f"local-dir:{general_encoder}", "--data", tmp_path / "test",
               "--groups", tmp_path / "groups.csv", "--group-column", "ground", "--no-cache", "--json",
               "--out", tmp_path / "results.jsonl")  # fmt: skip
    plain = json.loads(call_vlkit(*command).out)
    ablation = ("--addon", "head_ablation:heads=5.0+5.1", "--reference", tmp_path / "train")
    found = json.loads(call_vlkit(*command, *ablation).out)
    assert plain["counts"]["groups"] == 2 and plain["metrics"].keys() == found["metrics"].keys()
    (addon,) = found["protocol"]["addons"]
    assert addon["name"] == "head_ablation" and addon["fitted_on"]["unlabelled_images"] == "train: 8"
    refused = call_vlkit(*command, *ablation[:2])
    assert refused.code != 0 and "must be fitted, on images that are not measured" in refused.err
