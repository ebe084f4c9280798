"""The protocols of prompt learning as a grid of cells: method x data set x shots x seed, each kept when it is done.

    grid = Grid(methods=("zero-shot", "coop"), sets=(data,), protocol="base-to-new", shots=(16,), seeds=(1, 2, 3))
    for line in run_grid(grid, source, "results/prompts"):   # what is there already is not done again
        ...

base-to-new: learn the first ceil(C/2) classes, test each half among its own classes. few-shot: learn and test all
classes. transfer: learn the first data set, test every one (cross-dataset, or the same classes in other pictures).
`eval/coop_sets.py` has these protocols over the data sets that papers report.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from eval.metrics import hit_probability
from eval.results import append_result, read_results, run_facts
from eval.with_addons import score_images
from vlkit.addons.base import AddOn, Need
from vlkit.addons.class_names import ClassName, check_classes
from vlkit.addons.exchange import ImageConditionedWeights
from vlkit.addons.few_shot import FewShotSplit, sample_few_shot
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.contracts import Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource

PromptProtocol = Literal["base-to-new", "few-shot", "transfer"]
ZERO_SHOT = "zero-shot"
RESULTS = "prompts.jsonl"
# Without splits in the data, so many images of a class are set aside to learn from, whatever the shots: the test
# images of a seed are then the same for all of them.
SET_ASIDE, VAL_SHOTS = 16, 4


@dataclass(frozen=True)
class PromptSet:
    """One data set.

    Attributes:
        name: in tables.
        classes: (C,) in the order of label ids.
        records: labelled images; splits train and test, test alone where it is not learned, or none at all.
        templates: of its zero-shot weights; None: the grid's.
        distinct: refuse a name that stands for two classes.
    """

    name: str
    classes: tuple[ClassName, ...]
    records: tuple[Record, ...]
    templates: str | None = None
    distinct: bool = True

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: fewer than two classes, images without a class, or splits without test.
        """
        if self.distinct:
            check_classes(self.classes, self.name)
        labelled = [record for record in self.records if record.label is not None]
        splits = {record.split for record in labelled if record.split is not None}
        if len(self.classes) < 2 or not labelled:
            raise DataError(f"{self.name}: {len(self.classes)} classes, {len(labelled)} labelled images; 2 and more.")
        if splits and "test" not in splits:
            raise DataError(f"{self.name} has split {', '.join(sorted(splits))}; expected train and test, or none.")


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        methods: `zero-shot`, or add-ons as on the command line, e.g. `coop:context=4`.
        sets: data sets; in `transfer` the first is learned.
        protocol: which classes are learned, which tested.
        shots: images a class.
        seeds: of the draw and of training.
        templates: of the zero-shot weights.
        max_seconds: of training, for methods that can be held to a time and were given none.
    """

    methods: tuple[str, ...]
    sets: tuple[PromptSet, ...]
    protocol: PromptProtocol = "base-to-new"
    shots: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (1, 2, 3)
    templates: str = "photo"
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: nothing to measure, something twice, or a method that is not there.
        """
        names = [one.name for one in self.sets]
        for what, given in (
            ("methods", self.methods),
            ("data sets", names),
            ("shots", self.shots),
            ("seeds", self.seeds),
        ):
            if not given or len(set(given)) != len(given):
                raise ConfigError(f"{what} {list(given)}: expected at least one, each once.")
        if self.protocol == "transfer" and len(self.sets) < 2:
            raise ConfigError("transfer needs the data set that is learned and at least one other.")
        for method in self.methods:
            self.addons(method)

    def addons(self, method: str) -> tuple[AddOn, ...]:
        """What a method is made of.

        Raises:
            ConfigError: no such method, or one that is fitted already.
        """
        if method == ZERO_SHOT:
            return ()
        addon = make_addon(method)
        if addon.fitted is not None:
            raise ConfigError(f"{method} is fitted already; the grid fits methods itself.")
        limited = {one.name for one in fields(addon)} >= {"max_seconds"} and getattr(addon, "max_seconds", 0) is None
        return (replace(addon, max_seconds=self.max_seconds) if limited else addon,)  # type: ignore[call-arg]

    def cells(self) -> list["Cell"]:
        """All of them; zero-shot does not depend on the shots but on the test images of the seed."""
        learned = self.sets[:1] if self.protocol == "transfer" else self.sets
        return [
            Cell(method, one, shots, seed)
            for one in learned
            for shots in self.shots
            for seed in self.seeds
            for method in self.methods
        ]


class Cell(NamedTuple):
    """One training and its tests."""

    method: str
    data: PromptSet
    shots: int
    seed: int


class _Tested(NamedTuple):
    """Images and classes of one test."""

    name: str  # base, new, all, or a data set's name
    classes: tuple[ClassName, ...]
    records: tuple[Record, ...]  # labels count from the first of the classes
    templates: str


class _Drawn(NamedTuple):
    train: tuple[Record, ...]
    val: tuple[Record, ...]
    test: tuple[Record, ...]
    unlabelled: tuple[Record, ...]  # to be learned from without labels, `train` among them


