"""`vlkit eval suite`, `compare`, `report` and `vlkit protocols` from the command line; killed suites continue."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HOSTILE = "</td><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes as CIFAR-10 has them, and a set in CLIP_benchmark's wds layout with hostile captions."""
    import tarfile

    root = tmp_path_factory.mktemp("data")
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for number in range(20):
        path = root / "cifar10" / names[number % 10] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((16, 16)).save(path)
    folder = root / "wds" / "pairs"
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number, path in enumerate(sorted((root / "cifar10").rglob("*.png"))):
            (root / "caption").write_text(f"a {path.parent.name} {number}\n{HOSTILE} {number}")
            tar.add(path, f"s{number:07d}.png")
            tar.add(root / "caption", f"s{number:07d}.txt")
    (root / "caption").unlink()
    add_multi_label(root)
    return root


def add_multi_label(root: Path) -> None:
    """The same pictures with any number of three classes each, as CLIP_benchmark keeps VOC2007."""
    import tarfile

    folder = root / "wds" / "voc"
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("multilabel")
    (folder / "classnames.txt").write_text("wing\nwheel\nsky")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number, path in enumerate(sorted((root / "cifar10").rglob("*.png"))):
            np.save(root / "labels.npy", np.array([number % 2, number % 3 == 0, 1]))
            tar.add(path, f"s{number:07d}.png")
            tar.add(root / "labels.npy", f"s{number:07d}.npy")
    (root / "labels.npy").unlink()


def lines_of(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if line.endswith("}")]
    return sorted(({k: v for k, v in line.items() if k != "run"} for line in found), key=lambda line: str(line["key"]))


def test_suite_compare_and_report(
    models: list[str], data: Path, tmp_path: Path, call_vlkit: Callable[..., Any]
) -> None:
    suite = ["eval", "suite", "--models", ",".join(models), "--protocols", "cifar10-18", "--data", data, "--wds",
             data / "wds", "--out", tmp_path / "r"]  # fmt: skip
    first = call_vlkit(*suite, "--json")
    assert first.code == 0, first.err
    assert "precision" in first.out and "reference (pillow), EXIF ignored" in first.err and "fp32" in first.err
    lines = [json.loads(line) for line in first.out.splitlines()]
    assert [(line["protocol"]["name"], line["protocol"]["precision"]) for line in lines] == [
        ("cifar10-18", "fp32"), ("wds/pairs", "fp32"), ("wds/voc", "fp32")] * 2  # fmt: skip
    assert lines[2]["task"] == "multi-label" and lines[2]["counts"]["classes"] == 3
    listed = json.loads(call_vlkit("protocols", "cifar10-18", "--json").out)
    assert listed["fingerprint"] == lines[0]["protocol"]["fingerprint"]
    again = call_vlkit(*suite)
    assert again.code == 0 and again.err.count("already there") == 6 and "mean_recall@1" in again.out
    assert len(lines_of(tmp_path / "r")) == 6

    compared = call_vlkit("eval", "compare", f"{tmp_path / 'r'}#1", f"{tmp_path / 'r'}#4", "--json")
    assert compared.code == 0, compared.err
    assert {"accuracy@1", "mean_per_class_recall"} <= set(json.loads(compared.out)["metrics"])
    several = call_vlkit("eval", "compare", f"{tmp_path / 'r'}#3", f"{tmp_path / 'r'}#6", "--json")
    assert several.code == 0, several.err
    row = json.loads(several.out)["metrics"]["mean_average_precision"]
    expected = [lines[n]["metrics"]["mean_average_precision"] for n in (2, 5)]
    assert [row["first"], row["second"]] == pytest.approx(expected, abs=1e-6)
    refused = call_vlkit("eval", "compare", f"{tmp_path / 'r'}#1", f"{tmp_path / 'r'}#2")
    assert refused.code == 1 and "different protocols" in refused.err

    report = call_vlkit("eval", "report", tmp_path / "r", "--out", tmp_path / "page", "--json")
    assert report.code == 0, report.err
    page = Path(json.loads(report.out)["page"]).read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "&lt;script&gt;document.title" in page
    assert (
        (tmp_path / "page" / "table.md")
        .read_text()
        .startswith("| model | cifar10-18 | wds/pairs | wds/voc | mean of 3 |")
    )


