"""Embedding part by part elsewhere: as a worker of a cluster does it, and killed at any moment."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vlkit.data.records import ImageRef, Record, Source
from vlkit.features.embed import embed_source
from vlkit.features.embed_part import Job, run_job
from vlkit.features.source import open_source
from vlkit.features.stamps import Stamper
from vlkit.features.store import open_features
from vlkit.models.open_clip_encoder import build_encoder
from vlkit.models.saved import save_encoder


@pytest.fixture
def name(tmp_path: Path, small: dict[str, Any]) -> str:
    torch.manual_seed(0)
    return f"local-dir:{save_encoder(build_encoder(small), tmp_path / 'model')}"


def source_in(folder: Path, count: int) -> Source:
    """Photographs with a caption each."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    records = [Record(f"{n}.png", ImageRef(path=str(folder / f"{n}.png")), (f"number {n}",)) for n in range(count)]
    return Source(tuple(records), "table", folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ray_makes_the_same_parts(name: str, tmp_path: Path) -> None:
    """Without Ray here: the job as a worker gets it, which loads the model by its name."""
    source = source_in(tmp_path / "photos", 4)
    embed_source(source, open_source(name, "cpu"), tmp_path / "out")
    expected = content(tmp_path / "out")
    job = _job_of(source, name, tmp_path / "out")
    for path in (tmp_path / "out").glob("*/*"):
        path.unlink()
    run_job(job)
    assert content(tmp_path / "out") == expected


def _job_of(source: Source, name: str, out: Path) -> Any:
    about = open_features(out).about
    stamps = tuple(Stamper().stamp(record.image) for record in source.records)
    return Job(out, 0, 1, source.records, stamps, about.fingerprint, name, None, "fp32", None, None, True, 64, 0)


def num_parts(out: Path) -> int:
    return len(list((out / "metadata").glob("*.parquet")))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_equal(name: str, tmp_path: Path) -> None:
    source_in(tmp_path / "photos", 400)
    command = [
        sys.executable, "-c", "from vlkit.cli import main; main()", "embed", str(tmp_path / "photos"), "--model", name,
        "--part-size", "8", "--batch-size", "4", "--workers", "0", "--no-cache", "--out",
    ]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    random = np.random.default_rng(0)
    kills = 0
    for _ in range(8):
        process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        have = num_parts(tmp_path / "out")
        while num_parts(tmp_path / "out") == have and process.poll() is None:
            time.sleep(0.01)  # it has come to the first missing part
        time.sleep(float(random.uniform(0, 0.04)))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
    assert kills >= 2
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    written = {path: data for path, data in content(tmp_path / "out").items() if not path.endswith(".tmp")}
    assert written == content(tmp_path / "whole")
    assert pq.read_table(tmp_path / "out" / "metadata" / "metadata_00.parquet").num_rows == 8
