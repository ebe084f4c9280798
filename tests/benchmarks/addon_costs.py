"""What each add-on costs beside plain zero-shot on one small encoder: fitting, use and memory.

    python tests/benchmarks/addon_costs.py --data $VLKIT_DATA --methods tip_adapter,tta [--json]
    python tests/benchmarks/addon_costs.py --data $VLKIT_DATA --out tests/benchmarks/addon_costs.md     # all of them
    python tests/benchmarks/addon_costs.py --data $VLKIT_DATA --out ... --known lines.jsonl    # goes on after a stop

Classification: 20 classes of Caltech-101, 8 images of each to learn from, 4 to validate on, 90 others to use it on.
Retrieval (`r:` before a name): 500 training images of Flickr8k with captions, 100 test images with theirs. Merges: the
composed queries made from the masks of `coco_small`. Explanations (`x:`): heat maps of the 90 images for one text.

Times are CPU time of the process, so that other work on the machine hardly counts, with one thread.
Fit: seconds from plain features at hand to the fitted add-on, with whatever further passes over images it makes.
Methods that train through a tower are given one epoch (see the settings): multiply by their epochs. Classes: seconds of
making the class weights, once for a list of classes. Use: milliseconds an image, decoding, towers and scores; the
median of three, plain and with the add-on in turn; `scores` is the part behind the towers.
Memory: each method is measured in a process of its own, forked when the model is loaded; its anonymous resident memory
is read every millisecond from outside, and what counts is the highest value above that before the phase; `plain` is
that of the use without the add-on. Where there is no /proc, it is left out.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forked import Watch, anonymous_bytes, apart

from eval.addons import Bench, classification_bench, retrieval_bench
from eval.class_names import name_classes
from eval.coco_instances import read_instances
from eval.composed_retrieval import ComposedRetrievalEvaluator, ComposedSet
from eval.composed_sets import add_objects
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Stream
from vlkit.addons.registry import addon_rows, make_addon
from vlkit.data.records import Record
from vlkit.data.sources import read_source
from vlkit.features.source import FeatureSource, open_source
from vlkit.interpret.decomposition import decompose
from vlkit.interpret.explain import EXPLAINERS, explain
from vlkit.interpret.text_span import text_span

ENCODER = Path(__file__).parents[1] / "data" / "encoder"
MIB = 1 << 20
NUM_CLASSES, SHOTS, NUM_TRAIN, NUM_TEST, REPEATS = 20, 8, 500, 100, 3

RETRIEVAL = (
    "mean", "top_k_mean", "log_sum_exp", "qb_norm", "dual_is", "distribution_norm", "inv_gc", "tta", "pacl",
)  # fmt: skip


class Cost(NamedTuple):
    """One line."""

    method: str
    slot: str
    settings: str
    fit_s: float
    classes_s: float
    use_ms: float  # an image or query
    ratio: float  # to plain, in turn
    scores_ms: float
    fit_mib: float | None
    use_mib: float | None
    plain_mib: float | None


class Use(NamedTuple):
    """Seconds of one go."""

    towers: float
    scores: float


@dataclass(frozen=True)
class Setting:
    """What is measured on."""

    source: FeatureSource
    labelled: Bench
    captioned: Bench
    composed: ComposedSet
    files: Path


# What happens with a method: fit it, prepare it, and use it.
Case = tuple[Callable[[], Any], Callable[[Any], Callable[[], Use]], int]


def read(model: str, data: Path, files: Path) -> Setting:
    source = open_source(model, "cpu")
    passes = Passes(source, workers=1)
    found = read_source(str(data / "caltech101"))
    chosen = [name for name in found.class_names if name != "Faces_easy"][:NUM_CLASSES]
    classes = name_classes(found.class_names, found.records, exclude=sorted(set(found.class_names) - set(chosen)))
    labelled, _ = classification_bench(passes, _with_reasons(classes.records), classes.names, shots=SHOTS)
    pairs = [record for record in read_source(str(data / "flickr8k")).records if record.captions]
    some = [r for r in pairs if r.split == "train"][:NUM_TRAIN] + [r for r in pairs if r.split == "test"][:NUM_TEST]
    _write_files(files, classes.names)
    return Setting(
        source,
        replace(labelled, test=labelled.test[::4]),
        retrieval_bench(passes, some),
        add_objects(read_instances(data / "coco_small")),
        files,
    )


def _with_reasons(records: Sequence[Record]) -> list[Record]:
    """Images with a reason each, which why_prompt takes for a caption."""
    reasons = ("a round shape", "a long body", "bright colours", "many small parts")
    return [replace(record, captions=(reasons[(record.label or 0) % len(reasons)],)) for record in records]


def _write_files(folder: Path, names: Sequence[str]) -> None:
    looks = ("two parts", "a smooth surface", "a dark colour", "a round outline", "fine lines")
    (folder / "descriptions.json").write_text(json.dumps({name: list(looks) for name in names}))
    kinds = {name: [f"{size} {name}" for size in ("small", "large", "old")] for name in names}
    (folder / "kinds.json").write_text(json.dumps(kinds))
    (folder / "known.txt").write_text("\n".join(["dog", "person", "plane", "boat", "flower", "chair", "clock", "bird"]))


def addon_text(name: str, setting: Setting) -> str:
    """The method with the settings it is measured with."""
    files = {
        "descriptions": f"file={setting.files / 'descriptions.json'}",
        "chils": f"file={setting.files / 'kinds.json'}",
        "semap": f"names={setting.files / 'known.txt'}",
        "deal": f"epochs=1,file={setting.files / 'descriptions.json'}",
        "wise_ft": f"tuned={setting.source.card.name}",
        "upl": "epochs=1,missing=accept",
        "head_ablation": "heads=-1.0",
        "ideal_words": "spurious=on grass|in the sky|indoors",
        "red_circle": "top=0.25,left=0.25,height=0.5,width=0.5",
    }
    if name in files:
        return f"{name}:{files[name]}"
    trains = {"grad_text", "grad_image"} & make_addon(name).needs
    return f"{name}:epochs=1" if trains and name != "tpt" else name


def cases(names: Sequence[str], setting: Setting) -> Iterator[tuple[str, str, str, Case]]:
    """Name, slot, settings, and how it is measured."""
    slots = {name: row.slot for name, row in addon_rows().items()}
    for name in names:
        kind, _, bare = name.rpartition(":")
        if kind == "x":
            yield name, "interpret", "", explaining(bare, setting)
        elif slots[bare] == "merges":
            yield name, "merges", "", composing(bare, setting)
        else:
            text = addon_text(bare, setting)
            bench = setting.captioned if kind == "r" else setting.labelled
            shown = ",".join(part for part in text.partition(":")[2].split(",") if "/" not in part)
            yield name, slots[bare], shown, piping(text, bench, setting)


def piping(text: str, bench: Bench, setting: Setting) -> Case:
    """A pipeline of one add-on, or of none."""
    source = setting.source

    def fit() -> Pipeline:
        if not text:
            return PLAIN
        pipeline = Pipeline([make_addon(text)])
        plain = bench.reference.passes
        assert plain is not None
        stream = Stream(plain.read(bench.test).vectors, bench.test)
        passes = Passes(source, local=True, workers=1) if pipeline.local else plain
        return pipeline.fit(replace(bench.reference, stream=stream, passes=passes), source)

    def prepare(pipeline: Pipeline) -> Callable[[], Use]:
        if bench.task == "retrieval":
            return lambda: _retrieve(pipeline, bench, source)
        classifier = pipeline.classifier(bench.reference.class_names, source)

        def use() -> Use:
            began = time.process_time()
            vectors = Passes(source, local=pipeline.local, workers=1).read(bench.test, pipeline.edits, pipeline.views)
            ready = time.process_time()
            classifier.logits(vectors.vectors)
            return Use(ready - began, time.process_time() - ready)

        return use

    return fit, prepare, len(bench.test)


def _retrieve(pipeline: Pipeline, bench: Bench, source: FeatureSource) -> Use:
    from vlkit.addons.exchange import Vectors

    began = time.process_time()
    images = Passes(source, local=pipeline.local, workers=1).read(bench.test, pipeline.edits, pipeline.views).vectors
    texts = Vectors("text", source.embed_texts([caption for record in bench.test for caption in record.captions]))
    ready = time.process_time()
    scored = pipeline.retrieval(images, texts, source)
    for _ in (*scored.scores("text_to_image"), *scored.scores("image_to_text")):
        pass
    return Use(ready - began, time.process_time() - ready)


def composing(name: str, setting: Setting) -> Case:
    """A merge of composed queries."""
    evaluator = ComposedRetrievalEvaluator(setting.composed, ks=(1, 5), workers=1)

    def fit() -> Pipeline:
        return Pipeline([make_addon(name)]).fit(setting.captioned.reference, setting.source) if name else PLAIN

    def prepare(pipeline: Pipeline) -> Callable[[], Use]:
        def use() -> Use:
            began = time.process_time()
            evaluator.run(setting.source, pipeline)
            return Use(time.process_time() - began, 0.0)

        return use

    return fit, prepare, len(setting.composed.queries)


def explaining(name: str, setting: Setting) -> Case:
    """Heat maps, or a text span, of the test images."""
    from vlkit.data.images import read_image

    encoder = setting.source.embedder.encoder
    records = setting.labelled.test

    def maps() -> None:
        images = torch.stack([encoder.preprocess(read_image(record)) for record in records])
        if name == "text_span":
            heads = decompose(encoder, images).with_shared_biases().heads
            pool = setting.source.embed_texts([item.shown for item in setting.labelled.reference.class_names])
            for head in range(heads.shape[2]):
                text_span(heads[:, -1, head], pool)
        else:
            explain(encoder, images, setting.source.embed_texts(["a photo of a face"]), name)

    def prepare(_: None) -> Callable[[], Use]:
        def use() -> Use:
            began = time.process_time()
            maps()
            return Use(time.process_time() - began, 0.0)

        return use

    return lambda: None, prepare, len(records)


def measured(name: str, slot: str, shown: str, case: Case, plain: Case) -> Cost | str:
    """One line, or why there is none."""
    fit, prepare, count = case

    def work(watch: Watch) -> dict[str, float]:
        beside = plain[1](plain[0]())
        beside()  # what is loaded on first use is nobody's cost
        with watch.phase("plain"):
            beside()
        with watch.phase("fit"):
            began = time.process_time()
            fitted = fit()
            fit_s = time.process_time() - began
        with watch.phase("use"):
            began = time.process_time()
            use = prepare(fitted)
            classes_s = time.process_time() - began
            use()
        pairs = [(beside(), use()) for _ in range(REPEATS)]
        return {
            "fit_s": fit_s,
            "classes_s": classes_s,
            "use": statistics.median(sum(own) for _, own in pairs),
            "scores": statistics.median(own.scores for _, own in pairs),
            "plain": statistics.median(sum(other) for other, _ in pairs),
        }

    found, memory = apart(work)
    if "error" in found:
        return str(found["error"])
    ratio = found["use"] / count / (found["plain"] / plain[2])
    sizes = {key: value / MIB for key, value in memory.items()} if anonymous_bytes(os.getpid()) else {}
    return Cost(
        name, slot, shown, found["fit_s"], found["classes_s"], 1000 * found["use"] / count, ratio,
        1000 * found["scores"] / count, sizes.get("fit"), sizes.get("use"), sizes.get("plain"),
    )  # fmt: skip


def plain_case(name: str, slot: str, setting: Setting) -> Case:
    """What a method is compared with."""
    if slot == "merges":
        return composing("", setting)
    return piping("", setting.captioned if name.startswith("r:") else setting.labelled, setting)


def all_names() -> list[str]:
    explanations = [f"x:{name}" for name in (*EXPLAINERS, "text_span")]
    alone = [name for name in addon_rows() if name not in ("dual_is", "pacl")]  # which want captions
    return [*alone, *(f"r:{name}" for name in RETRIEVAL), *explanations]


def shown(cost: Cost) -> str:
    memory = [" " * 8 if size is None else f"{size:8.1f}" for size in (cost.fit_mib, cost.use_mib, cost.plain_mib)]
    return (
        f"{cost.method:<22} {cost.slot:<14} {cost.fit_s:8.2f} {cost.classes_s:8.2f} {cost.use_ms:9.2f} "
        f"{cost.ratio:7.2f} {cost.scores_ms:8.2f} {' '.join(memory)}  {cost.settings}"
    )


HEAD = (
    f"{'method':<22} {'slot':<14} {'fit, s':>8} {'classes':>8} {'use, ms':>9} {'x plain':>7} {'scores':>8} "
    f"{'fit MiB':>8} {'use MiB':>8} {'plain':>8}  settings"
)


TITLES = "method | slot | fit s | classes s | use ms | x plain | scores ms | fit MiB | use MiB | plain MiB | settings"
ESCAPED = "\\|"
MADE_WITH = "Made with `python tests/benchmarks/addon_costs.py --data $VLKIT_DATA --out FILE.md`, model {}."


def read_known(path: Path) -> dict[str, Cost]:
    """The lines of an earlier run with --json."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["method"]: Cost(**row) for row in rows if "left_out" not in row}


