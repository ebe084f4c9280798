"""`vlkit eval` on miniatures of the official folder trees, with a small model of random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

CALLS = Callable[..., Any]
SPLITS = {"train": range(0, 4), "val": range(4, 7), "test": range(7, 12)}
FLICKR8K_LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
WORDS = ("dog", "cat", "ball", "grass", "street", "river", "child", "bicycle", "tower", "cup", "wall", "kite")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a run folder that holds a model of random weights."""
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("run")
    save_encoder(build_encoder(ARCHITECTURE), run / "model")
    return f"run:{run}"


def photograph(path: Path, seed: int) -> None:
    """Blocks of random colours, so that the model tells images apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((50, 40), Image.Resampling.NEAREST).save(path, "JPEG")


def captions(image: int) -> list[str]:
    """Two to four captions of one image."""
    return [f"a {WORDS[image]} and a {WORDS[(image + k + 1) % 12]} ." for k in range(2 + image % 3)]


def coco(root: Path, year: int) -> Path:
    """COCO: annotations/captions_val{year}.json, val{year}/."""
    ids = list(SPLITS["test"])
    names = {i: f"COCO_val2014_{i:012d}.jpg" if year == 2014 else f"{i:012d}.jpg" for i in ids}
    images = [{"id": i, "file_name": names[i], "height": 40, "width": 50} for i in ids]
    annotations = [{"id": 100 * i + k, "image_id": i, "caption": c} for i in ids for k, c in enumerate(captions(i))]
    (root / "annotations").mkdir(parents=True)
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (root / "annotations" / f"captions_val{year}.json").write_text(json.dumps(document))
    for i in ids:
        photograph(root / f"val{year}" / names[i], i)
    return root


def flickr30k(root: Path) -> Path:
    """Flickr30k: results_20130124.token, Karpathy's dataset_flickr30k.json, flickr30k-images/."""
    split_of = {i: split for split, ids in SPLITS.items() for i in ids}
    names = {i: f"{1000 + i}.jpg" for i in split_of}
    rows = [f"{names[i]}#{k}\t{caption}" for i in split_of for k, caption in enumerate(captions(i))]
    for i in split_of:
        photograph(root / "flickr30k-images" / names[i], i)
    (root / "results_20130124.token").write_text("\n".join(rows) + "\n")
    images = [
        {"filename": names[i], "split": split_of[i], "sentences": [{"raw": c} for c in captions(i)]} for i in split_of
    ]
    (root / "dataset_flickr30k.json").write_text(json.dumps({"dataset": "flickr30k", "images": images}))
    return root


def flickr8k(root: Path) -> Path:
    """Flickr8k: Flickr8k.token.txt, three split lists, Flicker8k_Dataset/."""
    names = {i: f"{2000 + i}_ab.jpg" for ids in SPLITS.values() for i in ids}
    rows = [f"{names[i]}#{k}\t{caption}" for i in names for k, caption in enumerate(captions(i))]
    for i in names:
        photograph(root / "Flicker8k_Dataset" / names[i], i)
    (root / "Flickr8k.token.txt").write_text("\n".join([*rows, "2258277193_586949ec62.jpg.1#0\tpeople waiting"]))
    for split, ids in SPLITS.items():
        (root / f"Flickr_8k.{FLICKR8K_LISTS[split]}.txt").write_text("".join(f"{names[i]}\n" for i in ids))
    return root


def class_folders(root: Path) -> Path:
    """FOLDER/CLASS/*.jpg with four classes of five photographs."""
    for label, name in enumerate(("big_dog", "cat", "Faces", "Faces_easy")):
        for number in range(5):
            photograph(root / name / f"{number}.jpg", 100 * label + number)
    return root


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dense_recall(model: str, paths: list[Path], texts: list[str], owners: list[int], k: int) -> tuple[float, float]:
    """CLIP_benchmark's definition over a full matrix: (image to text, text to image)."""
    from vlkit.models.load import load_embedder

    embedder = load_embedder(model, device="cpu")
    scores = embedder.embed_texts(texts) @ embedder.embed_images(paths).T
    owner = torch.tensor(owners)
    own_first = (scores.topk(k, dim=1).indices == owner[:, None]).any(1)
    captions_first = (owner[scores.T.topk(k, dim=1).indices] == torch.arange(len(paths))[:, None]).any(1)
    return captions_first.float().mean().item(), own_first.float().mean().item()


