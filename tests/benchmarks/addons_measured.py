"""What each add-on changes on real data with the small encoder: plain, with it, and the paired difference.

    python tests/benchmarks/addons_measured.py few_shot --data $VLKIT_DATA > few_shot.jsonl      # or another part
    python tests/benchmarks/addons_measured.py collect *.jsonl      # writes addons_measured.json; then `make readme`

Parts, each with the data that it takes from $VLKIT_DATA:
    few_shot     Caltech-101 without Faces_easy, 4 and 16 shots. Seeds 1, 2 and 3 draw the images to learn from, 4 a
                 class to validate on, and test on the rest; differences are over the images of all seeds.
    unlabelled   the same test images of 16 shots, methods that learn no labels. Settings that a method does not choose
                 itself are chosen on the validation images, from GRIDS.
    dense        coco_small, every second photograph: mIoU of 80 names, pixels without an object left out. All
                 photographs: the pointing game.
    composed     coco_small: an image and the name of another thing (`eval.composed_sets.add_objects`), mean average
                 precision; plain is the better of image and words alone. And boxes named by expressions.
    pacl         Flickr8k and coco_small with the head of a run (`--head RUN` of `vlkit train flickr8k_pacl`).
    collect      also takes the --json lines of class_texts.py, gallery_corrections.py and whatever has a line's fields.

Nothing is chosen on test images. Intervals: 95%, percentile bootstrap of the difference, over images (with all their
captions), queries or photographs. A method without a difference worth the name stands in the table like the others.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.addons import Bench, classification_bench, retrieval_bench
from eval.class_names import name_classes
from eval.classification import ClassificationEvaluator
from eval.coco_instances import Scenes, read_instances
from eval.composed_retrieval import ComposedRetrievalEvaluator
from eval.composed_sets import add_objects
from eval.general_encoder import CALTECH_NAMES
from eval.grounding import ReferringEvaluator
from eval.metrics import paired_difference
from eval.pointing import PointingEvaluator
from eval.referring_sets import unique_objects
from eval.retrieval import RetrievalEvaluator
from eval.segmentation import SegmentationEvaluator, mean_iou_difference
from vlkit.addons.adapt import captioned_reference
from vlkit.addons.base import AddOn
from vlkit.addons.inputs.red_circle import View
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.registry import addon_rows, find_method, make_addon
from vlkit.contracts import Evaluation
from vlkit.data.sources import read_source
from vlkit.features.cache import FeatureCache
from vlkit.features.source import FeatureSource, open_source

ENCODER = Path(__file__).parents[1] / "data" / "encoder"
TABLE = Path(__file__).with_suffix(".json")
SEEDS, SHOTS = (1, 2, 3), (4, 16)
CALTECH = "Caltech-101"
FEW_SHOT = (
    "tip_adapter", "tip_adapter_f", "tip_x", "ape", "ape_t", "knn", "clip_adapter", "task_residual", "lp_plus_plus",
    "clap",
)  # fmt: skip
UNLABELLED = (
    "mean", "top_k_mean", "log_sum_exp", "qb_norm", "distribution_norm", "inv_gc", "tta", "calip", "tda",
    "tfup", "tfup_t", "templates", "mean_of_similarities", "waffle",
)  # fmt: skip
# Tried on validation images, in this order; the first of the best is taken.
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "mean": {"lam": (0.25, 0.5, 1.0)},
    "top_k_mean": {"alpha": (0.25, 0.5, 0.75), "k": (16, 128)},
    "log_sum_exp": {"beta": (5.0, 20.0, 80.0)},
    "qb_norm": {"beta": (5.0, 20.0, 80.0), "k": (1, 10)},
    "distribution_norm": {"lam": (0.25, 0.5)},
    "inv_gc": {"rate_gallery": (0.0, 0.25, 0.5), "rate_queries": (0.25, 0.5, 1.0)},
}
SWITCHES = ("maskclip", "sclip", "clearclip", "naclip", "clip_surgery")
EXPLANATIONS = ("decomposition", "legrad", "relevance")
MERGES = ("arithmetic", "weicom", "freedom")
VIEWS: tuple[tuple[View, ...], ...] = (("circle",), ("grey",), ("blur",), ("circle", "grey", "blur"))


class Line(NamedTuple):
    """One method on one data set."""

    method: str
    slot: str
    data: str
    shots: str  # "" where nothing labelled is learned from
    metric: str
    plain: float
    value: float
    change: float
    low: float
    high: float
    settings: str = ""
    note: str = ""


Hits = tuple[list[float], list[str]]


def few_shot(source: FeatureSource, data: Path, options: argparse.Namespace) -> Iterator[Line]:
    chosen = options.methods or FEW_SHOT
    passes = Passes(source, workers=1)
    for shots in options.shots:
        benches = [caltech(passes, data, shots, seed) for seed in SEEDS]
        plain = pooled([classified(bench, PLAIN, passes) for bench in benches])
        for name in chosen:
            adapted = [classified(bench, fitted(find_method(name)(), bench, source), passes) for bench in benches]
            yield compared(name, CALTECH, str(shots), plain, pooled(adapted), settings="")


def unlabelled(source: FeatureSource, data: Path, options: argparse.Namespace) -> Iterator[Line]:
    chosen = options.methods or UNLABELLED
    for local in (False, True):
        names = [name for name in chosen if local == bool(find_method(name).needs & {"patches", "patch_tokens"})]
        if not names:
            continue
        passes = Passes(source, local=local, workers=1)
        benches = [caltech(passes, data, 16, seed) for seed in SEEDS]
        plain = pooled([classified(bench, PLAIN, passes) for bench in benches])
        for name in names:
            picked = [best_on_val(name, bench, source) for bench in benches]
            adapted = [
                classified(bench, fitted(one, bench, source), passes)
                for bench, one in zip(benches, picked, strict=True)
            ]
            note = "sees the test images" if picked[0].transductive else ""
            settings = " / ".join(dict.fromkeys(shown(one) or "defaults" for one in picked)) if name in GRIDS else ""
            yield compared(name, CALTECH, "", plain, pooled(adapted), settings=settings, note=note)


def caltech(passes: Passes, data: Path, shots: int, seed: int) -> Bench:
    found = read_source(str(data / "caltech101"))
    classes = name_classes(found.class_names, found.records, exclude=["Faces_easy"])
    names = [CALTECH_NAMES.get(name, name) for name in classes.names]
    return classification_bench(passes, classes.records, names, shots=shots, seed=seed)[0]


def fitted(addon: AddOn, bench: Bench, source: FeatureSource) -> Pipeline:
    """Transductive ones are fitted by the evaluator, which has the test images."""
    pipeline = Pipeline([addon])
    return pipeline if addon.transductive else pipeline.fit(bench.reference, source, bench.templates)


def best_on_val(name: str, bench: Bench, source: FeatureSource) -> AddOn:
    method: Any = find_method(name)
    if name not in GRIDS:
        return make_addon(name)
    reference, val = bench.reference, bench.reference.val
    assert val is not None and val.labels is not None
    best = -1.0
    found: AddOn | None = None
    for values in product(*GRIDS[name].values()):
        addon: AddOn = method(**dict(zip(GRIDS[name], values, strict=True)))
        classifier = fitted(addon, bench, source).classifier(reference.class_names, source, bench.templates)
        value = reference.metric(classifier.logits(val.vectors), val.labels)
        if value > best:
            best, found = value, addon
    assert found is not None
    return found


def classified(bench: Bench, pipeline: Pipeline, passes: Passes) -> Hits:
    evaluator = ClassificationEvaluator(
        bench.test, bench.class_names, bench.templates, reference=bench.reference, passes=passes
    )
    table = evaluator.run(passes.source, pipeline).per_item
    assert table is not None
    return table.column("hit@1").to_pylist(), table.column("key").to_pylist()


def pooled(parts: Sequence[Hits]) -> Hits:
    return [hit for hits, _ in parts for hit in hits], [key for _, keys in parts for key in keys]


def compared(
    name: str,
    data: str,
    shots: str,
    plain: Hits,
    adapted: Hits,
    metric: str = "accuracy",
    settings: str = "",
    note: str = "",
) -> Line:
    """A line of per-item values, resampled by key."""
    assert plain[1] == adapted[1]
    places = {key: place for place, key in enumerate(dict.fromkeys(plain[1]))}
    units = torch.tensor([places[key] for key in plain[1]])
    first, second = (torch.tensor(hits, dtype=torch.float64) for hits, _ in (plain, adapted))
    change = paired_difference(first, second, units=units, num_permutations=1)
    means = first.mean().item(), second.mean().item()
    return Line(name, slot_of(name), data, shots, metric, *means, *change[:3], settings, note)


def slot_of(name: str) -> str:
    rows = addon_rows()
    return rows[name].slot if name in rows else "interpret"


def shown(addon: AddOn) -> str:
    """The settings that are not the method's own."""
    own = type(addon)().settings()
    return " ".join(f"{key} {value}" for key, value in addon.settings().items() if value != own[key])


