"""Shards out of links: a real server on loopback, real tables, the files that result."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from PIL import Image

import vlkit
from data_tools.download import EVERYWHERE, DownloadRules, build_from_urls
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError

RULES = DownloadRules(timeout=5, retries=0, allowed_networks=EVERYWHERE)


def image_of(number, side=40):
    stream = io.BytesIO()
    Image.new("RGB", (side, 30), (number * 40 % 256, 90, 20)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


class Handler(BaseHTTPRequestHandler):
    hits: ClassVar[Counter[str]] = Counter()
    wait: ClassVar[float] = 0.0

    def do_GET(self):
        Handler.hits[self.path] += 1
        time.sleep(Handler.wait)
        kind, _, number = self.path.strip("/").partition("/")
        data = {"jpg": image_of(int(number or 0)), "text": b"no image at all", "half": image_of(1)[:300]}.get(kind)
        self.send_response(404 if data is None else 200)
        if kind == "noai":
            self.send_header("X-Robots-Tag", "noai")
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(serving):
    Handler.hits.clear()
    Handler.wait = 0.0
    with serving(Handler) as address:
        yield address


@pytest.fixture
def table(server, tmp_path):
    """CC12M's form: five images among links that are dead, empty, no images, or unwanted."""
    paths = ["jpg/0", "gone", "jpg/1", "text", "jpg/2", "noai", "half", "jpg/3", None, "jpg/4", "jpg/5"]
    lines = [f"{server}/{path}\tcaption of {path}" if path else "rubbish" for path in paths]
    lines[-1] = f"{server}/jpg/5\t "
    (tmp_path / "cc12m.tsv").write_text("\n".join(lines))
    return tmp_path / "cc12m.tsv"


