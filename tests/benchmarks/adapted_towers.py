"""Zero-shot and what prompts and updates inside the towers make of it, after so many seconds of training each.

    python tests/benchmarks/adapted_towers.py --model local-dir:tests/data/encoder --data $VLKIT_DATA/caltech101 \\
        --exclude Faces_easy [--shots 16] [--seed 0] [--seconds 60] [--addon maple:lr=0.02 ...] [--json]

Of each class 16 images are learned from, 4 validated on and the rest, 10 of Caltech-101's 30 here, tested on; all by
seed. Nothing is chosen on the test images. Far shorter than the papers' trainings, which take a GPU: it tells what a
method does in the first minute, not what it reaches.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.class_names import name_classes
from eval.general_encoder import CALTECH_NAMES
from vlkit.addons.class_names import parse_class
from vlkit.addons.few_shot import sample_few_shot
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.data.sources import read_source
from vlkit.features.source import open_source

# One pass over the images: a second one would take the first as warm-up. Crops as the encoder was trained with.
SHORT = "epochs=1,crop=0.5,precision=bf16"
METHODS = (
    f"visual_prompt:{SHORT},lr=0.05,batch_size=16,depth=6",
    f"maple:{SHORT},lr=0.02,batch_size=16",
    f"prompt_src:{SHORT},lr=0.02,batch_size=16",
    f"clip_lora:{SHORT},lr=0.002,batch_size=16",
)


class Row(NamedTuple):
    """One method."""

    method: str
    val: float
    test: float
    trained: int  # numbers learned
    steps: int
    seconds: float


class Images(NamedTuple):
    """What is learned from, and what is tested on."""

    reference: Reference
    test: Part


def read(arguments: argparse.Namespace) -> tuple[Images, Passes]:
    found = read_source(str(arguments.data))
    classes = name_classes(found.class_names, found.records, exclude=arguments.exclude)
    names = tuple(CALTECH_NAMES.get(name, name) for name in classes.names)
    passes = Passes(open_source(arguments.model))
    images = passes.read(classes.records)
    labels = torch.tensor([record.label for record in classes.records])
    whole = Part("all", images.vectors, labels, tuple(classes.records))
    drawn = sample_few_shot(labels, len(names), arguments.shots, arguments.seed, class_names=names)
    reference = Reference(
        class_names=tuple(parse_class(name) for name in names),
        few_shot=whole.rows(drawn.train),
        val=whole.rows(drawn.val),
        seed=arguments.seed,
        passes=passes,
    )
    return Images(reference, whole.rows(drawn.rest)), passes


def measured(pipeline: Pipeline, part: Part, images: Images, passes: Passes) -> float:
    """Top-1 accuracy."""
    assert part.labels is not None
    vectors = passes.read(part.records, pipeline.edits).vectors
    classifier = pipeline.classifier(images.reference.class_names, passes.source, "photo")
    return images.reference.metric(classifier.logits(vectors), part.labels)


def row_of(spec: str, images: Images, passes: Passes) -> Row:
    pipeline, seconds = PLAIN, 0.0
    if spec:
        began = time.perf_counter()
        pipeline = Pipeline([make_addon(spec)]).fit(images.reference, passes.source, "photo")
        seconds = time.perf_counter() - began
    val = images.reference.val
    assert val is not None
    fitted: list[Any] = list(pipeline.addons)
    return Row(
        spec or "zero-shot",
        measured(pipeline, val, images, passes),
        measured(pipeline, images.test, images, passes),
        sum(tensor.numel() for addon in fitted for tensor in addon.state().tensors.values()),
        sum(addon.steps for addon in fitted),
        seconds,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--exclude", action="append", default=[])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--addon", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    images, passes = read(arguments)
    for spec in ("", *(arguments.addon or METHODS)):
        limited = f"{spec},max_seconds={arguments.seconds:g}" if spec else ""
        row = row_of(limited, images, passes)
        if arguments.json:
            print(json.dumps(row._asdict()), flush=True)
            continue
        print(
            f"{row.method.partition(':')[0]:14} test {row.test:6.1%}  val {row.val:6.1%}  {row.trained:7} numbers  "
            f"{row.steps:4} steps  {row.seconds:5.1f} s   {row.method.partition(':')[2]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
