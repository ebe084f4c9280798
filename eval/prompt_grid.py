"""The protocols of prompt learning as a grid of cells: method x data set x shots x seed, each kept when it is done.

    grid = Grid(methods=("zero-shot", "coop"), sets=(data,), protocol="base-to-new", shots=(16,), seeds=(1, 2, 3))
    for line in run_grid(grid, source, "results/prompts"):   # what is there already is not done again
        ...

base-to-new: learn the first ceil(C/2) classes, test each half among its own classes. few-shot: learn and test all
classes. transfer: learn the first data set, test every one (cross-dataset, or the same classes in other pictures).
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
from vlkit.addons.base import AddOn
from vlkit.addons.class_names import ClassName, check_classes
from vlkit.addons.exchange import ImageConditionedWeights
from vlkit.addons.few_shot import sample_few_shot
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
        records: labelled images; splits train and test, or none at all.
    """

    name: str
    classes: tuple[ClassName, ...]
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: fewer than two classes, images without a class, or one of train and test only.
        """
        check_classes(self.classes, self.name)
        labelled = [record for record in self.records if record.label is not None]
        splits = {record.split for record in labelled if record.split is not None}
        if len(self.classes) < 2 or not labelled:
            raise DataError(f"{self.name}: {len(self.classes)} classes, {len(labelled)} labelled images; 2 and more.")
        if splits and not {"train", "test"} <= splits:
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
    what = [
        source.identity, grid.protocol, grid.templates, grid.max_seconds, cell.method, cell.shots, cell.seed, images,
        SET_ASIDE, VAL_SHOTS,
    ]  # fmt: skip
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
    reference = Reference(
        class_names=learned,
        few_shot=_part(read, "train", _among(drawn.train, 0, len(learned))),
        images=_part(read, "train", _among(drawn.unlabelled, 0, len(learned)), labels=False),
        val=_part(read, "val", _among(drawn.val, 0, len(learned))),
        seed=cell.seed,
        passes=read,
    )
    began = time.perf_counter()
    pipeline = pipeline.fit(reference, source, grid.templates) if pipeline.addons else PLAIN
    seconds = time.perf_counter() - began
    scored = {one.name: _test(pipeline, one, source, read, grid.templates) for one in tests}
    return {
        "protocol": {
            "name": grid.protocol, "templates": grid.templates, "max_seconds": grid.max_seconds,
            "images": f"{cell.shots} of a class to learn, {VAL_SHOTS} to validate",
        },
        "method": cell.method, "data": cell.data.name, "shots": cell.shots, "seed": cell.seed,
        "metrics": {name: None if one is None else sum(one.hits) / len(one.hits) for name, one in scored.items()},
        "hits": {name: None if one is None else list(one.hits) for name, one in scored.items()},
        "keys": {one.name: [record.key for record in one.records] for one in tests},
        "cost": {
            "train_seconds": seconds,
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
    """Images to learn from, to validate on and to test; where the data have splits, the test split tests.

    Raises:
        DataError: a class with too few images.
    """
    labelled = [record for record in data.records if record.label is not None]
    pool = [record for record in labelled if record.split in (None, "train")]
    labels = torch.tensor([record.label for record in pool])
    most = max(SET_ASIDE, shots) if all(record.split is None for record in pool) else shots
    names = [item.shown for item in data.classes]
    wide = sample_few_shot(labels, len(names), most, seed, VAL_SHOTS, names)
    few = sample_few_shot(labels, len(names), shots, seed, VAL_SHOTS, names)
    test = [record for record in labelled if record.split == "test"] or [pool[row] for row in wide.rest]
    if not test:
        raise DataError(f"{data.name}: no image is left to test on beside {most} + {VAL_SHOTS} of each class.")
    set_apart = {*few.val, *(() if any(record.split == "test" for record in labelled) else wide.rest)}
    unlabelled = tuple(record for row, record in enumerate(pool) if row not in set_apart)
    return _Drawn(tuple(pool[row] for row in few.train), tuple(pool[row] for row in few.val), tuple(test), unlabelled)


def _classes(grid: Grid, cell: Cell, drawn: _Drawn) -> tuple[tuple[ClassName, ...], list[_Tested]]:
    """The classes that are learned, and the tests."""
    classes = cell.data.classes
    if grid.protocol == "base-to-new":
        half = (len(classes) + 1) // 2
        base = _Tested("base", classes[:half], _among(drawn.test, 0, half))
        return classes[:half], [base, _Tested("new", classes[half:], _among(drawn.test, half, len(classes)))]
    if grid.protocol == "few-shot":
        return classes, [_Tested("all", classes, drawn.test)]
    others = [(one, draw(one, 1, cell.seed).test) for one in grid.sets[1:]]
    tests = [_Tested(cell.data.name, classes, drawn.test)]
    return classes, tests + [_Tested(one.name, one.classes, test) for one, test in others]


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


def _test(pipeline: Pipeline, test: _Tested, source: FeatureSource, passes: Passes, templates: str) -> "_Scored | None":
    """None where the method holds for the learned classes alone."""
    names = tuple(item.shown for item in test.classes)
    if any(not one.any_classes and one.fitted and one.fitted.class_names != names for one in pipeline.addons):
        return None
    vectors, records = _read(passes, test.records, pipeline)
    labels = torch.tensor([record.label for record in records])
    began = time.perf_counter()
    weights = pipeline.class_weights(test.classes, source, templates)
    text = time.perf_counter() - began
    began = time.perf_counter()
    scored = score_images(pipeline, vectors, labels, test.classes, source, templates)
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