def contents(folder):
    """Bytes of all files but the plan."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build.json"}


def test_every_row_is_accounted_for(table, tmp_path, server):
    progress = []
    report = build_from_urls(
        table, tmp_path / "out", rules=RULES, samples_per_shard=4, progress=lambda *now: progress.append(now)
    )
    assert (report.num_shards, report.num_records, report.num_samples, report.num_captions) == (3, 11, 5, 5)
    assert progress[0] == (0, 11) and progress[-1] == (11, 11)
    assert dict(report.failures.counts) == {
        "HTTP 404": 1,
        "not an image": 1,
        "opt-out": 1,
        "truncated": 1,
        "row that cannot be read": 1,
        "no caption": 1,
    }
    rows = [row for file in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert [row["key"] for row in rows] == [f"{n // 4:05d}{n % 4:04d}" for n in range(11)]
    assert [row["error"] for row in rows] == [
        None, "HTTP 404", None, "not an image", None, "opt-out", "truncated", None, "row that cannot be read", None,
        "no caption",
    ]  # fmt: skip
    assert [row["status"] for row in rows].count("success") == 5
    assert rows[1] | {"error_message": ""} == rows[1] | {
        "url": f"{server}/gone", "caption": "caption of gone", "http_status": 404, "attempts": 1, "width": None,
        "sha256": None, "error_message": "",
    }  # fmt: skip
    assert rows[2]["sha256"] == hashlib.sha256(image_of(1)).hexdigest()
    assert (rows[2]["width"], rows[2]["height"], rows[2]["original_width"]) == (40, 30, 40)
    assert Handler.hits["/jpg/5"] == 0  # no caption, so there is no use in its image
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp" or path.name[0] == "."]


def test_the_shards_hold_the_images_in_the_tables_order(table, tmp_path, server):
    build_from_urls(table, tmp_path / "out", rules=RULES, samples_per_shard=100, tokenizers={"t": lambda _: [[7]] * 5})
    source = read_source(tmp_path / "out")
    assert [(record.captions, record.image.read()) for record in source] == [
        ((f"caption of jpg/{n}",), image_of(n)) for n in range(5)
    ]
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        about = json.load(tar.extractfile("000000002.json"))
    assert (about["url"], about["key"]) == (f"{server}/jpg/1", f"{server}/jpg/1")


def test_images_are_made_smaller(table, tmp_path):
    report = build_from_urls(table, tmp_path / "out", rules=RULES, max_side=20)
    assert report.num_reencoded == 5
    rows = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert (rows[0]["width"], rows[0]["height"], rows[0]["original_width"]) == (20, 15, 40)


def test_a_build_that_was_stopped_continues_with_the_unfinished_shards(table, tmp_path):
    build_from_urls(table, tmp_path / "whole", rules=RULES, samples_per_shard=4)
    build_from_urls(table, tmp_path / "out", rules=RULES, samples_per_shard=4)
    (tmp_path / "out" / "00001.stats.json").unlink()  # written last: as if killed before
    (tmp_path / "out" / "00001.images.123.tmp").write_bytes(b"left by the kill")
    Handler.hits.clear()
    report = build_from_urls(table, tmp_path / "out", rules=RULES, samples_per_shard=4)
    assert (report.num_shards, report.num_shards_kept, report.num_samples, report.failures.total) == (3, 2, 5, 6)
    assert set(Handler.hits) == {"/jpg/2", "/noai", "/half", "/jpg/3"}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    table.write_text(table.read_text().replace("caption of jpg/0", "another"))
    with pytest.raises(DataError, match=r"holds a build with other input or options: source was"):
        build_from_urls(table, tmp_path / "out", rules=RULES, samples_per_shard=4)


def test_nothing_usable(table, tmp_path):
    with pytest.raises(DataError, match=r"None of the 11 rows could be used: 9 x private address"):
        build_from_urls(table, tmp_path / "out", rules=DownloadRules(timeout=5, retries=0))
    assert not Handler.hits


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"connections": 0}, {"retries": -1}])
def test_rules_out_of_range(table, tmp_path, wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = "):
        build_from_urls(table, tmp_path / "out", rules=DownloadRules(**wrong))


def test_command(table, tmp_path, call_vlkit):
    links = ["shards", "build", table, "--url-column", "url", "--caption-column", "caption", "--no-tokens"]
    links += ["--retries", 0, "--workers", 1, "--out", tmp_path / "out"]
    called = call_vlkit(*links, "--allow-private-addresses", "--json")
    assert called.code == 0, called.err
    assert json.loads(called.out)["num_samples"] == 5
    assert "left out: 1 x HTTP 404" in called.err and "are named in" in called.err and "failures.jsonl" in called.err
    refused = call_vlkit(*links, "--split", "train", "--shuffle")
    assert refused.code == 1 and "--split, --shuffle has no effect on a table of links" in refused.err
    hint = call_vlkit("shards", "build", tmp_path, "--out", tmp_path / "o", "--timeout", 3)
    assert hint.code == 1 and "--timeout has no effect on images on disk" in hint.err


COMMAND = "from vlkit.cli import main; main()"


@pytest.mark.slow
def test_killed_and_continued_with_several_processes(server, tmp_path):
    (tmp_path / "t.tsv").write_text("".join(f"{server}/jpg/{n}\tcaption {n}\n" for n in range(32)))
    build_from_urls(tmp_path / "t.tsv", tmp_path / "whole", rules=RULES, samples_per_shard=4)
    Handler.wait = 0.3
    out = tmp_path / "out"
    arguments = ["shards", "build", tmp_path / "t.tsv", "--url-column", "url", "--allow-private-addresses"]
    arguments += ["--no-tokens", "--samples-per-shard", 4, "--workers", 2, "--connections", 1, "--out", out]
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    root = str(Path(vlkit.__file__).parents[1])
    running = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob("*.stats.json"))) < 3:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(1)  # its workers see that it is gone
    finished = {path.name.partition(".")[0] for path in out.glob("*.stats.json")}
    Handler.wait = 0.0
    Handler.hits.clear()
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=300)
    asked = {int(path.rpartition("/")[2]) // 4 for path in Handler.hits}
    assert 3 <= len(finished) < 8 and asked == set(range(8)) - {int(name) for name in finished}
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_on_a_local_ray(table, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    build_from_urls(table, tmp_path / "whole", rules=RULES, samples_per_shard=4)
    environment = {"env_vars": {"PYTHONPATH": str(Path(vlkit.__file__).parents[1])}}
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env=environment)
    try:
        build_from_urls(table, tmp_path / "out", rules=RULES, samples_per_shard=4, workers=0, engine="ray")
    finally:
        ray.shutdown()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