@pytest.mark.parametrize("name", ["coco 2014", "coco 2017", "flickr30k", "flickr8k"])
def test_retrieval_on_official_trees(model: str, name: str, tmp_path: Path, call_vlkit: CALLS) -> None:
    tree = {"flickr30k": flickr30k, "flickr8k": flickr8k}.get(name)
    root = tmp_path / "data"
    root.mkdir()
    data = coco(root, int(name[-4:])) if tree is None else tree(root)
    data_format, split = name.split()[0], "val" if tree is None else "test"
    called = call_vlkit(
        "eval", "retrieval", "--model", model, "--data", data, "--format", data_format, "--split", split,
        "--out", tmp_path / "results.jsonl",
    )  # fmt: skip
    assert called.code == 0, called.err
    (line,) = results(tmp_path / "results.jsonl")
    paths = sorted(path for path in root.rglob("*.jpg") if _number(path) in SPLITS["test"])
    owners = [row for row, path in enumerate(paths) for _ in captions(_number(path))]
    texts = [caption for path in paths for caption in captions(_number(path))]
    assert (line["counts"]["images"], line["counts"]["texts"]) == (5, len(texts))
    assert (line["format"], line["split"], line["data"], line["model"]) == (data_format, split, str(data), model)
    for k in (1, 5):
        expected = dense_recall(model, paths, texts, owners, k)
        assert line["metrics"][f"image_to_text/recall@{k}"] == pytest.approx(expected[0], abs=1e-6)
        assert line["metrics"][f"text_to_image/recall@{k}"] == pytest.approx(expected[1], abs=1e-6)
    for metric, value in line["metrics"].items():
        assert metric in called.out
        if metric in line["intervals"]:
            low, high = line["intervals"][metric]
            assert 0 <= low <= value <= high <= 1
    assert "Flickr8k.token" not in called.out and f"appended to {tmp_path / 'results.jsonl'}" in called.err


def _number(path: Path) -> int:
    digits = path.stem.removesuffix("_ab").rpartition("_")[2]
    return int(digits) % 1000


