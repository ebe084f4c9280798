"""A leaderboard of add-ons: plain against each one that can be fitted here, on the same images, with paired intervals.

    bench = classification_bench(passes, records, class_names, shots=16, seed=0)
    board = compare_addons(bench, source, passes)
    board.rows[0].difference, board.left_out["calip"]

The images go through the tower once for each kind of pass (plain, or edited, or with views), however many add-ons want
it; see `Passes`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from eval.classification import ClassificationEvaluator
from eval.metrics.paired import PairedDifference, paired_difference
from eval.report import Section, Table
from eval.retrieval import RetrievalEvaluator
from vlkit.addons.adapt import Drawn, captioned_reference, labelled_reference
from vlkit.addons.base import AddOn, Task
from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import addon_rows, find_method
from vlkit.contracts import Evaluation, Progress
from vlkit.data.records import Record
from vlkit.errors import DataError, VlkitError
from vlkit.features.source import FeatureSource

HEADLINES: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy@1",),
    "retrieval": (
        "text_to_image/recall@10",
        "text_to_image/recall@1",
        "image_to_text/recall@10",
        "image_to_text/recall@1",
    ),
}
NEEDS_AND_TIMES = ("slot", "needs", "fit, s", "use, s")


@dataclass(frozen=True)
class Bench:
    """What add-ons are compared on.

    Attributes:
        task: classification or retrieval.
        test: images that count.
        reference: images that may be fitted on; disjoint from the test images.
        class_names: (C,) of classification.
        templates: of the class weights.
        how: where the parts came from, in words.
    """

    task: Task
    test: tuple[Record, ...]
    reference: Reference
    class_names: tuple[str, ...] = ()
    templates: str = DEFAULT_TEMPLATES
    how: str = ""


class Row(NamedTuple):
    """One line of the leaderboard."""

    name: str
    slot: str
    needs: tuple[str, ...]
    transductive: bool
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    differences: Mapping[str, PairedDifference]  # against plain
    fit_seconds: float  # image passes not counted: the first method that wants one makes it for all
    use_seconds: float  # features of the test images not counted


@dataclass(frozen=True)
class Leaderboard:
    """Plain first, then the add-ons, the best first.

    Attributes:
        bench: what was measured on.
        rows: of those that ran.
        left_out: name -> why it does not apply here.
        num_passes: passes of the image tower.
        plain: the whole evaluation without add-ons.
        pass_seconds: of all these passes.
    """

    bench: Bench
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]
    num_passes: int
    plain: Evaluation
    pass_seconds: float = 0.0


def classification_bench(
    passes: Passes,
    records: Sequence[Record],
    class_names: Sequence[str],
    *,
    shots: int = 16,
    seed: int = 0,
    templates: str = DEFAULT_TEMPLATES,
) -> tuple[Bench, Drawn]:
    """A bench of labelled images: their own splits, or few shots and validation by seed and the rest as the test.

    Raises:
        DataError: classes with too few images, or nothing left to test on.
    """
    classes = [parse_class(name) for name in class_names]
    splits = {record.split for record in records}
    if {"train", "test"} <= splits:
        train = [record for record in records if record.split == "train"]
        val = [record for record in records if record.split == "val"] or None
        reference, drawn = labelled_reference(passes, train, classes, shots=shots, seed=seed, val=val)
        test = tuple(record for record in records if record.split == "test")
        how = f"the data's own splits; {shots} shots a class, seed {seed}"
    else:
        reference, drawn = labelled_reference(passes, records, classes, shots=shots, seed=seed)
        test = drawn.rest
        reference = replace(reference, images=_without(reference, test), labelled=None)
        held_out = len(drawn.val) // len(classes)
        how = f"{shots} images a class to fit on and {held_out} to validate on, by seed {seed}; the rest is tested on"
    if not test:
        raise DataError(f"With {shots} shots a class no image is left to test on. Lower --shots.")
    return Bench("classification", test, reference, tuple(class_names), templates, how), drawn


def retrieval_bench(passes: Passes, records: Sequence[Record], *, seed: int = 0, on: str = "test") -> Bench:
    """A bench of captioned images: fitted on the training split, measured on another.

    Raises:
        DataError: no such splits.
    """
    of = {split: tuple(r for r in records if r.split == split and r.captions) for split in ("train", on)}
    for split, chosen in of.items():
        if not chosen:
            raise DataError(
                f"The data have no captioned images of split {split}; add-ons are fitted on train and measured on {on}."
            )
    reference, _ = captioned_reference(passes, of["train"], seed=seed)
    return Bench("retrieval", of[on], reference, how=f"fitted on train ({len(of['train'])} images), measured on {on}")


def compare_addons(
    bench: Bench,
    source: FeatureSource,
    passes: Passes,
    addons: Sequence[AddOn] | None = None,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Leaderboard:
    """Plain, then every add-on alone.

    Args:
        bench: what to measure on.
        source: the model.
        passes: image passes of it, shared by all.
        addons: which; None takes every method with its own settings.
        progress: called with (add-ons done, all).
        say: told of each add-on that is left out, and why.
    """
    chosen = [find_method(name)() for name in addon_rows()] if addons is None else list(addons)
    plain = _evaluate(bench, PLAIN, source, passes)
    rows, left_out = [_row(bench, plain, plain, None, 0.0, plain_seconds(bench, source, passes))], {}
    for done, addon in enumerate(chosen, start=1):
        try:
            rows.append(_measured(bench, addon, plain, source, passes))
        except VlkitError as error:
            left_out[addon.name] = str(error)
            say(f"{addon.name} is left out: {error}")
        if progress:
            progress(done, len(chosen))
    head = HEADLINES[bench.task][0]
    ranked = [rows[0], *sorted(rows[1:], key=lambda row: -row.metrics[head])]
    return Leaderboard(bench, tuple(ranked), left_out, passes.num_passes, plain, passes.seconds)


def plain_seconds(bench: Bench, source: FeatureSource, passes: Passes) -> float:
    """Seconds of scoring without add-ons, features ready."""
    began = time.perf_counter()
    _evaluate(bench, PLAIN, source, passes)
    return time.perf_counter() - began


def board_rows(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """The board as columns and rows of text."""
    heads = HEADLINES[board.bench.task]
    columns = ["add-on"]
    for head in heads:
        columns += [head, "change (95% interval)"]
    rows = [
        [_shown_name(row)]
        + [cell for head in heads for cell in (f"{row.metrics[head]:.2%}", change_text(row, head))]
        + _needs_and_times(row)
        for row in board.rows
    ]
    return [*columns, *NEEDS_AND_TIMES], rows


def _shown_name(row: Row) -> str:
    return row.name + (" (sees the test images)" if row.transductive else "")


def _needs_and_times(row: Row) -> list[str]:
    return [row.slot, ", ".join(row.needs).replace("_", " "), f"{row.fit_seconds:.2f}", f"{row.use_seconds:.2f}"]


def leaderboard_sections(board: Leaderboard) -> list[Section]:
    """The board as sections of a report: a table for each direction of a ranking, then what the rows need."""
    bench, heads = board.bench, HEADLINES[board.bench.task]
    note = (
        f"{len(bench.test)} images, 95% intervals. Changes are points against plain on the same images, with paired "
        "intervals; where zero lies within, chance may be all there is."
        + (" * sees the test images." if any(row.transductive for row in board.rows) else "")
    )
    sections: list[Section] = []
    for direction in dict.fromkeys(head.rpartition("/")[0] for head in heads):
        title = direction.replace("_", " ").capitalize() or "Add-ons"
        sections.append(_metrics_table(board, title, [head for head in heads if head.startswith(direction)], note))
    times = (
        f"{board.num_passes} passes of the image tower serve all rows; they took {board.pass_seconds:.0f} s, which no "
        "row's time holds."
    )
    rows = [[_shown_name(row), *_needs_and_times(row)] for row in board.rows]
    sections.append(Table("Needs and times", ["add-on", *NEEDS_AND_TIMES], rows, times, sortable=True))
    if board.left_out:
        sections.append(Table("Left out", ["add-on", "reason"], list(board.left_out.items())))
    return sections


def _metrics_table(board: Leaderboard, title: str, heads: Sequence[str], note: str) -> Table:
    """Plain, then the others by the first of the metrics."""
    columns = ["add-on"]
    for head in heads:
        columns += [head.rpartition("/")[2], "change"]
    rows = []
    for row in [board.rows[0], *sorted(board.rows[1:], key=lambda one: -one.metrics[heads[0]])]:
        cells = [row.name + (" *" if row.transductive else "")]
        for head in heads:
            low, high = row.intervals[head]
            cells += [_breakable(f"{row.metrics[head]:.2%}", low, high, ".1f")]
            change = row.differences.get(head)
            cells += [_breakable(f"{100 * change.difference:+.2f}", change.low, change.high, "+.1f") if change else ""]
        rows.append(cells)
    return Table(title, columns, rows, note, sortable=True)


def _breakable(value: str, low: float, high: float, digits: str) -> str:
    """A value and its interval in points; on a phone the line breaks between them, not within the interval."""
    return f"{value} ({100 * low:{digits}}\u00a0to\u00a0{100 * high:{digits}})"


def change_text(row: Row, metric: str) -> str:
    """The difference to plain with its interval, in points."""
    change = row.differences.get(metric)
    if change is None:
        return ""
    return f"{100 * change.difference:+.2f} ({100 * change.low:+.2f} to {100 * change.high:+.2f})"


def as_json(board: Leaderboard) -> dict[str, object]:
    """The board as JSON types."""
    rows = [
        {
            "name": row.name,
            "slot": row.slot,
            "needs": list(row.needs),
            "transductive": row.transductive,
            "metrics": dict(row.metrics),
            "intervals": {key: list(pair) for key, pair in row.intervals.items()},
            "differences": {key: change._asdict() for key, change in row.differences.items()},
            "fit_seconds": round(row.fit_seconds, 3),
            "use_seconds": round(row.use_seconds, 3),
        }
        for row in board.rows
    ]
    bench = {"task": board.bench.task, "test_images": len(board.bench.test), "how": board.bench.how}
    passes = {"num_passes": board.num_passes, "pass_seconds": round(board.pass_seconds, 3)}
    return {"bench": bench, **passes, "rows": rows, "left_out": dict(board.left_out)}


def _measured(bench: Bench, addon: AddOn, plain: Evaluation, source: FeatureSource, passes: Passes) -> Row:
    began, in_passes = time.perf_counter(), passes.seconds
    pipeline = Pipeline([addon])
    if not addon.transductive:
        pipeline = pipeline.fit(bench.reference, source, bench.templates)
    fitting = time.perf_counter() - began - (passes.seconds - in_passes)
    passes.read(bench.test, pipeline.edits, pipeline.views)
    ready = time.perf_counter()
    evaluation = _evaluate(bench, pipeline, source, passes)
    return _row(bench, evaluation, plain, addon, fitting, time.perf_counter() - ready)


def _evaluate(bench: Bench, pipeline: Pipeline, source: FeatureSource, passes: Passes) -> Evaluation:
    if bench.task == "retrieval":
        return RetrievalEvaluator(bench.test, reference=bench.reference, passes=passes).run(source, pipeline)
    return ClassificationEvaluator(
        bench.test, bench.class_names, bench.templates, reference=bench.reference, passes=passes
    ).run(source, pipeline)


def _row(bench: Bench, evaluation: Evaluation, plain: Evaluation, addon: AddOn | None, fit: float, use: float) -> Row:
    heads = HEADLINES[bench.task]
    changes = {} if addon is None else {head: _change(plain, evaluation, head) for head in heads}
    return Row(
        name="plain" if addon is None else addon.name,
        slot="" if addon is None else addon.slot,
        needs=() if addon is None else tuple(sorted(addon.needs | addon.uses)),
        transductive=addon is not None and addon.transductive,
        metrics={head: evaluation.metrics[head] for head in heads},
        intervals={head: evaluation.intervals[head] for head in heads},
        differences=changes,
        fit_seconds=fit,
        use_seconds=use,
    )


def _change(plain: Evaluation, adapted: Evaluation, metric: str) -> PairedDifference:
    """Between two evaluations of the same images."""
    first, units = _hits(plain, metric)
    second, _ = _hits(adapted, metric)
    return paired_difference(first, second, units=units, num_permutations=1000)


def _hits(evaluation: Evaluation, metric: str) -> tuple[Tensor, Tensor]:
    """(n,) hits of a metric, and the image each query belongs to."""
    table = evaluation.per_item
    assert table is not None
    direction, _, name = metric.rpartition("/")
    if direction:
        table = table.filter([found == direction for found in table.column("direction").to_pylist()])
    hits = torch.tensor(table.column(f"hit@{name.rpartition('@')[2]}").to_pylist())
    number = {key: place for place, key in enumerate(dict.fromkeys(table.column("key").to_pylist()))}
    return hits, torch.tensor([number[key] for key in table.column("key").to_pylist()])


def _without(reference: Reference, test: Sequence[Record]) -> Part | None:
    """The unlabelled images that are not tested on: else methods would see the test images without saying so."""
    images = reference.images
    if images is None:
        return None
    left = {record.key for record in test}
    return images.rows([row for row, record in enumerate(images.records) if record.key not in left])
