"""The classification evaluator with an encoder made by hand, and the naming of class folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eval.class_names import name_classes
from eval.classification import ClassificationEvaluator
from vlkit.contracts import Progress
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError, GalleryError

VECTORS = {"cat": [1.0, 0.0, 0.0], "dog": [0.0, 1.0, 0.0], "hound": [0.0, 0.0, 1.0], "cow": [0.6, 0.0, 0.8]}
VECTORS |= {name: [0.0, 1.0, 0.0] for name in "xyz"}
FOLDERS = ("Faces", "Faces_easy", "grand_piano")


class Read(NamedTuple):
    embeddings: Tensor
    kept: list[int]
    failures: list[tuple[int, str]]


class HandMade:
    """A softmax-trained encoder that reads an image's vector out of its bytes and a text's out of a table."""

    logit_scale, logit_bias, family = 10.0, None, "softmax"

    def embed_images_where_readable(
        self, images: Sequence[Record], batch_size: int, progress: Progress | None, workers: int | None
    ) -> Read:
        if progress:
            progress(len(images), len(images))
        kept = [row for row, record in enumerate(images) if record.image.data]
        vectors = [[float(number) for number in (images[row].image.data or b"").split()] for row in kept]
        failures = [(row, "empty file") for row in range(len(images)) if row not in kept]
        return Read(torch.tensor(vectors), kept, failures)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        if progress:
            progress(1, 1)
        return torch.tensor([VECTORS[text.removeprefix("a ")] for text in texts])


def photo(label: int | None, *vector: float, key: str = "") -> Record:
    return Record(key or f"{label}/{vector}", ImageRef(data=" ".join(map(str, vector)).encode()), label=label)


def test_accuracy_recall_and_confusion_by_hand() -> None:
    records = [
        photo(0, 1, 0, 0),
        photo(0, 0.8, 0.6, 0),
        photo(0, 0.6, 0.8, 0),  # a cat taken for a dog
        photo(1, 0, 1, 0),
        photo(None, 0, 1, 0),
        photo(0, key="empty"),
    ]
    evaluation = ClassificationEvaluator(records, ["cat", "dog", "cow"], "a {}", ks=(1, 2, 5)).run(HandMade())
    assert evaluation.metrics["accuracy@1"] == pytest.approx(3 / 4)
    assert evaluation.metrics["accuracy@2"] == 1.0
    assert "accuracy@5" not in evaluation.metrics
    assert evaluation.metrics["mean_per_class_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert evaluation.figures["confusion_matrix"].tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert evaluation.counts == {
        "images": 4,
        "classes": 3,
        "classes_without_images": 1,
        "unreadable_images": 1,
        "images_without_labels": 1,
    }
    assert evaluation.figures["unreadable_images"] == (("empty", "empty file"),)
    assert evaluation.protocol["templates"] == "a {}" and len(str(evaluation.protocol["templates_hash"])) == 12
    assert set(evaluation.intervals) == set(evaluation.metrics)
    assert evaluation.per_item is not None
    row = evaluation.per_item.to_pylist()[2]
    assert (row["class"], row["predicted"], row["rank"], row["hit@1"]) == ("cat", "dog", 2, 0)
    expected = torch.tensor([6.0, 8.0, 3.6]).softmax(0).max().item()
    assert row["probability"] == pytest.approx(expected, abs=1e-6)


def test_a_synonym_counts_for_its_class() -> None:
    records = [photo(1, 0, 0, 1), photo(1, 0, 1, 0), photo(0, 1, 0, 0)]
    evaluation = ClassificationEvaluator(records, ["cat", "dog | hound"], "{}").run(HandMade())
    assert evaluation.metrics["accuracy@1"] == 1.0


def test_progress_counts_prompts_and_images() -> None:
    calls: list[tuple[int, int]] = []
    records = [photo(0, 1, 0, 0), photo(1, 0, 1, 0)]
    ClassificationEvaluator(
        records, ["cat", "dog | hound"], "{}", progress=lambda done, total: calls.append((done, total))
    ).run(HandMade())
    assert calls == [(3, 5), (5, 5)]


def test_examples_are_the_most_certain_right_and_wrong() -> None:
    records = [photo(0, 1, 0, 0), photo(0, 0.8, 0.6, 0), photo(1, 1, 0, 0), photo(1, 0.8, 0.6, 0)]
    evaluation = ClassificationEvaluator(records, ["cat", "dog"], "{}", num_examples=2).run(HandMade())
    found = [(example.record.key, example.true, example.predicted) for example in evaluation.figures["examples"]]
    assert found == [(records[0].key, "cat", "cat"), (records[2].key, "dog", "cat")]


def test_constant_features_are_chance() -> None:
    records = [photo(label, 0, 0.6, 0.8) for label in (0, 1, 2) for _ in range(4)]
    evaluation = ClassificationEvaluator(records, ["x", "y", "z"], "{}").run(HandMade())
    assert evaluation.metrics["accuracy@1"] == pytest.approx(1 / 3)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="None of the 1 images has a class"):
        ClassificationEvaluator([photo(None, 1, 0, 0)], ["cat"])
    with pytest.raises(DataError, match="has label 2, but there are 2 class names"):
        ClassificationEvaluator([photo(2, 1, 0, 0)], ["cat", "dog"])
    with pytest.raises(ConfigError, match="'hound' stands twice"):
        ClassificationEvaluator([photo(0, 1, 0, 0)], ["dog | hound", "hound"])
    with pytest.raises(GalleryError, match="not finite for 1 of 1 images"):
        ClassificationEvaluator([photo(0, float("nan"), 0, 0)], ["cat", "dog"], "{}").run(HandMade())


def labelled() -> list[Record]:
    return [
        Record(f"{folder}/{i}", ImageRef(data=b""), label=label) for label, folder in enumerate(FOLDERS) for i in "ab"
    ]


def test_folder_names_lose_their_underscores() -> None:
    classes = name_classes(FOLDERS, labelled())
    assert classes.names == ("Faces", "Faces easy", "grand piano")
    assert classes.how == "folder name, _ as space"
    assert list(classes.records) == labelled()


def test_an_excluded_class_is_gone_with_its_images() -> None:
    classes = name_classes(FOLDERS, labelled(), exclude=["Faces_easy"])
    assert classes.names == ("Faces", "grand piano")
    assert [(record.key, record.label) for record in classes.records] == [
        ("Faces/a", 0), ("Faces/b", 0), ("grand_piano/a", 1), ("grand_piano/b", 1),
    ]  # fmt: skip
    assert classes.num_excluded == 2 and "without Faces_easy" in classes.how
    with pytest.raises(DataError, match=r"no class folder 'faces_easy' to exclude. Did you mean Faces_easy"):
        name_classes(FOLDERS, labelled(), exclude=["faces_easy"])


@pytest.mark.parametrize(
    ("file_name", "content"),
    [
        ("names.tsv", "Faces\tface | person\ngrand_piano\tgrand piano\nelse\tnothing\n"),
        ("names.txt", "Faces => face | person\n\ngrand_piano=>grand piano\nelse => nothing\n"),
        ("names.json", json.dumps({"Faces": "face | person", "grand_piano": "grand piano", "else": "nothing"})),
        ("list.txt", "face | person\ngrand piano\n"),
        ("list.json", json.dumps(["face | person", "grand piano"])),
    ],
)
def test_a_file_names_the_folders(tmp_path: Path, file_name: str, content: str) -> None:
    file = tmp_path / file_name
    file.write_text(content, encoding="utf-8")
    classes = name_classes(FOLDERS, labelled(), file, exclude=["Faces_easy"])
    assert classes.names == ("face | person", "grand piano")
    assert classes.unused == (("else",) if "else" in content else ())
    assert f"given by {file_name}" in classes.how


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Faces\tface\n", r"names no class for 2 of 3 folders: Faces_easy, grand_piano"),
        ("face\npiano\n", r"lists 2 names, but there are 3 class folders \(first 'Faces', last 'grand_piano'\)"),
        ("Faces\tface\nFaces_easy face\n", r"line 2: 'Faces_easy face' is not"),
        ("Faces\tface\nFaces\tperson\n", r"line 2: folder 'Faces' has a second name 'person'"),
        ("\n", r"is empty"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "names.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        name_classes(FOLDERS, labelled(), file)
