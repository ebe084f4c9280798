"""`methods`, `adapt`, `eval addons` and `--addon` on a tiny model and tiny pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ("red_thing", "green_thing", "blue_thing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_encoder(build_encoder(config), folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures a class, told apart by their colour, and as many captioned ones in three splits."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = ["path,caption,split"]
    for label, name in enumerate(CLASSES):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(100 * label + number).integers(0, 90, (36, 36, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / "classes" / name / f"{number}.png")
            split = "test" if number < 3 else "train"
            lines.append(f"classes/{name}/{number}.png,a {name.replace('_', ' ')} {number},{split}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def test_methods_lists_every_table(call_vlkit: Callable[..., Any]) -> None:
    rows = json.loads(call_vlkit("methods", "--json").out)
    assert set(rows[0]) == {"name", "slot", "needs", "cost", "source", "when"}
    slots = {row["name"]: row["slot"] for row in rows}
    assert slots["clip"] == "loss" and slots["tip_adapter"] == "terms" and slots["retrieval"] == "evaluator"
    assert {"templates", "mean", "top_k_mean", "log_sum_exp", "distribution_norm"} <= slots.keys()
    chosen = json.loads(call_vlkit("methods", "--slot", "gallery_bias", "--json").out)
    assert {row["slot"] for row in chosen} == {"gallery_bias"}
    assert "tip_adapter" in call_vlkit("methods").out
    wrong = call_vlkit("methods", "--slot", "term")
    assert wrong.code == 1 and "Did you mean terms" in wrong.err


def test_adapt_saves_what_classify_and_eval_take(
    call_vlkit: Callable[..., Any], model: str, pictures: Path, tmp_path: Path
) -> None:
    folder, out = pictures / "classes", tmp_path / "tip"
    told = call_vlkit("adapt", "tip_adapter", "--model", model, "--data", folder, "--shots", 3, "--out", out, "--json")
    assert told.code == 0, told.err
    record = json.loads(told.out)
    assert record["method"] == "tip_adapter" and len(record["held_out"]) == 9
    assert record["fitted_on"]["few_shot_labels"] == "train: 9"
    assert record["validation"]["with_addon"] > record["validation"]["plain"]
    assert (out / "addon.json").is_file()
    again = call_vlkit("adapt", "tip_adapter", "--model", model, "--data", folder, "--shots", 3, "--out", out)
    assert again.code == 1 and "not empty" in again.err

    names = "red thing,green thing,blue thing"
    order = "blue thing,green thing,red thing"  # as the folders are sorted
    sorted_names = call_vlkit("classify", folder, "--model", model, "--classes", order, "--addon", out, "--json")
    assert sorted_names.code == 0, sorted_names.err
    found = [json.loads(line) for line in sorted_names.out.splitlines()]
    right = [item["path"].split("/")[-2].replace("_", " ") == item["classes"][0]["name"] for item in found]
    assert len(right) == 24 and sum(right) > 20
    other = call_vlkit("classify", folder, "--model", model, "--classes", names, "--addon", out)
    assert other.code == 1 and "fitted for other classes" in other.err

    results = tmp_path / "results.jsonl"
    for extra in ([], ["--addon", out]):
        done = call_vlkit(
            "eval", "classification", "--model", model, "--data", folder, "--out", results, "--json", *extra
        )
        assert done.code == 0, done.err
    plain, adapted = (json.loads(line) for line in results.read_text().splitlines())
    assert adapted["metrics"]["accuracy@1"] > plain["metrics"]["accuracy@1"]
    assert adapted["protocol"]["addons"][0]["name"] == "tip_adapter" and "addons" not in plain["protocol"]
    assert adapted["protocol"]["addons"][0]["needs"] == ["class_names", "few_shot_labels", "val_labels", "views"]


def test_adapt_says_what_is_wrong(call_vlkit: Callable[..., Any], model: str, pictures: Path, tmp_path: Path) -> None:
    def told(method: str, *extra: object, data: object = pictures / "classes") -> str:
        done = call_vlkit("adapt", method, "--model", model, "--data", data, "--out", tmp_path / "x", *extra)
        assert done.code == 1, done.out
        return str(done.err)

    assert "Did you mean tip_adapter" in told("tip_adaptor")
    assert "Class 'blue thing' has 8 images, too few for 9 shots" in told("tip_adapter", "--shots", 9)
    assert "bank of 100 unlabelled images was asked for" in told("distribution_norm", "--shots", 2)
    for method in ("tda", "tfup"):  # they have no images of their own to learn from
        refused = told(method, "--shots", 2)
        assert f"{method} needs test_stream (the test images themselves: nothing is fitted beforehand" in refused
    few = call_vlkit(
        "adapt", "tip_adapter", "--model", model, "--data", pictures / "classes", "--shots", 7, "--out", tmp_path / "y"
    )
    assert few.code == 0 and "too few to hold 4 out" in few.err
    wordnet = tmp_path / "ids" / "n01440764"
    wordnet.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(wordnet / "a.png")
    assert "are WordNet ids (such as n01440764)" in told("tip_adapter", data=wordnet.parent)
    assert "neither classes nor captions to fit on" in told("tip_adapter", data=wordnet)


def test_a_bias_is_fitted_on_train_and_measured_on_test(
    call_vlkit: Callable[..., Any], model: str, pictures: Path, tmp_path: Path
) -> None:
    data = pictures / "captions.csv"
    common = ("eval", "retrieval", "--model", model, "--data", data, "--out", tmp_path / "r.jsonl", "--json")
    done = call_vlkit(*common, "--split", "test", "--addon", "top_k_mean:k=5")
    assert done.code == 0, done.err
    line = json.loads(done.out)
    assert line["protocol"]["addons"][0]["fitted_on"] == {"captions": "train: 15", "unlabelled_images": "train: 15"}
    assert line["counts"]["images"] == 9
    mixed = call_vlkit(*common, "--addon", "mean")
    assert mixed.code == 1 and "on images that are not measured" in mixed.err
    two = call_vlkit(*common, "--split", "test", "--addon", "mean", "--addon", "top_k_mean:k=5")
    assert two.code == 1 and "correct twice" in two.err


def test_leaderboard_of_classes_and_of_captions(
    call_vlkit: Callable[..., Any], model: str, pictures: Path, tmp_path: Path
) -> None:
    report = tmp_path / "board.html"
    chosen = ("--addon", "tip_adapter", "--addon", "mean", "--addon", "templates", "--addon", "distribution_norm")
    common = ("eval", "addons", "--model", model, "--shots", 3, "--json", *chosen)
    board = json.loads(call_vlkit(*common, "--data", pictures / "classes", "--report", report).out)
    assert board["rows"][0]["name"] == "plain"
    assert {row["name"] for row in board["rows"]} == {"plain", "tip_adapter", "mean", "templates"}
    assert "bank of 100" in board["left_out"]["distribution_norm"]
    # All images plain once, and the few shots once in ten views.
    assert board["num_passes"] == 2
    tip = next(row for row in board["rows"] if row["name"] == "tip_adapter")
    change = tip["differences"]["accuracy@1"]
    assert change["difference"] == pytest.approx(
        tip["metrics"]["accuracy@1"] - board["rows"][0]["metrics"]["accuracy@1"]
    )
    assert change["low"] <= change["difference"] <= change["high"]
    page = report.read_text()
    assert "tip_adapter" in page and "Left out" in page

    board = json.loads(call_vlkit(*common, "--data", pictures / "captions.csv").out)
    assert board["bench"]["task"] == "retrieval"
    assert {row["name"] for row in board["rows"]} == {"plain", "mean"}
    assert "not for retrieval" in board["left_out"]["templates"]


def test_the_leaderboard_says_what_is_wrong(call_vlkit: Callable[..., Any], model: str, pictures: Path) -> None:
    def told(data: str, *extra: object) -> str:
        done = call_vlkit("eval", "addons", "--model", model, "--data", pictures / data, "--shots", 3, *extra)
        assert done.code == 1, done.out
        return str(done.err)

    refused = told("classes", "--addon", "weicom", "--addon", "templates:templates=unknown")
    assert "weicom is for retrieval" in refused and "neither a set" in refused
    assert "Nothing that --addon names can be used" in refused
    assert "--on is for captioned images" in told("classes", "--on", "dev", "--addon", "mean")
    assert "are for classes, but" in told("captions.csv", "--exclude", "a", "--addon", "mean")


def test_retrieve_with_a_saved_bias(call_vlkit: Callable[..., Any], model: str, pictures: Path, tmp_path: Path) -> None:
    features, bias = tmp_path / "features", tmp_path / "bias"
    data = pictures / "captions.csv"
    assert call_vlkit("embed", data, "--model", model, "--out", features).code == 0
    done = call_vlkit("adapt", "mean:lam=4", "--model", model, "--data", data, "--out", bias, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["fitted_on"] == {"captions": "train: 15", "unlabelled_images": "train: 15"}
    search = ("retrieve", features, "--text", "a red thing", "-k", 24, "--json")
    plain = {item["id"]: item["score"] for item in json.loads(call_vlkit(*search).out)["results"]}
    found = json.loads(call_vlkit(*search, "--addon", bias).out)
    assert found["query"]["addons"] == "mean" and len(found["results"]) == 24
    assert found["results"][0]["path"].endswith(found["results"][0]["id"])
    from vlkit.addons.exchange import Vectors
    from vlkit.addons.saved import load_addon
    from vlkit.features.store import open_features

    images = open_features(features).images()
    amount = load_addon(bias).bias(Vectors("image", images.pooled))  # type: ignore[attr-defined]
    by_hand = {name: plain[name] - float(lost) for name, lost in zip(images.ids, amount, strict=True)}
    assert [item["id"] for item in found["results"]] == sorted(by_hand, key=lambda name: -by_hand[name])
    unfitted = call_vlkit(*search, "--addon", "mean")
    assert unfitted.code == 1 and "not fitted" in unfitted.err


def test_a_stream_is_the_tested_images_and_the_result_says_so(
    call_vlkit: Callable[..., Any], model: str, pictures: Path, tmp_path: Path
) -> None:
    data = ("--model", model, "--data", pictures / "classes", "--out", tmp_path / "r.jsonl", "--json")
    found = json.loads(call_vlkit("eval", "classification", *data, "--addon", "tda").out)["protocol"]
    assert found["transductive"] is True and found["stream"] == "images in the order of the data"
    assert found["addons"][0]["fitted_on"] == {"class_names": "3", "test_stream": "test: 24, unlabelled"}