def write_table(path: Path, model: str, costs: Sequence[Cost], failed: Sequence[str], later: Sequence[str]) -> None:
    """The lines as Markdown, below what this script says of them, and which were measured in a run of their own."""
    encoder = "`local-dir:tests/data/encoder`" if model.endswith(f":{ENCODER}") else f"`{model}`"
    about = (__doc__ or "").split("\n\n")
    lines = [f"# {about[0]}", "", MADE_WITH.format(encoder), "", *"\n\n".join(about[2:]).strip().split("\n"), ""]
    lines += [f"| {TITLES} |", "|---|---|" + "---:|" * 8 + "---|"]
    for cost in costs:
        memory = ["" if size is None else f"{size:.0f}" for size in (cost.fit_mib, cost.use_mib, cost.plain_mib)]
        times = (f"{cost.fit_s:.2f}", f"{cost.classes_s:.2f}", f"{cost.use_ms:.2f}", f"{cost.ratio:.2f}")
        cells = (f"`{cost.method}`", cost.slot, *times, f"{cost.scores_ms:.2f}", *memory, cost.settings)
        lines.append(f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |")
    lines += ["", *(f"Left out: {reason}" for reason in failed)]
    if later:
        lines.append(f"Measured in a later run than the others: {', '.join(later)}.")
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("VLKIT_DATA"), help="holds caltech101, flickr8k and coco_small"
    )
    parser.add_argument("--model", default=f"local-dir:{ENCODER}")
    parser.add_argument("--methods", help="some of them, with commas")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--known", type=Path, help="file of --json lines; what has one is not measured again")
    parser.add_argument("--out", type=Path, help="Markdown file to write the table into, when all are measured")
    arguments = parser.parse_args()
    if arguments.data is None:
        print("left out: name --data, or set VLKIT_DATA to the folder of the data sets")
        return
    torch.set_num_threads(1)  # no thread outlives the fork
    names = arguments.methods.split(",") if arguments.methods else all_names()
    if unknown := sorted(set(names) - set(all_names())):
        parser.error(f"nothing to measure: {', '.join(unknown)}; there are {', '.join(all_names())}")
    if arguments.out and not arguments.out.parent.is_dir():
        parser.error(f"there is no folder {arguments.out.parent}")
    known = read_known(arguments.known) if arguments.known else {}
    left = [name for name in names if name not in known]
    failed = []
    with tempfile.TemporaryDirectory() as files:
        setting = read(arguments.model, arguments.data, Path(files))
        if not arguments.json:
            print(HEAD)
        for name, slot, words, case in cases(left, setting):
            line = measured(name, slot, words, case, plain_case(name, slot, setting))
            if isinstance(line, str):
                failed.append(f"{name}: {line}")
                print(json.dumps({"method": name, "left_out": line}) if arguments.json else f"{name:<22} {line}")
            else:
                known[name] = line
                print(json.dumps(line._asdict()) if arguments.json else shown(line), flush=True)
    if arguments.out:
        costs = [known[name] for name in names if name in known]
        write_table(arguments.out, arguments.model, costs, failed, left if arguments.known else ())


if __name__ == "__main__":
    main()
