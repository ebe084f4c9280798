"""A teacher's features stored in shards: they are its own, and training with them is training with the teacher."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.copy_samples import copy_samples
from data_tools.reinforce import reinforce_shards
from vlkit.config import AugmentSettings, load_run
from vlkit.contracts import ImageTextBatch
from vlkit.data.captions import caption_hash
from vlkit.data.shard_index import ShardSet
from vlkit.errors import CheckpointError, ConfigError, DataError, ModelError
from vlkit.models.embedder import Embedder
from vlkit.models.load import load_embedder
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder
from vlkit.training import assemble, training_data
from vlkit.training.plan import dry_run
from vlkit.training.pretrain import pretrain
from vlkit.training.stored_teacher import StoredTeacher, TeacherRecord, parse_npy, teacher_of
from vlkit.training.teacher import Teacher

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
SMALL = {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT}


def files_of(seed: int, broken: bool = False) -> Iterator[tuple[str, bytes]]:
    made = np.random.default_rng(seed)
    for i in range(6):
        picture = io.BytesIO()
        Image.fromarray(made.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture, "PNG")
        yield f"{seed}{i:03d}.png", b"no picture" if broken and i == 2 else picture.getvalue()
        yield f"{seed}{i:03d}.txt", f"caption {i} of {seed}\nanother of number {i}".encode()
        yield f"{seed}{i:03d}.json", json.dumps({"synthetic": [f"made up for {i}"]}).encode()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    return f"local-dir:{save_encoder(build_encoder(SMALL), tmp_path_factory.mktemp('teacher') / 'model')}"


@pytest.fixture(scope="module")
def embedder(teacher: str) -> Embedder:
    return load_embedder(teacher, "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_tar(folder / "a.tar", files_of(1))
    write_tar(folder / "b.tar", files_of(2, broken=True))
    return folder


@pytest.fixture(scope="module")
def taught(shards: Path, embedder: Embedder) -> Path:
    report = reinforce_shards(shards, embedder, shards.parent / "taught", precision="fp32", fields=("synthetic",))
    assert (report.num_samples, report.num_texts, report.num_shards_kept) == (12, 36, 0)
    assert [key for key, _ in report.failures] == ["b/2002"]
    return report.out


def settings(train: Path, out: Path, augment: Any = False, **distillation: Any) -> Any:
    return load_run(
        {
            "run": {"out": str(out), "steps": 4, "device": "cpu"},
            "model": {"architecture": {**SMALL, "embed_dim": 16}},
            "data": {
                **{"train": str(train), "global_batch_size": 4, "workers": 0, "augment": augment},
                "max_bad_fraction": 1,
                "captions": {"fields": {"txt": 0.5, "synthetic": 0.5}},
            },
            "loss": {"distillation": {"weight": 1.0, **distillation}},
            "optim": {"lr": 1e-3},
        }
    )


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_training_with_stored_features_is_training_with_the_teacher(
    shards: Path, taught: Path, teacher: str, tmp_path: Path
) -> None:
    pretrain(settings(shards, tmp_path / "live", teacher=teacher))
    pretrain(settings(taught, tmp_path / "stored"))
    pretrain(settings(taught, tmp_path / "cold", logit_scale=3.0))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    # The teacher's own scale, 14.3, came with its features; another one teaches something else.
    assert losses(tmp_path / "cold") != pytest.approx(losses(tmp_path / "live"), rel=1e-2)


def test_the_stored_features_are_the_teachers(taught: Path, embedder: Embedder) -> None:
    shard = ShardSet.open(taught).shards[1]
    texts = [*shard.captions(4), "made up for 4"]
    stored = parse_npy(shard.read_member(4, "teacher_text.npy") or b"")
    np.testing.assert_allclose(stored, embedder.embed_texts(texts).numpy(), atol=1e-6)
    picture = Image.open(io.BytesIO(shard.image_bytes(4)))
    stored = parse_npy(shard.read_member(4, "teacher_image.npy") or b"")
    np.testing.assert_allclose(stored, embedder.embed_images([picture]).numpy(), atol=1e-6)
    assert shard.read_member(2, "teacher_image.npy") is None


def test_each_epoch_shows_a_view_that_the_teacher_has_seen(shards: Path, embedder: Embedder, tmp_path: Path) -> None:
    augment = AugmentSettings(crop_scale=(0.3, 0.6), hflip=0.5)
    options: dict[str, Any] = {"fields": ("synthetic",), "precision": "fp32", "batch_size": 7}
    taught = reinforce_shards(shards, embedder, tmp_path / "views", views=3, augment=augment, **options).out
    run = settings(taught, tmp_path / "out", {"crop_scale": [0.3, 0.6], "hflip": 0.5})
    opened = ShardSet.open(taught)
    stored = training_data.stored_teacher(run, opened)
    assert stored is not None
    live = Teacher(embedder.encoder, embedder.encoder, 64)
    seen: dict[int, set[int]] = {}
    with assemble.build_loader(run, opened, embedder.encoder, replay=stored.replay) as loader:
        for batch in (batch for epoch in range(3) for batch in loader.epoch(epoch)):
            images, good = stored.teacher(batch).extra["teacher_image"], batch.valid
            torch.testing.assert_close(images[good], live(batch).extra["teacher_image"][good], atol=1e-5, rtol=0)
            whole = stored.teacher(batch._replace(extra={})).extra["teacher_image"]
            assert (images[good] - whole[good]).abs().max() > 1e-3
            for number, view in zip(batch.ids[good].tolist(), batch.extra["view"][good].tolist(), strict=True):
                seen.setdefault(number, set()).add(view)
    assert len(seen) == 11 and all(views == {0, 1, 2} for views in seen.values())
    pretrain(run)
    assert dry_run(run).data.problem is None
    with pytest.raises(ConfigError, match=r"data.augment.hflip: 0.5 -> 0.0. Take those settings, or data.augment = f"):
        pretrain(settings(taught, tmp_path / "other", {"crop_scale": [0.3, 0.6]}))
    plain = training_data.stored_teacher(settings(taught, tmp_path / "plain"), opened)
    assert plain is not None and plain.replay is None


def test_a_copy_that_was_interrupted_goes_on_with_the_same_teacher_only(
    shards: Path, taught: Path, embedder: Embedder, tmp_path: Path
) -> None:
    again = shutil.copytree(taught, tmp_path / "again")
    whole = (again / "b.tar").read_bytes()
    (again / "b.stats.json").unlink()  # as if killed before the second was finished
    with pytest.raises(DataError, match=r"1 of 2 shards. Run the same `vlkit shards reinforce` again"):
        ShardSet.open(again)
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"precision": "fp32", "fields": ("synthetic",)}
    report = reinforce_shards(shards, embedder, again, **options, progress=lambda *now: seen.append(now))
    assert (report.num_shards_kept, report.num_texts) == (1, 18) and seen[-1] == (12, 12)
    assert (again / "b.tar").read_bytes() == whole
    torch.manual_seed(6)
    other = Embedder(build_encoder(SMALL).eval(), "other")
    with pytest.raises(DataError, match=r"holds a build with other input or options: teacher was .*weights"):
        reinforce_shards(shards, other, again, **options)


def test_features_of_two_teachers_are_never_mixed(
    shards: Path, taught: Path, embedder: Embedder, tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    write_tar(tmp_path / "more" / "c.tar", files_of(3))
    torch.manual_seed(6)
    other = Embedder(build_encoder(SMALL).eval(), "other")
    report = reinforce_shards(tmp_path / "more", other, tmp_path / "second", fields=("synthetic",))
    assert report.tar_bytes == (tmp_path / "second" / "c.tar").stat().st_size
    both = f"{taught}::{report.out}"
    with pytest.raises(DataError, match=r"hold features of different teachers: weights: .* here, .* there"):
        pretrain(settings(Path(both), tmp_path / "out"))
    with pytest.raises(DataError, match="different teachers"):
        copy_samples(ShardSet.open(both), np.ones(18, bool), tmp_path / "copy")
    with pytest.raises(DataError, match=r"say which teacher their features are of .*, those in .* do not"):
        teacher_of(ShardSet.open(f"{taught}::{tmp_path / 'more'}"))
    # A copy of a part keeps the record.
    copy_samples(ShardSet.open(taught), np.arange(12) < 3, tmp_path / "part")
    assert TeacherRecord.read(tmp_path / "part") == TeacherRecord.read(taught)


def test_a_run_continues_with_the_same_teacher_only(
    taught: Path, embedder: Embedder, shards: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "out", shutil.copytree(taught, tmp_path / "data")
    asked = iter(range(9))
    pretrain(settings(data, out), stop=lambda: next(asked) == 1)
    torch.manual_seed(6)
    record = TeacherRecord.read(data)
    assert record is not None
    card = json.loads((data / "teacher.json").read_text())
    card["fingerprint"]["identity"]["weights"] = "others"
    (data / "teacher.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r'stored_teacher.weights: ".*" -> "others"'):
        pretrain(settings(data, out), resume=True)
    (data / "teacher.json").write_text("{}")
    with pytest.raises(DataError, match="is no record of a teacher"):
        teacher_of(ShardSet.open(data))


def test_what_cannot_be_reinforced(
    shards: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tar: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=r"views = 2 without data\.augment"):
        reinforce_shards(shards, embedder, tmp_path / "out", views=2)
    with pytest.raises(ConfigError, match="holds the shards to copy from"):
        reinforce_shards(shards, embedder, shards)
    write_tar(tmp_path / "x" / "a.tar", files_of(4))
    with pytest.raises(ConfigError, match=r"2 of the shards are called a.tar"):
        reinforce_shards(f"{shards}::{tmp_path / 'x'}", embedder, tmp_path / "out")
    with pytest.raises(DataError, match=r"has a caption field 'sinthetic'\. Did you mean synthetic"):
        reinforce_shards(shards, embedder, tmp_path / "out", fields=("sinthetic",))
    broken = build_encoder(SMALL).eval()
    torch.nn.init.constant_(broken.weights()["visual.proj"], torch.nan)
    with pytest.raises(ModelError, match="numbers that are not finite for the image of a/1000"):
        reinforce_shards(shards, Embedder(broken, "broken"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def batch_of(shards: ShardSet, ids: list[int]) -> ImageTextBatch:
    """Images nobody looks at, each with its first caption."""
    captions = [shard.captions(row)[0] for shard, row in map(shards.locate, ids)]
    return ImageTextBatch(
        images=torch.zeros(len(ids), 3, 1, 1, dtype=torch.uint8),
        tokens=torch.zeros(len(ids), 1, dtype=torch.int64),
        text_to_image=torch.arange(len(ids)),
        ids=torch.tensor(ids),
        caption_hash=torch.tensor([caption_hash(caption) for caption in captions]),
        valid=torch.ones(len(ids), dtype=torch.bool),
        extra={},
        keys=[shards.key(i) for i in ids],
    )


def test_samples_whose_features_have_another_width_are_named(taught: Path, embedder: Embedder, tmp_path: Path) -> None:
    with tarfile.open(taught / "a.tar") as old, tarfile.open(tmp_path / "odd.tar", "w") as new:
        for member in old:
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == "1001.teacher_image.npy":
                file = io.BytesIO()
                np.save(file, np.ones(9, np.float16))
                content = file.getvalue()
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    shards = ShardSet.open(tmp_path / "odd.tar")
    with pytest.raises(DataError, match=r"teacher_text.npy holds float32 of shape \(3, 8\); expected 2 row\(s\)"):
        StoredTeacher(shards, None)(batch_of(shards, [0]))  # without its record, a field's texts are too many
    reader = StoredTeacher(shards, TeacherRecord.read(taught))
    with pytest.raises(DataError, match=r"the caption trained on is none of those"):
        reader(batch_of(shards, [0])._replace(caption_hash=torch.tensor([5])))
    found = reader(batch_of(shards, [0, 2])).extra
    assert found["teacher_image"].shape == found["teacher_text"].shape == (2, 8)
    assert found["teacher_logit_scale"].item() == pytest.approx(embedder.logit_scale)
    with pytest.raises(DataError, match=r"odd\.tar, sample 1001: the teacher's features are 9 wide, those of .* 8"):
        reader(batch_of(shards, [0, 1]))


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.float16).reshape(2, 3), np.asfortranarray(np.ones((3, 2))), np.float32(3), np.empty((0, 4))],
)
def test_small_arrays_are_read_as_numpy_reads_them(array: Any) -> None:
    file = io.BytesIO()
    np.save(file, array)
    found = parse_npy(file.getvalue())
    assert found.dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(found, array)


def test_arrays_that_are_none() -> None:
    file = io.BytesIO()
    np.save(file, np.arange(4.0))
    for data in (b"", b"text", file.getvalue()[:-1], file.getvalue()[:40]):
        with pytest.raises((ValueError, EOFError)):
            parse_npy(data)
    objects = io.BytesIO()
    np.save(objects, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        parse_npy(objects.getvalue())


def test_the_command(shards: Path, teacher: str, tmp_path: Path, call_vlkit: Callable[..., Any]) -> None:
    arguments = ["shards", "reinforce", shards, "--teacher", teacher, "--out", tmp_path / "out", "--device", "cpu"]
    code, stdout, stderr = call_vlkit(*arguments)
    assert code == 0 and "texts embedded" in stdout, stderr
    assert "no features of the image of b/2002" in stderr
    code, stdout, stderr = call_vlkit(*arguments, "--json")
    report = json.loads(stdout)
    assert "continued: 2 of 2 shards were there already" in stderr
    assert report["num_shards_kept"] == 2 and report["teacher"]["embed_dim"] == 8
    assert report["teacher"]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    (tmp_path / "run.toml").write_text('[run]\nout = "x"\nsteps = 1\n[model]\nname = "ViT-B-32"\n'
                                       '[data]\ntrain = "x"\naugment = false\n')  # fmt: skip
    code, _, stderr = call_vlkit(*arguments, "--views", 2, "--run", tmp_path / "run.toml")
    assert code == 1 and "data.augment is off in" in stderr
    code, _, stderr = call_vlkit(*arguments, "--views", 2)
    assert code == 1 and '"crop_scale": [0.9, 1.0]' in stderr
    code, _, stderr = call_vlkit(*arguments, "--field", "synthetic")
    assert code == 1 and 'fields": ["synthetic"]' in stderr
