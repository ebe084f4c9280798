"""The commands of `vlkit eval` beyond retrieval and classification, on tiny data with a model of random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

CALLS = Callable[..., Any]
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CLASSES = ("big_dog", "cat", "owl", "pug")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("run")
    save_encoder(build_encoder(ARCHITECTURE), run / "model")
    return f"run:{run}"


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((50, 40), Image.Resampling.NEAREST).save(path, "PNG")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(CLASSES):
        for number in range(8):
            picture(root / name / f"{number}.png", 100 * label + number)
    rows = [f"{name}/{number}.png,{'odd' if number % 2 else 'even'}" for name in CLASSES for number in range(8)]
    (root.parent / "groups.csv").write_text("\n".join(["file,group", *rows]))
    return root


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captioned")
    rows = ["filepath,title"]
    for number, (one, other) in enumerate([("dog", "cat"), ("cat", "sofa"), ("dog", "sofa"), ("cat", "dog")] * 2):
        picture(root / f"{number}.png", number)
        rows += [f"{number}.png,a {one} on a {other}", f"{number}.png,the {one} and the {other}"]
    (root / "table.csv").write_text("\n".join(rows))
    return root


def test_every_command_writes_a_line_and_prints_it(
    model: str, photos: Path, captioned: Path, tmp_path: Path, call_vlkit: CALLS
) -> None:
    groups, table, out = photos.parent / "groups.csv", captioned / "table.csv", tmp_path / "r.jsonl"
    commands: dict[str, tuple[list[object], str]] = {
        "probe": (["--data", photos], "accuracy@1"),
        "few-shot": (["--data", photos, "--shots", "1", "--seeds", "1"], "accuracy@1/1_shots"),
        "knn": (["--data", photos, "-k", "1,3"], "accuracy@1/3_neighbours"),
        "base-to-new": (["--data", f"animals={photos}"], "animals/base/accuracy@1"),
        "cross-dataset": (["--data", f"a={photos}", "--target", f"b={photos}"], "targets/accuracy@1"),
        "ood": (["--data", photos, "--near", captioned, "--shifted", f"same={photos}"], "shifted/same/mcm/auroc"),
        "image-retrieval": (["--data", photos], "mean_average_precision"),
        "worst-group": (["--data", photos, "--groups", groups], "group/odd/accuracy@1"),
        "image-caption-choice": (["--data", table, "--form", "swapped"], "text_accuracy"),
        "text-similarity": (["--data", table], "cmc@1"),
    }
    for name, (arguments, metric) in commands.items():
        called = call_vlkit("eval", name, "--model", model, *arguments, "--out", out, "--json")
        assert called.code == 0, (name, called.err)
        line = json.loads(called.out)
        assert line["task"] == name and metric in line["metrics"], name
        assert line["counts"] and line["protocol"] and f"appended to {out}" in called.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["task"] for line in lines] == list(commands)
    by_task = {line["task"]: line for line in lines}
    assert by_task["ood"]["metrics"]["shifted/same/energy/auroc"] == pytest.approx(0.5)
    assert by_task["worst-group"]["counts"]["groups"] == 2
    assert by_task["image-caption-choice"]["protocol"]["instances"].startswith("substitute")
    check_against_scikit_learn(model, photos, by_task["probe"])


def check_against_scikit_learn(model: str, photos: Path, line: dict[str, Any]) -> None:
    """The probe's accuracy once more, from the model's own vectors and scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    from eval.labelled import divide
    from vlkit.data.sources import read_source
    from vlkit.models.load import load_embedder

    parts, embedder = divide(read_source(photos).records), load_embedder(model, device="cpu")
    train = [*parts.train, *parts.val]
    fitted = LogisticRegression(C=line["protocol"]["c"], solver="newton-cholesky", max_iter=1000, tol=1e-12).fit(
        embedder.embed_images(train).double().numpy(), [record.label for record in train]
    )
    test = embedder.embed_images(parts.test).double().numpy()
    assert line["metrics"]["accuracy@1"] == pytest.approx(
        fitted.score(test, [record.label for record in parts.test]), abs=1e-6
    )


def test_files_and_report(model: str, photos: Path, tmp_path: Path, call_vlkit: CALLS) -> None:
    called = call_vlkit(
        "eval", "knn", "--model", model, "--data", photos, "-k", "1", "--out", tmp_path / "r.jsonl",
        "--per-item", tmp_path / "items.parquet", "--report", tmp_path / "page.html", "--exclude", "pug",
    )  # fmt: skip
    assert called.code == 0, called.err
    assert "accuracy@1/1_neighbours" in called.out and (tmp_path / "items.parquet").is_file()
    assert "accuracy@1/1_neighbours" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "9 test images" in called.out or "test images" in called.out


def test_multi_label_data_take_their_own_templates(model: str, tmp_path: Path, call_vlkit: CALLS) -> None:
    import io
    import tarfile

    (tmp_path / "set" / "test").mkdir(parents=True)
    (tmp_path / "set" / "classnames.txt").write_text("sky\nsea\n")
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("a view of the {c}\n")
    (tmp_path / "set" / "dataset_type.txt").write_text("multilabel")
    with tarfile.open(tmp_path / "set" / "test" / "0.tar", "w") as tar:
        for row in range(4):
            picture(tmp_path / "one.png", row)
            hot = io.BytesIO()
            np.save(hot, np.array([1, row % 2]))
            for suffix, content in (("png", (tmp_path / "one.png").read_bytes()), ("npy", hot.getvalue())):
                info = tarfile.TarInfo(f"s{row:07d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    arguments = ["eval", "classification", "--model", model, "--data", tmp_path / "set", "--split", "test", "--json"]
    called = call_vlkit(*arguments, "--out", tmp_path / "r.jsonl")
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["metrics"]["mean_average_precision"] > 0.5 and line["protocol"]["num_templates"] == 1
    assert "1 templates of the data" not in called.out and line["protocol"]["templates"] == "1 given"
    called = call_vlkit(*arguments, "--out", tmp_path / "r.jsonl", "--templates", "photo")
    assert json.loads(called.out)["protocol"]["templates"] == "photo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knn", "-k", "500"], "k is 500, but there are"),
        (["knn", "-k", "few"], "-k 'few': expected whole numbers"),
        (["ood"], "no outside set. Give at least one with --near"),
        (["image-caption-choice", "--form", "winogruond"], "Did you mean winoground?"),
        (["base-to-new", "--exclude", "cta"], "No data set has a class folder 'cta' to exclude. Did you mean cat?"),
        (["caption-judgement"], "holds neither ExpertAnnotations.txt nor"),
        (["text-similarity", "--scored"], "expected a table .csv or .tsv"),
    ],
)
def test_messages(
    arguments: list[str], message: str, model: str, photos: Path, tmp_path: Path, call_vlkit: CALLS
) -> None:
    called = call_vlkit("eval", *arguments, "--model", model, "--data", photos, "--out", tmp_path / "r.jsonl")
    assert called.code == 1 and message in called.err, called.err
    assert not (tmp_path / "r.jsonl").exists()