def dense(source: FeatureSource, data: Path, options: argparse.Namespace) -> Iterator[Line]:
    scenes = read_instances(data / "coco_small")
    evaluator = SegmentationEvaluator(some_of(scenes))
    plain = evaluator.run(source)
    for name in options.methods or SWITCHES:
        pipeline = Pipeline([make_addon(name)]).fit(Reference(), source)
        yield segmented(name, plain, evaluator.run(source, pipeline))
    beside = column(PointingEvaluator(scenes, method="patches").run(source), "hit")
    for name in EXPLANATIONS:
        hits = column(PointingEvaluator(scenes, method=name).run(source), "hit")
        note = "plain: the hottest patch by its cosine"
        yield compared(name, "coco_small", "", beside, hits, "pointing game", note=note)


def some_of(scenes: Scenes) -> Scenes:
    """Every second photograph: at full resolution a class costs as much as a photograph."""
    return replace(scenes, images=scenes.images[::2])


def segmented(name: str, plain: Evaluation, found: Evaluation, note: str = "") -> Line:
    change = mean_iou_difference(plain, found)
    before, after = plain.metrics["mean_iou"], found.metrics["mean_iou"]
    return Line(name, slot_of(name), "coco_small", "", "mIoU", before, after, *change, "", note)


def column(evaluation: Evaluation, name: str) -> Hits:
    table = evaluation.per_item
    assert table is not None
    return table.column(name).to_pylist(), table.column("key").to_pylist()


