"""Results of single commands side by side: two add-ons paired item by item, folds, and what must not be compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CALLS = Callable[..., Any]


@pytest.fixture(scope="module")
def model(models: list[str]) -> str:
    return models[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures of three classes, with two captions each."""
    root = tmp_path_factory.mktemp("data")
    rows = ["image,caption"]
    for number in range(18):
        name = ("ant", "bee", "cat")[number % 3]
        path = root / "photos" / name / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((20, 16)).save(path)
        rows += [f"{path.relative_to(root)},a {name} with the number {number} {copy}" for copy in "xy"]
    (root / "table.csv").write_text("\n".join(rows))
    return root


def test_two_addons_are_compared_image_by_image(model: str, data: Path, tmp_path: Path, call_vlkit: CALLS) -> None:
    out, lines = tmp_path / "results.jsonl", []
    for name, addon in (("plain", []), ("mean", ["--addon", "mean_of_similarities"])):
        called = call_vlkit("eval", "classification", "--model", model, "--data", data / "photos", "--templates",
                            "imagenet80", *addon, "--out", out, "--per-item", tmp_path / "items" / f"{name}.parquet",
                            "--json")  # fmt: skip
        assert called.code == 0, called.err
        lines.append(json.loads(called.out))
    for fact in ("fingerprint", "data_hash"):  # whose equality says that they may be compared
        assert lines[0]["protocol"][fact] == lines[1]["protocol"][fact] and len(lines[0]["protocol"][fact]) == 12
    assert lines[0]["protocol"]["precision"] == "fp32"
    compared = call_vlkit("eval", "compare", f"{out}#1", f"{out}#2", "--json")
    assert compared.code == 0, compared.err
    found = json.loads(compared.out)
    assert found["second"].endswith(", mean_of_similarities") and not found["first"].endswith("mean_of_similarities")
    row = found["metrics"]["accuracy@1"]
    assert (row["first"], row["second"]) == pytest.approx([line["metrics"]["accuracy@1"] for line in lines], abs=1e-7)
    assert row["low"] <= row["difference"] <= row["high"]
    # The page shows both with their figures, since these lie beside the tables.
    page = call_vlkit("eval", "report", out, "--out", tmp_path / "page", "--json")
    assert page.code == 0, page.err
    assert len([path for path in json.loads(page.out)["files"] if path.endswith("confusion_matrix.png")]) == 2
    shown = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    fingerprints = shown[shown.index("<h2>Fingerprints") :]
    assert lines[0]["protocol"]["fingerprint"] in fingerprints and "<td></td>" not in fingerprints
    # A table that another evaluation was written over is no longer that of the first line.
    from_folds = ["--out", out, "--per-item", tmp_path / "items" / "plain.parquet", "--exclude", "ant"]
    assert call_vlkit("eval", "classification", "--model", model, "--data", data / "photos", *from_folds).code == 0
    (tmp_path / "items" / "mean.parquet").write_bytes((tmp_path / "items" / "plain.parquet").read_bytes())
    overwritten = call_vlkit("eval", "compare", f"{out}#1", f"{out}#2")
    assert overwritten.code == 1 and "another evaluation was written over it" in overwritten.err


def test_folds_of_a_table(model: str, data: Path, tmp_path: Path, call_vlkit: CALLS) -> None:
    command = ["eval", "retrieval", "--model", model, "--data", data / "table.csv", "--out", tmp_path / "r.jsonl"]
    called = call_vlkit(*command, "--folds", 3, "--per-item", tmp_path / "a.parquet", "--json")
    assert called.code == 0, called.err
    line = json.loads(called.out)
    assert line["counts"]["images"] == 18 and line["protocol"]["folds"].startswith("mean over 3")
    # Each fold by itself, in the order of the table.
    rows = (data / "table.csv").read_text().splitlines()
    recalls = []
    for fold in range(3):
        part = data / f"fold_{fold}.csv"
        part.write_text("\n".join([rows[0], *rows[1 + 12 * fold : 13 + 12 * fold]]))
        own = call_vlkit("eval", "retrieval", "--model", model, "--data", part, "--out", tmp_path / "o.jsonl", "--json")
        recalls.append(json.loads(own.out)["metrics"]["text_to_image/recall@1"])
    assert line["metrics"]["text_to_image/recall@1"] == pytest.approx(np.mean(recalls), abs=1e-7)
    unequal = call_vlkit(*command, "--folds", 4)
    assert unequal.code == 1 and "18 images with captions cannot be cut into 4 equal folds" in unequal.err
    whole = call_vlkit(*command, "--per-item", tmp_path / "b.parquet")
    assert whole.code == 0, whole.err
    refused = call_vlkit("eval", "compare", f"{tmp_path / 'r.jsonl'}#1", f"{tmp_path / 'r.jsonl'}#2")
    assert refused.code == 1 and "folds: mean over 3" in refused.err and "against none" in refused.err


def test_without_tables_nothing_is_compared(model: str, data: Path, tmp_path: Path, call_vlkit: CALLS) -> None:
    for _ in range(2):
        assert call_vlkit("eval", "classification", "--model", model, "--data", data / "photos", "--out",
                          tmp_path / "r.jsonl").code == 0  # fmt: skip
    refused = call_vlkit("eval", "compare", f"{tmp_path / 'r.jsonl'}#1", f"{tmp_path / 'r.jsonl'}#2")
    assert refused.code == 1 and "Evaluate again with --per-item FILE.parquet" in refused.err
