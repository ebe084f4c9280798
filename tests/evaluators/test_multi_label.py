"""Images with several classes against scikit-learn, and CLIP_benchmark's layout read to the end."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from eval.class_names import name_classes
from eval.multi_label import MultiLabelEvaluator
from vlkit.data.records import ImageRef, Record
from vlkit.data.sources import read_source
from vlkit.errors import DataError

NAMES = ("sky", "sea", "sand", "ship")


def scene(row: int) -> Record:
    labels = tuple(c for c in range(3) if (row >> c) & 1)
    return Record(f"{row}.jpg", ImageRef(data=b""), labels=labels)


def test_mean_average_precision_is_scikit_learns(named_vectors: Callable[..., Any]) -> None:
    records = [scene(row) for row in range(32)]
    source = named_vectors(dim=6)
    evaluation = MultiLabelEvaluator(records, NAMES, "a {}").run(source)
    prompts = torch.stack([source.vector(f"a {name}") for name in NAMES])
    scores = torch.stack([source.vector(record.key) for record in records]) @ prompts.T
    truth = np.array([[c in (record.labels or ()) for c in range(4)] for record in records])
    expected = [average_precision_score(truth[:, c], scores[:, c]) for c in range(3)]
    assert evaluation.metrics["mean_average_precision"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert evaluation.metrics["mean_average_precision/all_classes"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert evaluation.counts["classes_without_images"] == 1 and evaluation.counts["images"] == 32
    assert evaluation.per_item is not None
    assert evaluation.per_item.to_pylist()[3] == {"class": "ship", "images": 0, "average_precision": None}
    low, high = evaluation.intervals["mean_average_precision"]
    assert low < np.mean(expected) < high


def test_more_classes_than_names_and_none_at_all(named_vectors: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"7.jpg has classes \(0, 1, 2\), but there are 2 class names"):
        MultiLabelEvaluator([scene(7)], NAMES[:2])
    with pytest.raises(DataError, match="None of the 1 images has a class"):
        MultiLabelEvaluator([scene(0)], NAMES)


def test_excluded_classes_leave_the_label_lists() -> None:
    classes = name_classes(NAMES, [scene(7), scene(1)], exclude=["sea"])
    assert classes.names == ("sky", "sand", "ship")
    assert [record.labels for record in classes.records] == [(0, 1), (0,)]


def files_of_clip_benchmark(count: int) -> Iterator[tuple[str, bytes]]:
    for row in range(count):
        picture, hot = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (8, 8), (30 * row, 0, 0)).save(picture, "JPEG")
        np.save(hot, np.array([c in (scene(row).labels or ()) for c in range(4)], dtype=np.int64))
        yield f"s{row:07d}.jpg", picture.getvalue()
        yield f"s{row:07d}.npy", hot.getvalue()
        yield f"s{row:07d}.json", b"{}"


def test_the_layout_of_clip_benchmark(
    tmp_path: Path, named_vectors: Callable[..., Any], write_tar: Callable[..., Path]
) -> None:
    """classnames.txt, templates with {c}, dataset_type.txt and multi-hot .npy."""
    write_tar(tmp_path / "test" / "0.tar", files_of_clip_benchmark(6))
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\na view of the {c}\n")
    (tmp_path / "dataset_type.txt").write_text("multilabel\n")
    (tmp_path / "test" / "nshards.txt").write_text("1")
    source = read_source(tmp_path, split="test")
    assert source.templates == ("a {}", "a view of the {}")
    assert [record.labels for record in source.records] == [scene(row).labels for row in range(6)]
    vectors = named_vectors(dim=6)
    evaluation = MultiLabelEvaluator(source.records, source.class_names, source.templates).run(vectors)
    assert evaluation.protocol["num_templates"] == 2 and len(set(vectors.texts)) == 8