def test_what_is_missing_is_said(models: list[str], data: Path, tmp_path: Path, call_vlkit: Callable[..., Any]) -> None:
    out = ["--out", tmp_path / "r"]
    nothing = call_vlkit("eval", "suite", "--models", models[0], *out)
    assert nothing.code == 1 and "--protocols" in nothing.err
    nowhere = call_vlkit("eval", "suite", "--models", models[0], "--protocols", "cifar10-18", *out)
    assert nowhere.code == 1 and "cifar10-18=PATH" in nowhere.err
    absent = call_vlkit("eval", "suite", "--models", models[0], "--protocols", "flickr1k", "--data", data, *out)
    assert absent.code == 1 and "flickr30k" in absent.err
    assert not (tmp_path / "r").exists()


def test_protocols_are_listed_with_what_they_fix(call_vlkit: Callable[..., Any]) -> None:
    table = call_vlkit("protocols")
    assert table.code == 0 and "coco5k-karpathy" in table.out and "flickr8k-test" in table.out
    rows = [json.loads(line) for line in call_vlkit("protocols", "caltech", "--json").out.splitlines()]
    assert {row["name"] for row in rows} == {"caltech101", "caltech101-base", "caltech101-new"}
    assert rows[0]["num_templates"] == 34 and rows[0]["fingerprint"]


@pytest.mark.slow
def test_a_suite_killed_at_any_moment_continues(models: list[str], data: Path, tmp_path: Path) -> None:
    arguments = ["eval", "suite", "--models", ",".join(models), "--protocols", "cifar10-18", "--data", str(data),
                 "--wds", str(data / "wds"), "--no-cache", "--out"]  # fmt: skip

    def start(out: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", "from vlkit.cli import main; main()", *arguments, str(out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    said = whole.communicate()[1].decode()
    assert whole.returncode == 0, said
    results, random, kills = tmp_path / "killed" / "results.jsonl", np.random.default_rng(0), 0
    for _ in range(4):
        size = results.stat().st_size if results.exists() else 0
        process = start(tmp_path / "killed")
        while process.poll() is None and (results.stat().st_size if results.exists() else 0) == size:
            time.sleep(0.01)  # it has done one more
        time.sleep(float(random.uniform(0, 0.1)))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    before = {line["key"] for line in lines_of(tmp_path / "killed")}
    last = start(tmp_path / "killed")
    said = last.communicate()[1].decode()
    assert last.returncode == 0
    assert said.count("already there") == len(before)  # nothing finished is repeated
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_of_torchrun_share_a_suite(models: list[str], data: Path, tmp_path: Path) -> None:
    arguments = ["eval", "suite", "--models", ",".join(models), "--protocols", "cifar10-18", "--data", str(data),
                 "--wds", str(data / "wds"), "--no-cache", "--device", "cpu", "--out"]  # fmt: skip
    program = tmp_path / "vlkit_eval.py"
    program.write_text("from vlkit.cli import main; main()")
    for processes, out in ((1, "one"), (2, "two")):
        ran = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
             str(program), *arguments, str(tmp_path / out)],
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        # Each of the six evaluations is done by one of the processes.
        assert ran.stderr.count(": done; fingerprint") == 6
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")
    assert len((tmp_path / "two" / "results.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_a_page_with_hostile_captions_runs_no_script_but_its_own(
    models: list[str], data: Path, tmp_path: Path, call_vlkit: Callable[..., Any]
) -> None:
    import shutil

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    made = call_vlkit("eval", "suite", "--models", models[0], "--wds", data / "wds", "--out", tmp_path / "r")
    assert made.code == 0, made.err
    assert call_vlkit("eval", "report", tmp_path / "r", "--out", tmp_path / "page").code == 0
    opened = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "page" / "index.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>vlkit evaluation</title>" in opened.stdout  # a script out of a caption would have changed it
    assert 'tabindex="0"' in opened.stdout  # ours has run: the heads of the tables can be reached by keys
