"""Zero-shot and what a few labelled images make of it: accuracy of every few-shot add-on, over seeds.

    python tests/benchmarks/few_shot_addons.py --model local-dir:tests/data/encoder --data $VLKIT_DATA/caltech101 \\
        --exclude Faces_easy [--shots 4,16] [--seeds 1,2,3] [--methods tip_adapter_f,clap] [--json]

A seed draws 16 images of each class to learn from, of which fewer shots are the first, 4 to validate on and leaves the
rest, 10 of Caltech-101's 30 here, to test on; these are the same for every method and number of shots. The images are
encoded once, and once more in ten views. Hyper-parameters are chosen on the validation images or fixed; nothing is
chosen on the test images. Methods that see the unlabelled test images say so.
Intervals: 95%, Student's t over seeds, of the accuracy and of its difference from zero-shot on the same images.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from eval.class_names import name_classes
from eval.general_encoder import CALTECH_NAMES
from vlkit.addons.base import AddOn
from vlkit.addons.class_names import parse_class
from vlkit.addons.few_shot import sample_few_shot
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference, Stream
from vlkit.addons.registry import find_method
from vlkit.data.sources import read_source
from vlkit.features.source import open_source

METHODS = (
    "tip_adapter", "tip_adapter_f", "tip_x", "ape", "ape_t", "knn", "clip_adapter", "task_residual", "lp_plus_plus",
    "clap", "tda", "tfup", "tfup_t",
)  # fmt: skip
MOST_SHOTS, VAL_SHOTS = 16, 4
PLAIN_NAME = "zero-shot"
# Quantiles 0.975 of Student's t by degrees of freedom; 1.96 from there on is near enough for a table.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Row(NamedTuple):
    """One method with one number of shots."""

    method: str
    shots: int
    accuracy: float
    half_width: float
    change: float
    change_half_width: float
    seconds: float  # of fitting, features ready
    transductive: bool
    each: list[float]  # accuracy by seed


class Drawn(NamedTuple):
    """What a seed gives."""

    reference: Reference
    test: Part


class Images(NamedTuple):
    """The labelled images of a folder."""

    whole: Part
    passes: Passes
    names: tuple[str, ...]
    templates: str


def read(model: str, data: Path, exclude: Sequence[str], templates: str) -> Images:
    found = read_source(str(data))
    classes = name_classes(found.class_names, found.records, exclude=exclude)
    names = tuple(CALTECH_NAMES.get(name, name) for name in classes.names)
    passes = Passes(open_source(model))
    images = passes.read(classes.records)
    if images.failures:
        raise SystemExit(f"{len(images.failures)} images cannot be read; the first: {images.failures[0][1]}")
    labels = torch.tensor([record.label for record in classes.records])
    return Images(Part("all", images.vectors, labels, tuple(classes.records)), passes, names, templates)


def draw(images: Images, shots: int, seed: int) -> Drawn:
    whole = images.whole
    assert whole.labels is not None
    most = sample_few_shot(whole.labels, len(images.names), MOST_SHOTS, seed, VAL_SHOTS, images.names)
    few = sample_few_shot(whole.labels, len(images.names), shots, seed, VAL_SHOTS, images.names)
    test = whole.rows(most.rest)
    reference = Reference(
        class_names=tuple(parse_class(name) for name in images.names),
        few_shot=whole.rows(few.train),
        val=whole.rows(most.val),
        stream=Stream(test.vectors, test.records),
        seed=seed,
        passes=images.passes,
    )
    return Drawn(reference, test)


def accuracy(pipeline: Pipeline, drawn: Drawn, images: Images) -> float:
    classifier = pipeline.classifier(drawn.reference.class_names, images.passes.source, images.templates)
    assert drawn.test.labels is not None
    return drawn.reference.metric(classifier.logits(drawn.test.vectors), drawn.test.labels)


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of the mean."""
    degrees = len(values) - 1
    if degrees < 1:
        return math.nan
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def row_of(name: str, shots: int, addon: AddOn, seeds: Sequence[int], images: Images, plain: Sequence[float]) -> Row:
    each, seconds = [], []
    for seed in seeds:
        drawn = draw(images, shots or MOST_SHOTS, seed)
        began = time.perf_counter()
        fitted = Pipeline([addon]).fit(drawn.reference, images.passes.source, images.templates)
        seconds.append(time.perf_counter() - began)
        each.append(accuracy(fitted, drawn, images))
    changes = [one - other for one, other in zip(each, plain, strict=True)]
    return Row(
        name,
        shots,
        statistics.mean(each),
        half_width(each),
        statistics.mean(changes),
        half_width(changes),
        statistics.mean(seconds),
        addon.transductive,
        each,
    )


def measure(images: Images, shots: Sequence[int], seeds: Sequence[int], methods: Sequence[str]) -> list[Row]:
    plain = [accuracy(PLAIN, draw(images, MOST_SHOTS, seed), images) for seed in seeds]
    rows = [Row(PLAIN_NAME, 0, statistics.mean(plain), half_width(plain), 0.0, 0.0, 0.0, False, plain)]
    for recipe in {find_method(name).fit_views for name in methods}:  # all views in one pass, before anything is timed
        images.passes.read(images.whole.records, recipe=recipe)
    for one in (0, *shots):
        # Shots make no difference to methods that take no labels: those stand once, with 0.
        addons = {name: find_method(name)() for name in methods}
        fitting = {name: addon for name, addon in addons.items() if bool(one) == ("few_shot_labels" in addon.needs)}
        rows += [row_of(name, one, addon, seeds, images, plain) for name, addon in fitting.items()]
    return rows


def show(rows: Sequence[Row]) -> None:
    print(f"{'method':<16} {'shots':>5}   {'accuracy (95% over seeds)':<26} {'against zero-shot':<22} {'fit':>8}")
    for row in rows:
        cell = f"{row.accuracy:7.2%} ± {row.half_width:.2%}"
        change = f"{row.change:+7.2%} ± {row.change_half_width:.2%}" if row.method != PLAIN_NAME else ""
        name = row.method + (" *" if row.transductive else "")
        print(f"{name:<16} {row.shots:>5}   {cell:<26} {change:<22} {row.seconds:>6.2f} s")
    print("* sees the unlabelled test images, and no labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="class folders")
    parser.add_argument("--exclude", default="", help="classes left out, with commas")
    parser.add_argument("--shots", default="4,16")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--templates", default="simple")
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    exclude = [name for name in arguments.exclude.split(",") if name]
    images = read(arguments.model, arguments.data, exclude, arguments.templates)
    shots, seeds = ([int(one) for one in text.split(",")] for text in (arguments.shots, arguments.seeds))
    rows = measure(images, shots, seeds, arguments.methods.split(","))
    if arguments.json:
        for row in rows:
            print(json.dumps(row._asdict()))
    else:
        show(rows)


if __name__ == "__main__":
    main()
