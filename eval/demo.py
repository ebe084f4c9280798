"""The whole story on generated data, as one function: shards, training, classification, retrieval, a report.

    result = run_demo(Path("runs/demo"))
    result.seen.metrics["accuracy@1"], result.report

Every number is computed in the run that prints it. A demo that was interrupted continues where it stopped.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data_tools.build import build_shards
from data_tools.scene_grammar import HELD_OUT, SEEN, ColorShape
from data_tools.scenes import scene_source, write_class_folder
from eval.class_names import name_classes
from eval.classification import ClassificationEvaluator
from eval.report import Picture, Section, Table, write_report
from eval.report_sections import evaluation_sections
from eval.retrieval import RetrievalEvaluator
from vlkit.config import load_run
from vlkit.contracts import Evaluation, Progress
from vlkit.data.sources import read_source
from vlkit.models.load import load_embedder
from vlkit.models.tokenizers import get_tokenizer
from vlkit.training.loop import Every
from vlkit.training.pretrain import pretrain

TEMPLATES = ("a picture of a {}", "a photo of a {}.", "a {}")
NUM_SCENES = 12_000
GALLERY_SIZE = 1_000
PER_CLASS = 10  # pictures of each class to be classified
TOKENIZER = "open_clip:clip_bpe"

# Opens a progress bar: (what happens, unit) -> context manager that gives a Progress.
Bars = Callable[[str, str], AbstractContextManager[Progress | None]]


class Timing(NamedTuple):
    """How long one stage took."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where its report lies."""

    out: Path
    report: Path
    seen: Evaluation  # single shapes of the 48 kinds that occur in training
    held_out: Evaluation  # single shapes of the 16 kinds that do not, told from all 64
    retrieval: Evaluation  # scenes and captions, all pairwise distinct
    timings: tuple[Timing, ...]


def run_demo(
    out: Path,
    *,
    num_scenes: int = NUM_SCENES,
    overrides: Sequence[str] = (),
    workers: int = 1,
    every: Sequence[Every] = (),
    bars: Bars = lambda label, unit: nullcontext(None),
    say: Callable[[str], None] = lambda message: None,
) -> DemoResult:
    """Generate, build, train, classify, retrieve, report.

    Args:
        out: the run folder; everything goes there.
        num_scenes: scenes to train on.
        overrides: of the shipped run `demo`, as for `load_run`.
        workers: processes that build shards.
        every: further entries for the training loop, e.g. a progress line.
        bars: opens a progress bar for a stage.
        say: takes what a user should know.

    Raises:
        VlkitError: the folder holds another run, or cannot be written.
    """
    timings: list[Timing] = []
    run = load_run("demo", [f"run.out={out}", *overrides])
    with _timed("generate scenes and build shards", timings):
        with bars("scenes", "scenes") as tick:
            source = scene_source(num_scenes, seed=run.run.seed, progress=tick)
        with bars("shards", "samples") as tick:
            tokenizers = {TOKENIZER: get_tokenizer(TOKENIZER).encode_ragged}
            build_shards(source, out / "shards", tokenizers=tokenizers, workers=workers, progress=tick)
        for name, kinds, seed in (("seen", SEEN, 1), ("held_out", HELD_OUT, 2)):
            write_class_folder(out / "photos" / name, kinds, PER_CLASS, seed)
    with _timed("train", timings), bars("train", "steps") as tick:
        # Only a folder that holds a run is continued: the first demo need not hear that there is nothing to continue.
        begun = (out / "config.json").exists() or (out / "checkpoints").exists()
        pretrain(run, every=every, resume=begun, progress=tick, say=say)
    with _timed("evaluate", timings):
        embedder = load_embedder(f"run:{out}", device="cpu")
        seen = _classify(out / "photos" / "seen").run(embedder)
        held_out = _classify(out / "photos" / "held_out", others=SEEN).run(embedder)
        gallery = scene_source(GALLERY_SIZE, seed=run.run.seed + 10_000, distinct=True)
        retrieval = RetrievalEvaluator(gallery.records, num_examples=16).run(embedder)
    result = DemoResult(out, out / "report.html", seen, held_out, retrieval, tuple(timings))
    subtitle = f"{num_scenes:,} generated scenes, seed {run.run.seed}; everything here was computed in one run."
    write_report(result.report, "vlkit demo", _sections(result), subtitle=subtitle)
    return result


def _classify(folder: Path, others: Sequence[ColorShape] = ()) -> ClassificationEvaluator:
    """The folder's pictures, told from each other's classes and from those of `others`."""
    source = read_source(folder, format="folder")
    classes = name_classes(source.class_names, source.records)
    names = (*classes.names, *(kind.name for kind in others))
    return ClassificationEvaluator(classes.records, names, templates=TEMPLATES, num_examples=12)


@contextmanager
def _timed(stage: str, timings: list[Timing]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    timings.append(Timing(stage, time.perf_counter() - began))


def _sections(result: DemoResult) -> list[Section]:
    sections: list[Section] = [Table("What was measured", ["metric", "value", "95% interval"], demo_rows(result))]
    times = [(timing.stage, f"{timing.seconds:.0f} s") for timing in result.timings]
    sections.append(Table("Time", ["stage", "took"], times))
    curve = result.out / "loss.png"
    if curve.is_file():
        sections.append(Picture("Training", curve.read_bytes()))
    for title, evaluation in (
        ("Seen kinds", result.seen),
        ("Held-out kinds", result.held_out),
        ("Retrieval", result.retrieval),
    ):
        for section in evaluation_sections(evaluation):
            sections.append(replace(section, title=f"{title}: {section.title}"))
    return sections


def demo_rows(result: DemoResult) -> list[tuple[str, str, str]]:
    """What the demo is about, each number with its 95% interval."""
    chosen = (
        (f"zero-shot accuracy, {len(SEEN)} seen kinds", result.seen, "accuracy@1"),
        (
            f"zero-shot accuracy, {len(HELD_OUT)} held-out kinds told from all {len(HELD_OUT) + len(SEEN)}",
            result.held_out,
            "accuracy@1",
        ),
        (f"image to text R@1, {GALLERY_SIZE:,} scenes", result.retrieval, "image_to_text/recall@1"),
        (f"text to image R@1, {GALLERY_SIZE:,} scenes", result.retrieval, "text_to_image/recall@1"),
    )
    return [
        (name, f"{evaluation.metrics[key]:.1%}", " to ".join(f"{bound:.1%}" for bound in evaluation.intervals[key]))
        for name, evaluation, key in chosen
    ]