def run_grid(
    grid: Grid, source: FeatureSource, folder: str | Path, device: str = "cpu", progress: Progress | None = None
) -> Iterator[dict[str, Any]]:
    """Every cell's line in order, those that lie in `folder` already without work.

    Args:
        grid: what is measured.
        source: the model.
        folder: of the results file; each line is appended when its cell is done.
        device: for the record.
        progress: called with (done, total) cells.

    Raises:
        DataError: images that cannot be read, or too few of a class.
        VlkitError: what a method finds wrong.
    """
    path = Path(folder) / RESULTS
    known = {line["key"]: line for line in read_results(path).lines if "key" in line} if path.exists() else {}
    cells = grid.cells()
    passes: dict[bool, Passes] = {}
    for number, cell in enumerate(cells):
        key = cell_key(grid, cell, source)
        line = known.get(key)
        if line is None:
            started = time.time()
            found = measure(grid, cell, source, passes)
            line = {"task": "prompts", "key": key, "model": source.name, "model_identity": source.identity, **found}
            line["run"] = run_facts(started, device)
            append_result(path, line)
        if progress:
            progress(number + 1, len(cells))
        yield line


def cell_key(grid: Grid, cell: Cell, source: FeatureSource) -> str:
    """Sixteen hex digits, equal for cells whose results are the same."""
    used = grid.sets if grid.protocol == "transfer" else (cell.data,)
    images = [[one.name, [item.names for item in one.classes], [[r.key, r.label] for r in one.records]] for one in used]
    what: list[Any] = [
        source.identity, grid.protocol, grid.templates, grid.max_seconds, cell.method, cell.shots, cell.seed, images,
        SET_ASIDE, VAL_SHOTS,
    ]  # fmt: skip
    if any(one.templates for one in used):
        what.append([one.templates for one in used])
    if any(record.split for one in used for record in one.records):
        what.append("as CoOp: all of a class that has too few, validation from its own split")
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def measure(grid: Grid, cell: Cell, source: FeatureSource, passes: dict[bool, Passes]) -> dict[str, Any]:
    """One cell: draw, train, test.

    Args:
        grid: what is measured.
        cell: which part of it.
        source: the model.
        passes: image features so far, by whether they have patches; filled.
    """
    pipeline = Pipeline(grid.addons(cell.method))
    read = passes.setdefault(pipeline.local, Passes(source, local=pipeline.local))
    drawn = draw(cell.data, cell.shots, cell.seed)
    learned, tests = _classes(grid, cell, drawn)
    templates = cell.data.templates or grid.templates
    wanted = {need for addon in pipeline.addons for need in addon.needs | addon.uses}

    def part(need: Need, split: str, records: Sequence[Record]) -> Part | None:
        """Read only for a method that looks at it: ImageNet's training images are many."""
        chosen = _among(records, 0, len(learned))
        return _part(read, split, chosen, need != "unlabelled_images") if need in wanted and chosen else None

    reference = Reference(
        class_names=learned,
        few_shot=part("few_shot_labels", "train", drawn.train),
        images=part("unlabelled_images", "train", drawn.unlabelled),
        val=part("val_labels", "val", drawn.val),
        seed=cell.seed,
        passes=read,
    )
    began, worked = time.perf_counter(), time.process_time()
    pipeline = pipeline.fit(reference, source, templates) if pipeline.addons else PLAIN
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    scored = {one.name: _test(pipeline, one, source, read) for one in tests}
    return {
        "protocol": {
            "name": grid.protocol, "templates": templates, "max_seconds": grid.max_seconds,
            "images": f"{cell.shots} of a class to learn, {VAL_SHOTS} to validate",
        },
        "method": cell.method, "data": cell.data.name, "shots": cell.shots, "seed": cell.seed,
        "metrics": {name: None if one is None else sum(one.hits) / len(one.hits) for name, one in scored.items()},
        "hits": {name: None if one is None else list(one.hits) for name, one in scored.items()},
        "keys": {one.name: [record.key for record in one.records] for one in tests},
        "cost": {
            "train_seconds": seconds,
            "train_cpu_seconds": worked,
            "steps": sum(getattr(one, "steps", None) or 0 for one in pipeline.addons),
            "trained": sum(trained_numbers(one) for one in pipeline.addons),
            **_cost(scored, tests),
        },
    }  # fmt: skip


def trained_numbers(addon: AddOn) -> int:
    """Numbers a method has learned: as it says, else those of its learned tensors."""
    said = getattr(addon, "trained", None)
    return said if isinstance(said, int) else sum(one.numel() for one in addon.state().tensors.values())


