"""Shard building that is broken off: killed, continued, out of space, started with other options."""

import hashlib
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_tools.build
from data_tools.build import build_shards
from data_tools.build_plan import hold_folder
from data_tools.write_shard import ShardOptions, ShardPart, write_shard
from vlkit.data.records import Source
from vlkit.data.shard_index import ShardSet
from vlkit.data.sources import read_source
from vlkit.errors import DataError


def source_of(records):
    return Source(tuple(records), "folder", Path("root"))


def letters(texts):
    """A tokenizer: one id for each letter."""
    return [[ord(letter) for letter in text] for text in texts]


def hashes(folder):
    paths = sorted(path for path in folder.iterdir() if path.name.endswith((".tar", ".arrow", ".json")))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_other_options_or_input_are_refused(tmp_path, records_of):
    source = source_of(records_of(3))
    build_shards(source, tmp_path / "s", max_side=32)
    with pytest.raises(DataError, match=r"other input or options: max_side was 32, now 40.*name another --out"):
        build_shards(source, tmp_path / "s", max_side=40)
    with pytest.raises(DataError, match=r'source was ".*", now ".*"'):
        build_shards(source_of(records_of(2) + records_of(1)), tmp_path / "s", max_side=32)
    report = build_shards(source, tmp_path / "s", max_side=32)
    assert (report.num_shards_kept, report.num_samples) == (1, 3)
    (tmp_path / "s/build.json").write_text('{"of": "another program"}')
    with pytest.raises(DataError, match="holds tars that no `vlkit shards build` made"):
        build_shards(source, tmp_path / "s", max_side=32)


def test_a_second_build_in_the_same_folder_is_refused(tmp_path, records_of):
    with hold_folder(tmp_path), pytest.raises(DataError, match="Another build is writing to"):
        build_shards(source_of(records_of(1)), tmp_path)
    assert build_shards(source_of(records_of(1)), tmp_path).num_samples == 1
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Cannot make the folder .*file"):
        build_shards(source_of(records_of(1)), tmp_path / "file")


def test_finished_shards_are_kept_and_damaged_ones_redone(tmp_path, records_of):
    source = source_of(records_of(6))
    build_shards(source, tmp_path, samples_per_shard=2)
    before = hashes(tmp_path)
    (tmp_path / "00001.stats.json").unlink()  # not committed
    (tmp_path / "00002.tar").write_bytes((tmp_path / "00002.tar").read_bytes()[:700])
    (tmp_path / "00002.tar.4711.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match=r"is not finished: 2 of 3 shards.*it continues"):
        ShardSet.open(tmp_path)
    untouched = (tmp_path / "00000.tar").stat().st_mtime_ns
    report = build_shards(source, tmp_path, samples_per_shard=2)
    assert report.num_shards_kept == 1 and report.num_samples == 6
    assert hashes(tmp_path) == before and (tmp_path / "00000.tar").stat().st_mtime_ns == untouched
    assert not list(tmp_path.glob("*.tmp"))


BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from data_tools.build import build_shards
from vlkit.data.sources import read_source

def letters(texts):
    return [[ord(letter) for letter in text] for text in texts]

if __name__ == "__main__":
    source = read_source(sys.argv[2])
    build_shards(source, Path(sys.argv[3]), samples_per_shard=4, max_side=96, workers=2, tokenizers={"abc": letters})
"""


def kill_and_continue(tmp_path, picture, chooser, kills):
    """Compare an uninterrupted build on one process with one on two that is killed `kills` times at random moments.

    That two processes write the same bytes is seen once more in tests/cli/test_shards.py.
    """
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(80):
        photos.joinpath(f"class {number % 3}").mkdir(parents=True, exist_ok=True)
        picture(320, 240, seed=number).save(photos / f"class {number % 3}/{number}.jpg")
    (photos / "class 0/broken.jpg").write_bytes(b"no image")
    source = read_source(photos)
    build_shards(source, tmp_path / "whole", samples_per_shard=4, max_side=96, tokenizers={"abc": letters})
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    root = Path(data_tools.build.__file__).parents[1]
    for _ in range(kills):
        finished = len(list(out.glob("*.stats.json"))) if out.exists() else 0
        target = finished + chooser.randint(0 if finished else 1, 2)
        build = subprocess.Popen([sys.executable, script, root, photos, out])
        while build.poll() is None and len(list(out.glob("*.stats.json"))) < target:
            time.sleep(0.001)
        time.sleep(chooser.random() * 0.03)
        build.kill()
        build.wait()
    report = build_shards(source, out, samples_per_shard=4, max_side=96, tokenizers={"abc": letters}, workers=1)
    assert report.num_shards == 21 and report.num_samples == 80
    assert hashes(out) == hashes(tmp_path / "whole")
    assert (out / "failures.jsonl").read_bytes() == (tmp_path / "whole/failures.jsonl").read_bytes()
    return report


def test_a_killed_build_continues_to_the_same_bytes(tmp_path, picture):
    report = kill_and_continue(tmp_path, picture, random.Random(0), kills=1)
    assert report.num_shards_kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_builds_killed_many_times(tmp_path, picture, seed):
    kill_and_continue(tmp_path, picture, random.Random(seed), kills=6)


def test_no_space_left(tmp_path, records_of):
    """A limit on the size of files, so that writing fails in the middle of the second shard as on a full disk."""
    records = records_of(2) + records_of(2, width=900, height=600)
    source = source_of(records)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match=r"No space left in .* finished shards are kept. Free space there and run"):
            build_shards(source, tmp_path / "s", samples_per_shard=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert names == {"build.json", "00000.tar", "00000.index.arrow", "00000.parquet", "00000.stats.json"}
    report = build_shards(source, tmp_path / "s", samples_per_shard=2)
    assert (report.num_shards_kept, report.num_samples) == (1, 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", ["tar", "index.arrow", "stats.json"])
def test_a_full_disk_at_every_file(tmp_path, suffix, records_of):
    """The temporary file of each kind is led to a device that is always full."""
    part = ShardPart("00000", 4, records_of(2), tmp_path, ShardOptions(None, 90, {"abc": letters}, ()))
    (tmp_path / f"00000.{suffix}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match="No space left in"):
        write_shard(part)
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / f"00000.{suffix}").exists()
    assert not (tmp_path / "00000.stats.json").exists()
    assert write_shard(part)["num_samples"] == 2


def test_a_folder_without_permission(tmp_path, records_of):
    if os.geteuid() == 0:
        target = Path("/proc/vlkit-shards")  # root may write anywhere but there
    else:
        tmp_path.chmod(0o555)
        target = tmp_path / "s"
    with pytest.raises(DataError, match="Cannot make the folder"):
        build_shards(source_of(records_of(1)), target)