def composed(source: FeatureSource, data: Path, options: argparse.Namespace) -> Iterator[Line]:
    scenes = read_instances(data / "coco_small")
    reference = captions_of(source, data)
    evaluator = ComposedRetrievalEvaluator(add_objects(scenes), ks=(1, 5))
    metric = "mean_average_precision"
    for name in MERGES:
        found = evaluator.run(source, Pipeline([make_addon(name)]).fit(reference, source))
        alone = max(("image_only/", "text_only/"), key=lambda side: found.metrics[f"{side}{metric}"])
        plain, merged = column(found, f"{alone}{metric}"), column(found, metric)
        note = f"plain: {alone.partition('_')[0].replace('text', 'words')} alone"
        yield compared(name, "coco_small", "", plain, merged, "mAP", note=note)
    expressions = unique_objects(scenes)
    crops = column(ReferringEvaluator(expressions).run(source), "hit")
    for views in VIEWS:
        hits = column(ReferringEvaluator(expressions, views=views, num_others=500).run(source), "hit")
        words = f"views {' '.join(views)}"
        yield compared("red_circle", "coco_small", "", crops, hits, "box accuracy", settings=words, note=CROPS)


CROPS = "plain: the boxes cut out; sees the test texts"
HEAD = "its head trained on Flickr8k's training images"


def captions_of(source: FeatureSource, data: Path) -> Reference:
    records = [one for one in read_source(str(data / "flickr8k"), split="train").records if one.captions]
    return captioned_reference(Passes(source, workers=1), records)[0]