def draw(data: PromptSet, shots: int, seed: int) -> _Drawn:
    """Images to learn from, to validate on and to test.

    Where the data have splits, these say which images serve for what, and of a class with too few all are taken, as in
    CoOp. Without, images are set aside for the test.

    Raises:
        DataError: a class with too few images.
    """
    labelled = [record for record in data.records if record.label is not None]
    names = [item.shown for item in data.classes]
    by_split = {split: [record for record in labelled if record.split == split] for split in ("train", "val", "test")}
    if by_split["test"]:
        pool, held_out = by_split["train"], by_split["val"]
        few = _sampled(pool, names, shots, seed, 0 if held_out else VAL_SHOTS, fewer=True)
        val = _sampled(held_out, names, VAL_SHOTS, seed, 0, fewer=True).train if held_out else few.val
        kept = [row for row in range(len(pool)) if held_out or row not in set(few.val)]
        return _Drawn(
            tuple(pool[row] for row in few.train),
            tuple((held_out or pool)[row] for row in val),
            tuple(by_split["test"]),
            tuple(pool[row] for row in kept),
        )
    wide = _sampled(labelled, names, max(SET_ASIDE, shots), seed, VAL_SHOTS)
    few = _sampled(labelled, names, shots, seed, VAL_SHOTS)
    if not wide.rest:
        most = max(SET_ASIDE, shots)
        raise DataError(f"{data.name}: no image is left to test on beside {most} + {VAL_SHOTS} of each class.")
    kept = [row for row in range(len(labelled)) if row not in {*few.val, *wide.rest}]
    return _Drawn(*(tuple(labelled[row] for row in rows) for rows in (few.train, few.val, wide.rest, kept)))


def _sampled(
    records: Sequence[Record], names: Sequence[str], shots: int, seed: int, val_shots: int, fewer: bool = False
) -> FewShotSplit:
    labels = torch.tensor([record.label for record in records], dtype=torch.int64)
    return sample_few_shot(labels, len(names), shots, seed, val_shots, names, fewer=fewer)


def _classes(grid: Grid, cell: Cell, drawn: _Drawn) -> tuple[tuple[ClassName, ...], list[_Tested]]:
    """The classes that are learned, and the tests."""
    classes, templates = cell.data.classes, cell.data.templates or grid.templates
    if grid.protocol == "base-to-new":
        half = (len(classes) + 1) // 2
        base = _Tested("base", classes[:half], _among(drawn.test, 0, half), templates)
        new = _Tested("new", classes[half:], _among(drawn.test, half, len(classes)), templates)
        return classes[:half], [base, new]
    if grid.protocol == "few-shot":
        return classes, [_Tested("all", classes, drawn.test, templates)]
    tests = [_Tested(cell.data.name, classes, drawn.test, templates)]
    for one in grid.sets[1:]:
        given = tuple(record for record in one.records if record.label is not None and record.split == "test")
        images = given or draw(one, 1, cell.seed).test
        tests.append(_Tested(one.name, one.classes, images, one.templates or grid.templates))
    return classes, tests


def _among(records: Sequence[Record], first: int, end: int) -> tuple[Record, ...]:
    """Images of the classes from `first` up to `end`, labels counted from the first."""
    kept = [(record, record.label) for record in records if record.label is not None]
    return tuple(replace(record, label=label - first) for record, label in kept if first <= label < end)


def _part(passes: Passes, split: str, records: Sequence[Record], labels: bool = True) -> Part:
    vectors, chosen = _read(passes, records, PLAIN)
    return Part(split, vectors, torch.tensor([record.label for record in chosen]) if labels else None, chosen)


def _read(passes: Passes, records: Sequence[Record], pipeline: Pipeline) -> tuple[Any, tuple[Record, ...]]:
    read = passes.read(records, pipeline.edits, pipeline.views)
    if read.failures:
        row, reason = read.failures[0]
        raise DataError(f"{len(read.failures)} of {len(records)} images cannot be read: {records[row].key}: {reason}")
    return read.vectors, tuple(records)


class _Scored(NamedTuple):
    hits: tuple[float, ...]
    text_seconds: float
    image_seconds: float
    per_image: bool


def _test(pipeline: Pipeline, test: _Tested, source: FeatureSource, passes: Passes) -> "_Scored | None":
    """None where the method holds for the learned classes alone."""
    names = tuple(item.shown for item in test.classes)
    if any(not one.any_classes and one.fitted and one.fitted.class_names != names for one in pipeline.addons):
        return None
    vectors, records = _read(passes, test.records, pipeline)
    labels = torch.tensor([record.label for record in records])
    began = time.perf_counter()
    weights = pipeline.class_weights(test.classes, source, test.templates)
    text = time.perf_counter() - began
    began = time.perf_counter()
    scored = score_images(pipeline, vectors, labels, test.classes, source, test.templates)
    image = max(time.perf_counter() - began - text, 0.0)
    hits: Tensor = hit_probability(scored.ranks, 1)
    per_image = any(isinstance(one, ImageConditionedWeights) for one in weights)
    return _Scored(tuple(round(hit, 4) for hit in hits.tolist()), text, image / len(records), per_image)


def _cost(scored: "Mapping[str, _Scored | None]", tests: Sequence[_Tested]) -> dict[str, Any]:
    """Of the first test: seconds for the class weights, and for each image beyond its features."""
    first = scored[tests[0].name]
    assert first is not None, "the classes that were learned can be tested"
    return {
        "text_seconds": first.text_seconds,
        "image_seconds": first.image_seconds,
        "text_for_each_image": first.per_image,
    }
