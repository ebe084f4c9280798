"""`vlkit shards` on small real files: what it prints, where, and with which exit code."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlkit.data.shard_index import ShardSet


@pytest.fixture
def table(tmp_path):
    """A CSV of three pictures, one of them missing, one broken, one named like an attack."""
    for name, color in (("red.jpg", "red"), ("<b>\x1b[31mblue.jpg", "blue")):
        Image.new("RGB", (40, 30), color).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    path = tmp_path / "pairs.csv"
    lines = ["image,caption", "red.jpg,a red plane", "red.jpg,all red", "absent.jpg,nothing", "broken.jpg,broken"]
    path.write_text("\n".join([*lines, "<b>\x1b[31mblue.jpg,<img src=x onerror=alert(1)>"]) + "\n")
    return path


def test_build_validate_summarize(tmp_path, table, call_vlkit):
    out = tmp_path / "shards"
    code, stdout, stderr = call_vlkit("shards", "build", table, "--out", out, "--max-side", 20, "--workers", 1)
    assert code == 0
    assert "format table (guessed; --format names another), 3 records" in stderr
    assert "left out while reading: 1 x " in stderr and "absent.jpg" in stderr
    assert "left out: 1 x not an image: broken.jpg" in stderr and "failures.jsonl" in stderr
    assert "samples" in stdout and "\x1b" not in stdout + stderr
    shards = ShardSet.open(out)
    assert shards.num_samples == 2
    shard = shards.shards[0]
    assert shard.captions(0) == ("a red plane", "all red") and shard.json(0)["width"] == 20
    # <start_of_text> a red plane <end_of_text>, as OpenAI's CLIP has it.
    assert shard.tokens("open_clip:clip_bpe", 0)[0].tolist() == [49406, 320, 736, 5363, 49407]

    code, stdout, stderr = call_vlkit("shards", "build", table, "--out", out, "--max-side", 20, "--json")
    report = json.loads(stdout)
    assert code == 0 and "continued: 1 of 1 shards were there already" in stderr
    assert report["num_samples"] == 2 and report["failures"] == {"not an image": 1}

    code, stdout, stderr = call_vlkit("shards", "build", table, "--out", out, "--max-side", 30)
    assert code == 1 and stdout == ""
    assert "max_side was 20, now 30" in stderr and "name another --out" in stderr

    code, stdout, _ = call_vlkit("shards", "validate", out, "--workers", 1)
    assert code == 0 and "2 samples" in stdout and "ok" in stdout
    code, stdout, _ = call_vlkit("shards", "validate", out, "--workers", 1, "--json")
    assert code == 0 and json.loads(stdout)["ok"] is True

    page = tmp_path / "summary.html"
    code, stdout, stderr = call_vlkit("shards", "summarize", out, "--html", page, "--workers", 1)
    assert code == 0 and "captions" in stdout and str(page) in stderr
    assert "<img src=x" not in page.read_text() and "&lt;img src=x" in page.read_text()
    code, stdout, _ = call_vlkit("shards", "summarize", out, "--workers", 1, "--json")
    assert code == 0 and json.loads(stdout)["num_samples"] == 2


def test_validate_fails_on_a_cut_tar(tmp_path, table, call_vlkit):
    out = tmp_path / "shards"
    assert call_vlkit("shards", "build", table, "--out", out, "--no-tokens", "--workers", 1)[0] == 0
    tar = out / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    code, stdout, _ = call_vlkit("shards", "validate", out, "--workers", 1)
    assert code == 1 and "problem" in stdout and "00000" in stdout
    code, stdout, _ = call_vlkit("shards", "validate", out, "--workers", 1, "--json")
    assert code == 1 and json.loads(stdout)["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "absent", "--out", "x"], "absent does not exist"),
        (["build", "empty", "--out", "x"], "empty"),
        (["build", "pairs.csv", "--out", "x", "--format", "flickr"], "Unknown source format 'flickr'. Did you mean"),
        (["build", "pairs.csv", "--out", "x", "--tokenizer", "clip"], "Unknown tokenizer 'clip'"),
        (["build", "pairs.csv", "--out", "x", "--quality", "0", "--workers", "1"], "quality = 0: expected 1 to 100"),
        (["validate", "absent"], "No shard at absent"),
        (["summarize", "empty"], "No .tar files in empty"),
    ],
)  # fmt: skip
def test_messages(tmp_path, table, call_vlkit, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    code, stdout, stderr = call_vlkit("shards", *arguments)
    assert code == 1 and stdout == "" and message in stderr
    assert not Path("x/00000.tar").exists()


def test_usage_error(call_vlkit):
    assert call_vlkit("shards", "build", "somewhere")[0] == 2
    code, stdout, _ = call_vlkit("shards", "build", "--help")
    assert code == 0 and "--max-side" in stdout and "gets the name of its class" in stdout


def test_as_a_command_on_two_processes(tmp_path, table, call_vlkit, spawn_vlkit):
    """Through a real process, whose workers start from the command's own entry: the bytes of a single one."""
    options = ["--samples-per-shard", "1", "--json"]
    code, stdout, stderr = spawn_vlkit("shards", "build", table, "--out", tmp_path / "s", "--workers", 2, *options)
    assert code == 0, stderr
    report = json.loads(stdout)
    assert (report["num_shards"], report["num_samples"]) == (3, 2)
    call_vlkit("shards", "build", table, "--out", tmp_path / "t", "--workers", 1, *options)
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "t").iterdir())
    assert all((tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes() for name in names)