def test_annotation_file_and_image_folder_may_be_named_apart(model: str, tmp_path: Path, call_vlkit: CALLS) -> None:
    coco(tmp_path / "coco", 2017)
    (tmp_path / "coco" / "val2017").rename(tmp_path / "photographs")
    called = call_vlkit(
        "eval", "retrieval", "--model", model, "--data", tmp_path / "coco/annotations/captions_val2017.json",
        "--images", tmp_path / "photographs", "--format", "coco", "--out", tmp_path / "r.jsonl", "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    assert json.loads(called.out) == results(tmp_path / "r.jsonl")[0]
    assert json.loads(called.out)["counts"]["images"] == 5


def test_two_runs_differ_only_under_run(
    model: str, tmp_path: Path, call_vlkit: CALLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flickr8k(tmp_path / "flickr8k")
    for batch_size in (64, 2):
        called = call_vlkit(
            "eval", "retrieval", "--model", model, "--data", "flickr8k", "--split", "test", "--batch-size", batch_size
        )
        assert called.code == 0, called.err
    first, second = results(tmp_path / "results.jsonl")
    assert first.pop("run")["versions"]["torch"] and second.pop("run")["seconds"] > 0
    assert first == second


def test_unreadable_images_are_named_and_left_out_with_their_captions(
    model: str, tmp_path: Path, call_vlkit: CALLS
) -> None:
    data = flickr8k(tmp_path / "flickr8k")
    broken = data / "Flicker8k_Dataset" / "2008_ab.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    called = call_vlkit(
        "eval", "retrieval", "--model", model, "--data", data, "--split", "test", "--out", tmp_path / "r.jsonl"
    )
    assert called.code == 0, called.err
    (line,) = results(tmp_path / "r.jsonl")
    assert line["counts"]["images"] == 4 and line["counts"]["unreadable_images"] == 1
    assert line["counts"]["texts_of_unreadable_images"] == len(captions(8))
    assert line["left_out"]["unreadable"] == ["2008_ab.jpg"]
    assert "unreadable images, left out of every number: 1" in called.err and "2008_ab.jpg" in called.err


def test_all_splits_together_are_remarked_on(model: str, tmp_path: Path, call_vlkit: CALLS) -> None:
    data = flickr8k(tmp_path / "flickr8k")
    called = call_vlkit("eval", "retrieval", "--model", model, "--data", data, "--out", tmp_path / "r.jsonl")
    assert "No --split was named: all 12 images of test, train, val are used." in called.err
    (line,) = results(tmp_path / "r.jsonl")
    assert line["left_out"]["by_source"] == {"image file missing": 1}


def test_table_columns_report_and_items(model: str, tmp_path: Path, call_vlkit: CALLS) -> None:
    rows = ["picture,words"]
    for number in range(6):
        photograph(tmp_path / "photos" / f"{number}.jpg", number)
        rows += [f'photos/{number}.jpg,"<img src=x onerror=alert({number})>"', f"photos/{number}.jpg,{WORDS[number]}"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    called = call_vlkit(
        "eval", "retrieval", "--model", model, "--data", tmp_path / "table.csv", "--image-column", "picture",
        "--caption-column", "words", "--out", tmp_path / "r.jsonl", "--report", tmp_path / "page" / "report.html",
        "--per-item", tmp_path / "items.parquet",
    )  # fmt: skip
    assert called.code == 0, called.err
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(" in page and "<img src=x" not in page
    items = pq.read_table(tmp_path / "items.parquet").to_pylist()
    assert [item["direction"] for item in items] == ["image_to_text"] * 6 + ["text_to_image"] * 12
    (line,) = results(tmp_path / "r.jsonl")
    hits = [item["hit@1"] for item in items if item["direction"] == "text_to_image"]
    assert line["metrics"]["text_to_image/recall@1"] == pytest.approx(sum(hits) / 12)


def test_classification_of_class_folders(model: str, tmp_path: Path, call_vlkit: CALLS) -> None:
    data = class_folders(tmp_path / "photos")
    (data / "cat" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "names.txt").write_text("Faces => face | person\n")
    arguments = ["eval", "classification", "--model", model, "--data", data, "--out", tmp_path / "r.jsonl"]
    called = call_vlkit(
        *arguments, "--exclude", "Faces_easy", "--templates", "a photo of a {}.", "--report", tmp_path / "report.html"
    )
    assert called.code == 0, called.err
    (line,) = results(tmp_path / "r.jsonl")
    assert line["counts"] == {
        "images": 15,
        "classes": 3,
        "classes_without_images": 0,
        "unreadable_images": 1,
        "images_without_labels": 0,
        "images_of_excluded_classes": 5,
    }
    assert line["protocol"]["class_names"] == "folder name, _ as space; without Faces_easy"
    paths = [data / folder / f"{n}.jpg" for folder in ("Faces", "big_dog", "cat") for n in range(5)]
    expected = dense_accuracy(model, paths, ["Faces", "big dog", "cat"])
    assert line["metrics"]["accuracy@1"] == pytest.approx(expected, abs=1e-6)
    assert "cat/broken.jpg" in called.err and "accuracy@1" in called.out
    assert "Confusion matrix" in (tmp_path / "report.html").read_text(encoding="utf-8")

    called = call_vlkit(*arguments, "--class-names", tmp_path / "names.txt")
    assert called.code == 1
    assert "names no class for 3 of 4 folders: Faces_easy, big_dog, cat" in called.err
    (tmp_path / "names.txt").write_text("Faces => face | person\nbig_dog => dog\ncat => cat\nFaces_easy => easy\n")
    called = call_vlkit(*arguments, "--class-names", tmp_path / "names.txt")
    assert called.code == 0, called.err
    assert results(tmp_path / "r.jsonl")[-1]["protocol"]["class_names"] == "given by names.txt"


def dense_accuracy(model: str, paths: list[Path], names: list[str]) -> float:
    from vlkit.models.load import load_embedder

    embedder = load_embedder(model, device="cpu")
    scores = embedder.embed_images(paths) @ embedder.embed_texts([f"a photo of a {name}." for name in names]).T
    return (scores.argmax(1) == torch.arange(len(paths)) // 5).float().mean().item()


def test_a_missing_file_shows_the_expected_tree(model: str, tmp_path: Path, call_vlkit: CALLS) -> None:
    photograph(tmp_path / "flickr30k-images" / "1.jpg", 1)
    arguments = ["eval", "retrieval", "--model", model, "--data", tmp_path, "--out", tmp_path / "r.jsonl"]
    called = call_vlkit(*arguments, "--format", "flickr30k", "--split", "test")
    assert called.code == 1
    assert "Expected for --format flickr30k:" in called.err and "results_20130124.token" in called.err
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrieval", "--model", "run:none", "--data", "flickr8k", "--split", "tset"], "No split 'tset'"),
        (["retrieval", "--model", "run:none", "--data", "flickr8k"], "No run folder none"),
        (["retrieval", "--model", "run:none", "--data", "photos"], "has a caption"),
        (["retrieval", "--model", "run:none", "--data", "nowhere"], "nowhere does not exist"),
        (["retrieval", "--model", "run:none", "--data", "flickr8k", "--out", "file/r.jsonl"], "file is no folder"),
        (["classification", "--model", "run:none", "--data", "flat"], "FOLDER/CLASS/image.jpg"),
        (["classification", "--model", "run:none", "--data", "photos", "--templates", "simpel"], "Did you mean simple"),
        (["classification", "--model", "run:none", "--data", "photos", "--exclude", "cta"], "Did you mean cat"),
    ],
)
def test_messages(
    arguments: list[str], message: str, tmp_path: Path, call_vlkit: CALLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cheap mistakes are found before a model is loaded: there is none here."""
    monkeypatch.chdir(tmp_path)
    flickr8k(tmp_path / "flickr8k")
    class_folders(tmp_path / "photos")
    photograph(tmp_path / "flat" / "a.jpg", 0)
    (tmp_path / "file").write_text("")
    called = call_vlkit("eval", *arguments)
    assert called.code == 1
    assert message in called.err
    assert not (tmp_path / "results.jsonl").exists()


def test_help_is_quick_and_lists_the_tasks(spawn_vlkit: CALLS) -> None:
    called = spawn_vlkit("eval", "--help")
    assert called.code == 0
    assert "classification" in called.out and "retrieval" in called.out
