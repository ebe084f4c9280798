"""Suites: what is done stays done, results are equal between runs, and two of them are compared item by item."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.compare import compare_results, load_results, pair_results
from eval.folds import FoldedRetrieval
from eval.protocol_data import prepare
from eval.protocols import Protocol
from eval.runner import Job, Outcome, run_suite, suite_results
from eval.suite_report import as_csv, as_latex, as_markdown, overview_of, write_suite_report
from vlkit.errors import ConfigError, DataError
from vlkit.features.cache import FeatureCache
from vlkit.features.source import FeatureSource, open_source

CLASSES = ("ant", "bee", "cat")
CLASSIFY = Protocol("three", "three classes", "classification", (), "accuracy@1", templates="simple")
RETRIEVE = Protocol("pairs", "captions", "retrieval", (), "mean_recall@1", captions=2)
FOLDS = Protocol("pairs-folds", "captions", "retrieval", (), "mean_recall@1", folds=3)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    root = tmp_path_factory.mktemp("data")
    rows = ["image,caption"]
    for number in range(12):
        name = CLASSES[number % 3]
        path = root / "photos" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((24, 20)).save(path)
        rows += [f"{path.relative_to(root)},a {name} and the number {number} {copy}" for copy in range(3)]
    (root / "table.csv").write_text("\n".join(rows))
    places = {CLASSIFY: root / "photos", RETRIEVE: root / "table.csv", FOLDS: root / "table.csv"}
    return [Job(prepare(p, place, workers=0, num_examples=4), str(place)) for p, place in places.items()]


def evaluate(models: list[str], jobs: list[Job], out: Path, **options: Any) -> list[Outcome]:
    return list(run_suite(models, jobs, out, open_model=lambda name: open_source(name, "cpu"), **options))


def outside_run(lines: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps({key: value for key, value in line.items() if key != "run"}) for line in lines)


@pytest.fixture(scope="module")
def finished(models: list[str], jobs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert not any(outcome.kept for outcome in evaluate(models, jobs, out))
    return out


def test_a_line_holds_protocol_precision_decoder_and_data(finished: Path, jobs: list[Job]) -> None:
    lines = suite_results(finished)
    assert len(lines) == 6
    for line in lines:
        protocol = line["protocol"]
        assert protocol["precision"] == "fp32" and "fast" in protocol["decoder"] and len(protocol["fingerprint"]) == 12
        assert protocol["data_hash"] in {job.prepared.data_hash for job in jobs}
        assert (finished / line["files"]["per_item"]).is_file() and (finished / line["files"]["figures"]).is_file()
    assert lines[1]["counts"]["texts"] == 24  # two captions each


def test_fold_metrics_are_means_over_the_folds(models: list[str], jobs: list[Job], finished: Path) -> None:
    job = next(job for job in jobs if job.prepared.protocol is FOLDS)
    source = open_source(models[0], "cpu")
    evaluator = job.prepared.evaluator
    assert isinstance(evaluator, FoldedRetrieval)
    whole = evaluator.evaluator
    parts = [replace(whole, records=whole.records[n : n + 4]).run(source).metrics for n in (0, 4, 8)]
    line = next(line for line in suite_results(finished) if line["protocol"]["name"] == "pairs-folds")
    for key, value in line["metrics"].items():
        assert value == pytest.approx(sum(part[key] for part in parts) / 3, abs=1e-8)
    assert line["counts"]["images"] == 12


def test_a_rerun_does_what_is_missing_and_gives_equal_lines(
    models: list[str], jobs: list[Job], finished: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    def open_model(name: str) -> FeatureSource:
        asked.append(name)
        return open_source(name, "cpu", FeatureCache(tmp_path / "cache"))

    # Interrupted after four evaluations, in the middle of writing the fifth line.
    running = run_suite(models, jobs, tmp_path / "out", open_model=open_model)
    for _ in range(4):
        next(running)
    del running
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"task": "retrieval", "mod')
    outcomes = list(run_suite(models, jobs, tmp_path / "out", open_model=open_model))
    assert [outcome.kept for outcome in outcomes] == [True] * 4 + [False] * 2
    assert asked == [*models, *models]  # each once a call
    assert outside_run(suite_results(tmp_path / "out")) == outside_run(suite_results(finished))
    assert all(outcome.kept for outcome in run_suite(models, jobs, tmp_path / "out", open_model=open_model))


def test_two_processes_share_the_protocols(models: list[str], jobs: list[Job], finished: Path, tmp_path: Path) -> None:
    shares = [evaluate(models, jobs, tmp_path, rank=rank, world_size=2) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert outside_run(suite_results(tmp_path)) == outside_run(suite_results(finished))


def test_the_same_weights_under_two_names_are_evaluated_once(
    models: list[str], jobs: list[Job], tmp_path: Path
) -> None:
    scheme, _, folder = models[0].partition(":")
    again = f"{scheme}:{Path(folder).parent}/../{Path(folder).parent.name}/{Path(folder).name}"
    assert [outcome.kept for outcome in evaluate([models[0], again], jobs[:1], tmp_path)] == [False, True]


def test_a_name_given_twice_is_refused(models: list[str], jobs: list[Job], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        evaluate([models[0], models[0]], jobs, tmp_path)
    with pytest.raises(DataError, match="holds no result"):
        (tmp_path / "empty.jsonl").touch()
        suite_results(tmp_path / "empty.jsonl")


def test_a_comparison_is_paired_item_by_item(finished: Path) -> None:
    lines = suite_results(finished)
    (first,), (second,) = load_results(f"{finished}#1"), load_results(f"{finished}#4")
    comparison = compare_results(first, second)
    names = [row.metric for row in comparison.rows]
    assert names == ["accuracy@1", "mean_per_class_recall"]
    for row in comparison.rows:
        assert row.first == pytest.approx(lines[0]["metrics"][row.metric], abs=1e-7)
        assert row.second == pytest.approx(lines[3]["metrics"][row.metric], abs=1e-7)
        assert row.difference == pytest.approx(row.second - row.first) and row.low <= row.difference <= row.high
    hits = [pq.read_table(finished / line["files"]["per_item"])["hit@1"].to_numpy() for line in (lines[0], lines[3])]
    # The same bootstrap by hand: resampled images keep both models' answers together.
    drawn = np.random.Generator(np.random.Philox(1)).integers(0, 12, (4000, 12))
    low, high = np.quantile((hits[1] - hits[0])[drawn].mean(1), [0.025, 0.975])
    assert abs(comparison.rows[0].low - low) < 0.06 and abs(comparison.rows[0].high - high) < 0.06
    with_itself = compare_results(first, first).rows[0]
    assert (with_itself.difference, with_itself.low, with_itself.high) == (0, 0, 0)


def test_retrieval_is_compared_in_both_directions_by_images(finished: Path) -> None:
    first, second = (load_results(f"{finished}#{number}")[0] for number in (2, 5))
    pairs = compare_results(first, second)
    line = suite_results(finished)[1]
    for row in pairs.rows:
        assert row.first == pytest.approx(line["metrics"][row.metric], abs=1e-7)
    assert {row.metric.partition("/")[0] for row in pairs.rows} == {"image_to_text", "text_to_image"}


def test_other_protocols_and_other_items_are_refused_and_shown(finished: Path, jobs: list[Job], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"under different protocols.*name: three against pairs"):
        compare_results(load_results(f"{finished}#1")[0], load_results(f"{finished}#2")[0])
    with pytest.raises(DataError, match=r"holds 2 models; name one result as PLACE#N: #1 "):
        pair_results(load_results(str(finished)), load_results(f"{finished}#1"))
    with pytest.raises(DataError, match=r"has 6 results; there is no number 7"):
        load_results(f"{finished}#7")
    result = load_results(f"{finished}#1")[0]
    shorter = type(result)(result.line, result.items.slice(1))
    with pytest.raises(DataError, match=r"different items: 12 and 11, 1 only in the first \(first: "):
        compare_results(result, shorter)
    relabelled = {**result.line, "protocol": {**result.line["protocol"], "data_hash": "another"}}
    with pytest.raises(DataError, match=r"other captions or labels \(data hash [0-9a-f]{12} against another\)"):
        compare_results(result, type(result)(relabelled, result.items))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"model": "m", "task": "retrieval", "metrics": {"a": 1.0}}) + "\n")
    with pytest.raises(DataError, match="without its table of items"):
        load_results(str(tmp_path / "plain.jsonl"))


def test_the_report_holds_every_result_and_its_figures(finished: Path, tmp_path: Path) -> None:
    written = write_suite_report(finished, tmp_path / "report")
    page = written[0].read_text(encoding="utf-8")
    lines = suite_results(finished)
    for line in lines:
        assert line["protocol"]["fingerprint"] in page
        assert f"{100 * line['metrics'][line['protocol']['metric']]:.2f}" in page
    for part in ("Confusion matrix", "Calibration", "Recall over the number of results", "Images found for captions"):
        assert part in page
    pictures = sorted((tmp_path / "report" / "figures").glob("*.png"))
    # Calibration, confusion and answers of a classification; recall and both galleries of each retrieval.
    assert len(pictures) == 2 * (3 + 3 + 3)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert page.count("data:image/png") == 2 * 3
    # One script, ours, named by its hash; nothing is loaded from anywhere.
    assert page.count("<script>") == 1 and re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", page)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    again = write_suite_report(finished, tmp_path / "again")
    assert again[0].read_bytes() == written[0].read_bytes()


def test_the_table_leaves_in_three_forms() -> None:
    lines: list[dict[str, Any]] = [
        {"model": model, "task": "t", "data": "d", "split": None, "metrics": {"m": value},
         "protocol": {"name": name, "metric": "m"}}
        for model, name, value in (("a_1|x", "p&q", 0.5), ("a_1|x", "r", 0.25), ("=b", "p&q", 0.125))
    ]  # fmt: skip
    overview = overview_of(lines)
    assert overview.columns == ["model", "p&q", "r"]  # only one protocol is shared, so no mean
    assert overview.rows == [["a_1|x", "50.00", "25.00"], ["=b", "12.50", ""]]
    assert as_csv(overview).splitlines()[2].startswith("'=b") or "\"'=b" in as_csv(overview)
    assert as_markdown(overview).splitlines()[2] == r"| a\_1\|x | 50.00 | 25.00 |"
    assert r"a\_1|x & 50.00 & 25.00 \\" in as_latex(overview) and r"p\&q" in as_latex(overview)
    both = overview_of([*lines, {**lines[1], "model": "=b", "metrics": {"m": 0.75}}])
    assert both.columns[-1] == "mean of 2" and both.rows[1][-1] == "43.75"
    assert math.isclose(float(both.rows[0][-1]), 37.5)
    single = [{**line, "protocol": {"metric": "m"}, "data": line["protocol"]["name"]} for line in lines[:2]]
    assert overview_of(single).columns == ["model", "t p&q", "t r"]  # of single commands there is no mean
