"""Embedding to disk: the layout, going on after an interruption, and bringing up to date."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.data.records import ImageRef, Record, Source
from vlkit.errors import DataError, GalleryError, ModelError
from vlkit.features.clip_retrieval import read_clip_retrieval
from vlkit.features.embed import EmbedReport, embed_source
from vlkit.features.source import CachedEmbedder
from vlkit.features.store import open_features
from vlkit.features.stored_source import StoredSource
from vlkit.models.embedder import Embedder
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder, construct

CAPTIONS = (("a dog", "the dog", "a dog"), (), ("a cat",), ("a dog", "a hat"))


@pytest.fixture
def model(counted: Any) -> CachedEmbedder:
    return CachedEmbedder(lambda: Embedder(counted, "small"), None)


def photograph(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def source_in(folder: Path, numbers: range | list[int]) -> Source:
    """Photographs with none, one, two or three captions."""
    for number in numbers:
        if not (folder / f"{number}.png").exists():
            photograph(folder / f"{number}.png", number)
    records = [
        Record(f"{n}.png", ImageRef(path=str(folder / f"{n}.png")), CAPTIONS[n % 4], label=n % 2) for n in numbers
    ]
    return Source(tuple(records), "table", folder, class_names=("even", "odd"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_features_are_those_of_the_model(model: CachedEmbedder, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", range(10))
    (tmp_path / "photos" / "6.png").write_bytes(b"no image")
    report = embed_source(source, model, tmp_path / "out", part_size=4)
    assert (report.num_embedded, report.num_parts, report.num_copied) == (9, 3, 0)
    assert [key for key, _ in report.failures] == ["6.png"]

    stored = open_features(tmp_path / "out")
    readable = [record for record in source.records if record.key != "6.png"]
    images = stored.images()
    expected = model.embed_images(readable)
    torch.testing.assert_close(images.pooled, expected, atol=1e-6, rtol=0)
    assert images.ids == tuple(record.key for record in readable)
    assert images.labels is not None and images.labels.tolist() == [0, 1, 0, 1, 0, 1, 1, 0, 1]
    assert images.norm is not None
    pixels = [torch.from_numpy(np.array(Image.open(str(r.image.path)))).permute(2, 0, 1) for r in readable]
    with torch.no_grad():
        raw = model.embedder.encoder.encode_image(
            torch.stack([model.embedder.encoder.preprocess(one) for one in pixels]), normalize=False
        )
    torch.testing.assert_close(images.pooled * images.norm[:, None], raw, atol=1e-5, rtol=1e-5)

    texts = stored.texts()
    captions = [caption for record in readable for caption in record.captions]
    torch.testing.assert_close(texts.pooled, model.embed_texts(captions), atol=1e-6, rtol=0)
    owners = [row for row, record in enumerate(readable) for _ in record.captions]
    assert texts.text_to_image is not None and texts.text_to_image.tolist() == owners
    assert texts.ids[:4] == ("0.png#0", "0.png#1", "0.png#2", "2.png#0")
    assert list(stored.failures) == ["6.png"]


def test_the_layout_is_clip_retrievals(model: CachedEmbedder, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", range(6))
    embed_source(source, model, tmp_path / "out", part_size=4, precision="fp16")
    matrix = np.load(tmp_path / "out" / "img_emb" / "img_emb_1.npy")
    assert matrix.dtype == np.float16 and matrix.shape == (2, 16)
    read = read_clip_retrieval(tmp_path / "out")
    assert len(read) == 6 and read.kinds == ("image", "text")
    rows = read.metadata().to_pylist()
    assert [row["caption"] for row in rows] == ["a dog", None, "a cat", "a dog", "a dog", None]
    assert [row["image_path"] for row in rows] == [str(record.image.path) for record in source.records]
    text = read.rows("text", 0, 6)
    np.testing.assert_allclose(text[0], model.embed_texts(["a dog"])[0], atol=1e-3)
    np.testing.assert_array_equal(text[1], 0)  # no caption
    about = json.loads((tmp_path / "out" / "fingerprint.json").read_text())
    assert {"weights", "preprocess", "tokenizer", "decoder"} <= set(about["identity"]) and "torch" in about["versions"]
    pooled = open_features(tmp_path / "out").images().pooled
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(6))  # exactly unit norm in spite of the rounding


def test_a_second_run_does_nothing_and_needs_no_model(model: CachedEmbedder, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", range(6))
    embed_source(source, model, tmp_path / "out", part_size=4)
    before = content(tmp_path / "out")

    def load() -> Embedder:
        raise AssertionError("the model was loaded")

    report = embed_source(source, CachedEmbedder(load, None, model.card), tmp_path / "out")
    assert (report.num_embedded, report.num_parts_kept) == (0, 2)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("seed", [0])
def test_what_was_interrupted_continues_and_ends_equal(
    model: CachedEmbedder, encoder: Any, tmp_path: Path, seed: int
) -> None:
    source = source_in(tmp_path / "photos", range(12))
    embed_source(source, model, tmp_path / "whole", part_size=3, batch_size=2)
    whole = encoder.num_images
    stop_at = int(np.random.default_rng(seed).integers(4, 11))

    def interrupt(done: int, total: int) -> None:
        if done >= stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_source(source, model, tmp_path / "out", part_size=3, batch_size=2, progress=interrupt)
    with pytest.raises(GalleryError, match=r"not finished: \d of 4 parts"):
        open_features(tmp_path / "out")
    encoder.num_images = 0
    report = embed_source(source, model, tmp_path / "out", part_size=3, batch_size=2)
    assert report.num_parts_kept == (stop_at - 1) // 3 and encoder.num_images == whole - 3 * report.num_parts_kept
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_update_embeds_what_is_new_and_ends_like_a_fresh_run(
    model: CachedEmbedder, encoder: Any, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("stays")
    embed_source(source_in(photos, range(10)), model, tmp_path / "out", part_size=3)
    photograph(photos / "4.png", 99)  # changed
    changed = source_in(photos, [*range(1, 8), 20, 21])  # 0, 8, 9 gone; 20, 21 new
    with pytest.raises(DataError, match=r"2 images are new, 1 changed, 3 gone.*--update"):
        embed_source(changed, model, tmp_path / "out", part_size=3)
    encoder.num_images = encoder.num_texts = 0
    report = embed_source(changed, model, tmp_path / "out", part_size=3, update=True)
    assert (report.num_embedded, report.num_copied, report.num_removed) == (3, 6, 3)
    assert encoder.num_images == 3 and encoder.num_texts == 0  # all captions were there
    embed_source(changed, model, tmp_path / "fresh", part_size=3)
    updated, fresh = open_features(tmp_path / "out"), open_features(tmp_path / "fresh")
    assert updated.metadata.drop_columns(["norm"]).equals(fresh.metadata.drop_columns(["norm"]))
    for mine, theirs in ((updated.images(), fresh.images()), (updated.texts(), fresh.texts())):
        torch.testing.assert_close(mine.pooled, theirs.pooled, atol=1e-6, rtol=0)
        assert mine.ids == theirs.ids
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fingerprint.json", "img_emb", "metadata", "mine.txt", "more_text_emb", "text_emb",
    ]  # fmt: skip


def test_an_interrupted_update_leaves_the_old_set_and_continues(
    model: CachedEmbedder, encoder: Any, tmp_path: Path
) -> None:
    embed_source(source_in(tmp_path / "photos", range(4)), model, tmp_path / "out", part_size=2)
    more = source_in(tmp_path / "photos", range(12))

    def interrupt(done: int, total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_source(more, model, tmp_path / "out", part_size=2, update=True, progress=interrupt)
    assert len(open_features(tmp_path / "out").images()) == 4
    encoder.num_images = 0
    report = embed_source(more, model, tmp_path / "out", part_size=2, update=True)
    assert encoder.num_images == 4 and report.num_parts_kept == 4
    assert len(open_features(tmp_path / "out").images()) == 12


def test_a_move_that_was_killed_is_finished(model: CachedEmbedder, tmp_path: Path) -> None:
    """Every state in which `move_in` can be killed, from the marker on."""
    from vlkit.features.stage import COMPLETE, stage_folder

    embed_source(source_in(tmp_path / "photos", [0, 1]), model, tmp_path / "old")
    source = source_in(tmp_path / "photos", [0, 1, 2])
    embed_source(source, model, tmp_path / "new")
    expected = content(tmp_path / "new")
    names = ["img_emb", "text_emb", "more_text_emb", "metadata"]
    for done in range(len(names) + 1):
        out = tmp_path / f"out{done}"
        subprocess.run(["cp", "-r", tmp_path / "old", out], check=True)
        stage = stage_folder(out, open_features(tmp_path / "new").about.plan)
        subprocess.run(["cp", "-r", tmp_path / "new", stage], check=True)
        (stage / COMPLETE).write_text(json.dumps(names))
        for name in names[:done]:
            subprocess.run(["rm", "-r", out / name], check=True)
            (stage / name).rename(out / name)
        with pytest.raises(GalleryError, match="was interrupted"):
            open_features(out)
        embed_source(source, model, out, update=True)
        assert content(out) == expected


def test_processes_share_the_parts(model: CachedEmbedder, encoder: Any, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", range(9))
    embed_source(source, model, tmp_path / "whole", part_size=2)
    encoder.num_images = 0
    reports = [
        embed_source(source, model, tmp_path / "out", part_size=2, rank=rank, world_size=3) for rank in (2, 1, 0)
    ]
    assert [report.num_embedded for report in reports] == [2, 3, 4] and encoder.num_images == 9
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_patches(model: CachedEmbedder, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", range(5))
    embed_source(source, model, tmp_path / "out", part_size=3, patches=True)
    images = open_features(tmp_path / "out").images(patches=True)
    assert images.grid == (2, 2) and images.patches is not None and images.patches.shape == (5, 4, 16)
    pixels = [torch.from_numpy(np.array(Image.open(str(r.image.path)))).permute(2, 0, 1) for r in source.records]
    encoder = model.embedder.encoder
    with torch.no_grad():
        expected = encoder.encode_patches(torch.stack([encoder.preprocess(one) for one in pixels]))
    torch.testing.assert_close(images.patches, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(images.pooled, model.embed_images(source.records), atol=1e-6, rtol=0)
    more = source_in(tmp_path / "photos", range(7))
    report = embed_source(more, model, tmp_path / "out", part_size=3, patches=True, update=True)
    assert (report.num_copied, report.num_embedded) == (5, 2)
    updated = open_features(tmp_path / "out").images(patches=True).patches
    assert updated is not None
    torch.testing.assert_close(updated[:5], images.patches)
    with pytest.raises(GalleryError, match="was begun with --patches"):
        embed_source(more, model, tmp_path / "out")
    embed_source(source, model, tmp_path / "plain")
    with pytest.raises(GalleryError, match="holds no patches"):
        open_features(tmp_path / "plain").images(patches=True)


def of_other_weights(model: CachedEmbedder) -> CachedEmbedder:
    torch.manual_seed(1)
    built = Embedder(construct(model.embedder.encoder.architecture).eval(), "other")
    return CachedEmbedder(lambda: built, None)


def in_half(model: CachedEmbedder, source: Source, out: Path) -> EmbedReport:
    return embed_source(source, model, out, precision="fp16")


def other(model: CachedEmbedder, source: Source, out: Path) -> EmbedReport:
    return embed_source(source, of_other_weights(model), out)


def in_other_parts(model: CachedEmbedder, source: Source, out: Path) -> EmbedReport:
    return embed_source(source, model, out, part_size=2)


def foreign(model: CachedEmbedder, source: Source, out: Path) -> EmbedReport:
    (out / "fingerprint.json").unlink()
    return embed_source(source, model, out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (in_half, "holds fp32, not fp16"),
        (in_other_parts, "has parts of 1024 images, not 2"),
        (other, r"model small\) and this model \(model other\) do not go together: weights: \w{12} here"),
        (foreign, "without fingerprint.json: another tool's"),
    ],
)
def test_what_does_not_go_together_is_refused(
    model: CachedEmbedder, tmp_path: Path, call: Callable[..., EmbedReport], message: str
) -> None:
    source = source_in(tmp_path / "photos", range(3))
    embed_source(source, model, tmp_path / "out")
    with pytest.raises(GalleryError, match=message):
        call(model, source, tmp_path / "out")


def test_bad_input(model: CachedEmbedder, encoder: Any, tmp_path: Path, small: dict[str, Any]) -> None:
    source = source_in(tmp_path / "photos", range(3))
    with pytest.raises(GalleryError, match=r"holds no features: it has no fingerprint.json \(found: photos\)"):
        open_features(tmp_path)
    with pytest.raises(DataError, match="There is no image"):
        embed_source(replace(source, records=()), model, tmp_path / "out")
    for record in source.records:
        Path(str(record.image.path)).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"None of the 3 images could be read. First: 0\.png"):
        embed_source(source, model, tmp_path / "out")
    broken = OpenClipEncoder(build_encoder(small).model, encoder.architecture)
    broken.log_scale.data.fill_(0)
    next(iter(broken.model.visual.parameters())).data.fill_(float("nan"))
    with pytest.raises(GalleryError, match=r"not finite for 1 of 1 images \(first: '1\.png'\)"):
        photograph(tmp_path / "photos" / "1.png", 1)
        built = Embedder(broken.eval(), "broken")
        embed_source(source, CachedEmbedder(lambda: built, None), tmp_path / "nan")
    assert not (tmp_path / "nan" / "metadata").exists()


def test_images_only(model: CachedEmbedder, encoder: Any, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", [1, 5])  # neither has a caption
    embed_source(source, model, tmp_path / "out")
    assert encoder.num_texts == 0 and not (tmp_path / "out" / "text_emb").exists()
    with pytest.raises(GalleryError, match="holds no captions"):
        open_features(tmp_path / "out").texts()


def test_a_model_without_a_way_to_patches_is_refused(tmp_path: Path, small: dict[str, Any]) -> None:
    config = {**small, "vision_cfg": {**small["vision_cfg"], "pool_type": "avg", "final_ln_after_pool": True}}
    built = Embedder(build_encoder(config).eval(), "after")
    with pytest.raises(ModelError, match="no place in the joint space"):
        embed_source(
            source_in(tmp_path / "photos", [0]), CachedEmbedder(lambda: built, None), tmp_path / "out", patches=True
        )


def test_a_stored_set_answers_like_the_model(model: CachedEmbedder, encoder: Any, tmp_path: Path) -> None:
    source = source_in(tmp_path / "photos", range(8))
    (tmp_path / "photos" / "6.png").write_bytes(b"no image")
    embed_source(source, model, tmp_path / "out", part_size=3)
    expected = model.embed_images_where_readable(source.records)
    texts = ["a cat", "a photo of a cat", "the dog"]
    expected_texts = model.embed_texts(texts)
    encoder.num_images = encoder.num_texts = 0
    stored = StoredSource(open_features(tmp_path / "out"), model)
    found = stored.embed_images_where_readable(source.records)
    torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-6, rtol=0)
    assert found.kept == expected.kept and [row for row, _ in found.failures] == [6]
    torch.testing.assert_close(stored.embed_texts(texts), expected_texts, atol=1e-6, rtol=0)
    assert (encoder.num_images, encoder.num_texts) == (0, 1)
    with pytest.raises(GalleryError, match=r"no features of 1 of 9 images \(first: 8\.png\)"):
        stored.embed_images(source_in(tmp_path / "photos", range(9)).records)
    photograph(tmp_path / "photos" / "0.png", 0)
    Image.new("RGB", (300, 300)).save(tmp_path / "photos" / "0.png")
    with pytest.raises(GalleryError, match=r"0\.png has \d+ bytes, and had \d+ when"):
        stored.embed_images([source.records[0]])
    with pytest.raises(GalleryError, match="do not go together: weights"):
        StoredSource(open_features(tmp_path / "out"), of_other_weights(model))