def pacl(source: FeatureSource, data: Path, options: argparse.Namespace) -> Iterator[Line]:
    addon = make_addon(f"pacl:head={options.head}")
    scenes = read_instances(data / "coco_small")
    evaluator = SegmentationEvaluator(some_of(scenes))
    plain, found = evaluator.run(source), evaluator.run(source, Pipeline([addon]).fit(Reference(), source))
    yield segmented("pacl", plain, found, HEAD)
    records = [record for record in read_source(str(data / "flickr8k")).records if record.captions]
    passes = Passes(source, local=True, workers=1)
    bench = retrieval_bench(passes, [r for r in records if r.split == "test" or r.key == records[0].key], on="test")
    retrieval = RetrievalEvaluator(bench.test, passes=passes)
    both = [retrieval.run(source, one) for one in (PLAIN, Pipeline([addon]).fit(Reference(task="retrieval"), source))]
    for direction in ("text_to_image", "image_to_text"):
        before, after = (recalled(one, direction) for one in both)
        yield compared("pacl", "Flickr8k", "", before, after, f"{direction.replace('_', ' ')} R@10", note=HEAD)


def recalled(evaluation: Evaluation, direction: str) -> Hits:
    table = evaluation.per_item
    assert table is not None
    table = table.filter([one == direction for one in table.column("direction").to_pylist()])
    return table.column("hit@10").to_pylist(), table.column("key").to_pylist()


def collect(files: Sequence[str]) -> None:
    """Lines of all files into the table, in place of those it has of the same method, data, shots and metric."""
    texts = [row for file in files for row in Path(file).read_text(encoding="utf-8").splitlines() if row.strip()]
    given = [line for text in texts for line in as_lines(json.loads(text))]
    known = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else []
    replaced = {place_of(row) for row in given}
    kept = [row for row in known if place_of(row) not in replaced] + given
    order = {name: place for place, name in enumerate([*addon_rows(), *EXPLANATIONS, "text_span"])}
    found = sorted(kept, key=lambda row: (order.get(row["method"], 999), row["data"], row["metric"]))
    text = ",\n".join(json.dumps(rounded(row)) for row in found)
    TABLE.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def place_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a later measurement replaces."""
    return tuple(str(row[key]) for key in ("method", "data", "shots", "metric"))


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def as_lines(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines of this script as they are, and those of two others."""
    if "metric" in row:
        yield dict(row)
    elif "direction" in row:  # gallery_corrections
        if row["method"] in addon_rows():
            change, low, high = row["difference"]["recall@10"]
            value = row["recall"]["recall@10"]
            settings = " ".join(f"{key} {one}" for key, one in row["settings"].items())
            metric = f"{row['direction'].replace('_', ' ')} R@10"
            yield Line(
                row["method"], slot_of(row["method"]), "Flickr8k", "", metric, value - change, value, change, low, high,
                settings,
            )._asdict()  # fmt: skip
    elif row["method"] != "plain":  # class_texts
        yield Line(
            row["method"], slot_of(row["method"]), "CIFAR-10", "", "accuracy", row["accuracy"] - row["change"],
            row["accuracy"], row["change"], row["low"], row["high"], row["settings"],
        )._asdict()  # fmt: skip


PARTS: dict[str, Callable[[FeatureSource, Path, argparse.Namespace], Iterator[Line]]] = {
    "few_shot": few_shot, "unlabelled": unlabelled, "dense": dense, "composed": composed, "pacl": pacl,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "collect"])
    parser.add_argument("files", nargs="*", help="of collect")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--model", default=f"local-dir:{ENCODER}")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="some of a part's, with commas")
    parser.add_argument("--head", help="run with a PACL head")
    parser.add_argument(
        "--shots", type=lambda text: [int(one) for one in text.split(",")], default=SHOTS, help="e.g. 4"
    )
    arguments = parser.parse_args()
    if arguments.part == "collect":
        collect(arguments.files)
        return
    if arguments.data is None or arguments.part is None:
        print("left out: name a part, and --data, the folder of the data sets")
        return
    source = open_source(arguments.model, "cpu", FeatureCache.default())
    for line in PARTS[arguments.part](source, arguments.data, arguments):
        print(json.dumps(line._asdict()), flush=True)
        words = f"{line.plain:.2%} -> {line.value:.2%}, {100 * line.change:+.1f} [{100 * line.low:+.1f}, "
        print(f"{line.method} {line.shots} {line.metric}: {words}{100 * line.high:+.1f}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
