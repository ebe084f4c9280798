"""`vlkit embed`, `index`, `retrieve` and `cache`, and what the cache spares `classify` and `eval`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

CALL = Callable[..., Any]
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class Forwards:
    """Images and texts that went through any tower in this process: its first layer sees each once."""

    images = 0
    texts = 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            self.images += len(output)
        if isinstance(module, nn.Embedding):
            self.texts += len(output)

    def reset(self) -> None:
        self.images = self.texts = 0


@pytest.fixture
def forwards() -> Iterator[Forwards]:
    counter = Forwards()
    handle = register_module_forward_hook(counter)
    yield counter
    handle.remove()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    return [f"local-dir:{save_encoder(build_encoder(ARCHITECTURE), folder / name)}" for name in "ab"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of four photographs, one of them broken."""
    for number in range(8):
        photograph(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    (tmp_path / "photos" / "dog" / "7.png").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def captioned(tmp_path: Path, photos: Path) -> Path:
    lines = ["filepath,title"]
    for number in range(7):
        lines += [f"photos/{('cat', 'dog')[number % 2]}/{number}.png,picture {number} number {k}" for k in range(2)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    return tmp_path / "table.csv"


def photograph(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_classify_encodes_each_image_and_text_once(
    call_vlkit: CALL, models: list[str], photos: Path, forwards: Forwards
) -> None:
    arguments = ["classify", photos, "--model", models[0], "--templates", "photo", "--json"]
    first = call_vlkit(*arguments, "--classes", "dog,cat")
    assert first.code == 0, first.err
    assert (forwards.images, forwards.texts) == (7, 2)
    forwards.reset()
    assert call_vlkit(*arguments, "--classes", "dog,cat").out == first.out
    assert (forwards.images, forwards.texts) == (0, 0)
    assert call_vlkit(*arguments, "--classes", "dog,horse,cow").code == 0
    assert (forwards.images, forwards.texts) == (0, 2)
    forwards.reset()
    photograph(photos / "new.png", 50)
    assert call_vlkit(*arguments, "--classes", "dog,cat").code == 0
    assert (forwards.images, forwards.texts) == (1, 0)
    forwards.reset()
    assert call_vlkit(*arguments, "--classes", "dog,cat", "--no-cache").code == 0
    assert (forwards.images, forwards.texts) == (8, 2)


def test_eval_encodes_nothing_a_second_time(
    call_vlkit: CALL, models: list[str], photos: Path, captioned: Path, tmp_path: Path, forwards: Forwards
) -> None:
    out = tmp_path / "r.jsonl"
    runs = (
        ["eval", "retrieval", "--model", models[0], "--data", captioned, "--out", out],
        ["eval", "classification", "--model", models[0], "--data", photos, "--out", out],
    )
    expected = {0: (7, 14), 1: (0, 14)}  # the photographs are the same
    for number, arguments in enumerate(runs):
        forwards.reset()
        assert call_vlkit(*arguments).code == 0
        assert (forwards.images, forwards.texts) == expected[number]
        forwards.reset()
        assert call_vlkit(*arguments).code == 0
        assert (forwards.images, forwards.texts) == (0, 0)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        del line["run"]
    assert lines[0] == lines[1] and lines[2] == lines[3]


def test_eval_on_stored_features(
    call_vlkit: CALL, models: list[str], captioned: Path, photos: Path, tmp_path: Path, forwards: Forwards
) -> None:
    folder, out = tmp_path / "features", tmp_path / "r.jsonl"
    called = call_vlkit("embed", captioned, "--model", models[0], "--out", folder, "--part-size", 3, "--json")
    assert called.code == 0, called.err
    report = json.loads(called.out)
    assert (report["images"], report["embedded"], report["parts"], report["unreadable"]) == (7, 7, 3, 0)
    forwards.reset()
    arguments = ["eval", "retrieval", "--data", captioned, "--out", out]
    assert call_vlkit(*arguments, "--model", models[0], "--features", folder).code == 0
    assert (forwards.images, forwards.texts) == (0, 0)
    assert call_vlkit(*arguments, "--model", models[0], "--no-cache").code == 0
    stored, direct = (json.loads(line) for line in out.read_text().splitlines())
    assert stored["metrics"] == direct["metrics"] and stored["protocol"] == direct["protocol"]
    called = call_vlkit(*arguments, "--model", models[1], "--features", folder)
    assert called.code == 1 and "do not go together: weights:" in called.err
    called = call_vlkit(*arguments, "--model", models[0], "--features", photos)
    assert called.code == 1 and "holds no features" in called.err


def test_classification_on_stored_features(
    call_vlkit: CALL, models: list[str], photos: Path, tmp_path: Path, forwards: Forwards
) -> None:
    folder, out = tmp_path / "features", tmp_path / "r.jsonl"
    arguments = ["eval", "classification", "--model", models[0], "--data", photos, "--out", out, "--no-cache"]
    assert call_vlkit("embed", photos, "--model", models[0], "--out", folder, "--precision", "fp16").code == 0
    assert call_vlkit(*arguments).code == 0
    forwards.reset()
    assert call_vlkit(*arguments, "--features", folder).code == 0
    assert (forwards.images, forwards.texts) == (0, 14)
    direct, stored = (json.loads(line) for line in out.read_text().splitlines())
    assert stored["counts"] == direct["counts"] and stored["left_out"] == direct["left_out"]
    assert stored["metrics"] == pytest.approx(direct["metrics"], abs=1e-3)
    assert stored["protocol"].pop("features") == "stored as fp16"
    # Rounded features may change a number, so the two are told apart.
    assert stored["protocol"].pop("fingerprint") != direct["protocol"].pop("fingerprint")
    assert stored["protocol"] == direct["protocol"]


def test_embed_names_what_it_could_not_read(call_vlkit: CALL, models: list[str], photos: Path, tmp_path: Path) -> None:
    called = call_vlkit("embed", photos, "--model", models[0], "--out", tmp_path / "features")
    assert called.code == 0, called.err
    assert "unreadable images, all named in" in called.err and "failures: 1" in called.err and "dog/7.png" in called.err
    photograph(photos / "dog" / "7.png", 7)
    arguments = ["embed", photos, "--model", models[0], "--out", tmp_path / "features"]
    called = call_vlkit(*arguments)
    assert called.code == 1 and "--update" in called.err
    report = json.loads(call_vlkit(*arguments, "--update", "--json").out)
    assert (report["embedded"], report["copied"], report["failures"]) == (1, 7, [])


def test_search(
    call_vlkit: CALL, models: list[str], captioned: Path, photos: Path, tmp_path: Path, forwards: Forwards
) -> None:
    from vlkit.models.load import load_embedder

    folder = tmp_path / "features"
    assert call_vlkit("embed", captioned, "--model", models[0], "--out", folder).code == 0
    retrieve = ["retrieve", folder, "--json", "-k", 3]
    called = call_vlkit(*retrieve, "--text", "a cat")
    assert called.code == 0 and "has no index" in called.err
    assert json.loads(call_vlkit("index", "build", folder, "--json").out)["items"] == 7
    indexed = call_vlkit(*retrieve, "--text", "a cat")
    assert indexed.out == called.out and "has no index" not in indexed.err

    embedder = load_embedder(models[0], device="cpu")
    keys = [f"photos/{('cat', 'dog')[n % 2]}/{n}.png" for n in range(7)]
    gallery = embedder.embed_images([tmp_path / key for key in keys])
    text, image = embedder.embed_texts(["a cat"])[0], gallery[4]
    mean = (text + image) / (text + image).norm()
    asked = {
        ("--text", "a cat"): text,
        ("--image", str(photos / "cat" / "4.png")): image,
        ("--text", "a cat", "--image", str(photos / "cat" / "4.png")): mean,
    }
    for options, vector in asked.items():
        answer = json.loads(call_vlkit(*retrieve, *options).out)
        best = (gallery @ vector).topk(3)
        assert [item["id"] for item in answer["results"]] == [keys[place] for place in best.indices]
        assert [item["score"] for item in answer["results"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert answer["query"]["rule"].startswith("mean of the unit vectors")
    first = answer["results"][0]
    assert first["path"] == str(tmp_path / first["id"]) and first["caption"].startswith("picture")
    forwards.reset()
    called = call_vlkit("retrieve", folder, "--text", "a cat", "-k", 50)
    assert "holds 7 images, fewer than the 50" in called.err and forwards.texts == 0


def test_the_page_shows_hostile_captions_as_text(
    call_vlkit: CALL, models: list[str], photos: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("filepath,title\nphotos/cat/0.png,<script>alert(1)</script>\nphotos/cat/2.png,b\n")
    assert call_vlkit("embed", table, "--model", models[0], "--out", tmp_path / "f").code == 0
    (photos / "cat" / "2.png").unlink()
    page = tmp_path / "page" / "gallery.html"
    query = ["--text", "<b>bold</b>", "--image", photos / "cat/0.png"]
    called = call_vlkit("retrieve", tmp_path / "f", *query, "--open", page)
    assert called.code == 0, called.err
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "<script>alert" not in text and "<b>bold" not in text
    assert text.count("data:image/jpeg") == 2  # the query and the photograph that is still there


def test_an_index_follows_its_collection(call_vlkit: CALL, models: list[str], photos: Path, tmp_path: Path) -> None:
    folder, more = tmp_path / "features", tmp_path / "more"
    assert call_vlkit("embed", photos, "--model", models[0], "--out", folder).code == 0
    assert call_vlkit("index", "build", folder).code == 0
    photograph(tmp_path / "others" / "x.png", 30)
    assert call_vlkit("embed", tmp_path / "others", "--model", models[0], "--out", more).code == 0
    assert json.loads(call_vlkit("index", "add", folder, more, "--json").out) == {
        "index": str(folder / "index"), "added": 1, "items": 8,
    }  # fmt: skip
    called = call_vlkit("index", "add", folder, more)
    assert called.code == 1 and "'x.png' stands twice" in called.err
    answer = json.loads(call_vlkit("retrieve", folder, "--image", tmp_path / "others" / "x.png", "-k", 1, "--json").out)
    assert answer["results"][0]["path"] == str(tmp_path / "others" / "x.png")
    assert call_vlkit("index", "remove", folder, "x.png", "cat/0.png").code == 0
    assert json.loads(call_vlkit("index", "info", folder, "--json").out)["items"] == 6
    called = call_vlkit("index", "remove", folder, "cat/1.png")
    assert called.code == 1 and "not in the index" in called.err
    assert call_vlkit("embed", tmp_path / "others", "--model", models[1], "--out", tmp_path / "of_b").code == 0
    called = call_vlkit("index", "add", folder, tmp_path / "of_b")
    assert called.code == 1 and "do not go together" in called.err
    called = call_vlkit("retrieve", folder, "--text", "a cat", "--model", models[1])
    assert called.code == 1 and "do not go together" in called.err
    photograph(photos / "cat" / "8.png", 8)
    assert call_vlkit("embed", photos, "--model", models[0], "--out", folder, "--update").code == 0
    called = call_vlkit("retrieve", folder, "--text", "a cat")
    assert called.code == 1 and "changed since they were indexed" in called.err
    assert call_vlkit("index", "build", folder).code == 0
    assert call_vlkit("retrieve", folder, "--text", "a cat").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrieve", "nowhere", "--text", "a"], "nowhere holds no features"),
        (["retrieve", "nowhere"], "--text WORDS, --image FILE, or both"),
        (["index", "build", "photos"], "photos holds no features: it has no fingerprint.json (found: cat, dog)"),
        (["index", "info", "photos"], "There is no index in photos"),
        (["index", "remove", "photos"], "Name the images to remove"),
        (["embed", "nowhere", "--model", "run:none", "--out", "o"], "nowhere does not exist"),
        (["embed", "photos", "--model", "run:none", "--out", "o"], "No run folder none"),
    ],
)
def test_messages(
    call_vlkit: CALL, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    called = call_vlkit(*arguments)
    assert called.code == 1 and message in called.err, called.err


def test_cache_info_and_clear(call_vlkit: CALL, models: list[str], photos: Path, own_cache: Path) -> None:
    assert json.loads(call_vlkit("cache", "info", "--json").out) == {
        "folder": str(own_cache), "num_bytes": 0, "entries": [],
    }  # fmt: skip
    assert call_vlkit("classify", photos, "--model", models[0], "--classes", "dog,cat").code == 0
    told = json.loads(call_vlkit("cache", "info", "--json").out)
    assert {entry["kind"]: entry["num_items"] for entry in told["entries"]} == {"images": 7, "texts": 14}
    assert models[0] in call_vlkit("cache", "info").out
    called = call_vlkit("cache", "clear", "--model", "run:nothing")
    assert called.code == 1 and "holds no features of 'run:nothing'" in called.err
    assert json.loads(call_vlkit("cache", "clear", "--json").out)["num_bytes"] == told["num_bytes"]
    assert json.loads(call_vlkit("cache", "info", "--json").out)["num_bytes"] == 0


def test_an_unusable_cache_is_an_error_that_says_what_to_do(
    call_vlkit: CALL, models: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLKIT_CACHE", str(tmp_path / "file"))
    called = call_vlkit("classify", photos, "--model", models[0], "--classes", "dog,cat")
    assert called.code == 1 and "Cannot write the cache" in called.err and "--no-cache" in called.err
    assert call_vlkit("classify", photos, "--model", models[0], "--classes", "dog,cat", "--no-cache").code == 0
