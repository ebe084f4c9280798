"""Gallery corrections in retrieval on Flickr8k; whatever is chosen is chosen on dev before test is read.

    python tests/benchmarks/gallery_corrections.py --data $VLKIT_DATA/flickr8k [--model local-dir:FOLDER] [--json]
    python tests/benchmarks/gallery_corrections.py --table "general_small"=FILE.jsonl "LiT"=OTHER.jsonl

Banks are the images and captions of the training split. For each method and direction the setting with the best
recall@10 on the dev split (the first of equal ones) is taken, and measured once on the test split: recall@1, 5 and 10,
and the paired difference to the plain ranking, its interval over images with all their captions. `skew` is that of how
often each gallery item stands among the ten best: what hubs do to a ranking. "bank of the test queries" sees what no
row may see, and tells how much there is to gain from a perfect bank. `tta` (with `--methods ...,tta`) has nothing to
choose; `tta + X` is method X on averaged views, its setting chosen anew on dev in these views; of the training images
its bank has 500, in ten views, and the captions of all.

The second form prints text-to-image recall@10 of several encoders side by side, out of what `--json` wrote for each.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.metrics import Ranks, hit_probability, paired_difference
from eval.with_addons import directed_ranks
from vlkit.addons.adapt import captioned_reference
from vlkit.addons.adapted import Direction
from vlkit.addons.base import AddOn
from vlkit.addons.exchange import Vectors
from vlkit.addons.feature_maps.tta import AveragedViews
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.registry import find_method
from vlkit.addons.views import TEST_VIEWS, ViewRecipe
from vlkit.data.records import Record, text_to_image
from vlkit.data.sources import read_source
from vlkit.features.cache import FeatureCache
from vlkit.features.source import FeatureSource, open_source

KS = (1, 5, 10)
DIRECTIONS: dict[Direction, str] = {"text_to_image": "image", "image_to_text": "text"}  # and the gallery of each
ENCODER = Path(__file__).parents[1] / "data" / "encoder"
NUM_WITH_VIEWS = 500

Settings = Mapping[str, Any]


def grid(**choices: Sequence[Any]) -> list[Settings]:
    """All combinations."""
    return [dict(zip(choices, one, strict=True)) for one in product(*choices.values())]


GRIDS: dict[str, list[Settings]] = {
    "mean": grid(lam=(0.25, 0.5, 0.75, 1.0)),
    "top_k_mean": grid(alpha=(0.25, 0.5, 0.75, 1.0), k=(1, 4, 16, 64, 128, 512, 2048)),
    "log_sum_exp": grid(beta=(5.0, 10.0, 20.0, 40.0, 80.0)),
    "qb_norm": grid(beta=(5.0, 20.0, 80.0), k=(1, 10)),
    "dual_is": grid(beta_gallery=(0.5, 5.0, 15.0), beta_queries=(10.0, 20.0, 40.0, 80.0)),
    "distribution_norm": grid(lam=(0.25, 0.5, 0.75, 1.0)),
    "inv_gc": grid(rate_gallery=(0.0, 0.25, 0.5, 1.0), rate_queries=(0.25, 0.5, 1.0)),
}


class Split(NamedTuple):
    """Features of one split."""

    images: Vectors
    texts: Vectors
    owners: torch.Tensor


class Row(NamedTuple):
    """One method in one direction."""

    method: str
    direction: str
    settings: Settings
    dev_recall: float | None  # @10, of the setting that was taken
    recall: Mapping[str, float]
    difference: Mapping[str, tuple[float, float, float]]  # to plain, with its interval
    skew: float


def features(passes: Passes, records: Sequence[Record], recipe: ViewRecipe | None = None) -> Split:
    """Images with captions, and these."""
    read = passes.read(records, recipe=recipe)
    kept = [records[row] for row in read.kept]
    captions = [caption for record in kept for caption in record.captions]
    texts = Vectors("text", passes.source.embed_texts(captions))
    return Split(read.vectors, texts, torch.tensor(text_to_image(kept)))


def ranked(pipeline: Pipeline, split: Split, source: FeatureSource, direction: Direction) -> Ranks:
    return directed_ranks(pipeline.retrieval(split.images, split.texts, source), split.owners, direction)


def recall_at_10(pipeline: Pipeline, split: Split, source: FeatureSource, direction: Direction) -> float:
    return hit_probability(ranked(pipeline, split, source, direction), 10).mean().item()


def chosen(
    name: str, reference: Reference, dev: Split, source: FeatureSource, before: Sequence[AddOn] = ()
) -> Iterator[tuple[Direction, Pipeline, float]]:
    """For each direction the best setting on dev, fitted behind other add-ons, and its recall there."""
    method: Any = find_method(name)
    for direction, gallery in DIRECTIONS.items():
        best: tuple[Pipeline, float] | None = None
        # InvGC must know which side is the gallery.
        side = {"gallery": gallery} if name == "inv_gc" else {}
        bank = (
            queries_alone(reference, direction)
            if method.slot == "gallery_bias" and "captions" in method.uses
            else reference
        )
        for settings in GRIDS[name]:
            if name == "top_k_mean" and settings["k"] > len(bank.captions or bank.images or ()):
                continue
            pipeline = Pipeline([*before, method(**settings, **side)]).fit(bank, source)
            value = recall_at_10(pipeline, dev, source, direction)
            if best is None or value > best[1]:
                best = (pipeline, value)
        assert best is not None
        yield direction, *best


def queries_alone(reference: Reference, direction: Direction) -> Reference:
    """The bank of one direction."""
    if direction == "text_to_image":
        return replace(reference, images=None)
    return replace(reference, captions=None)


def skew(pipeline: Pipeline, split: Split, source: FeatureSource, direction: Direction) -> float:
    """Skewness of how often gallery items are among the ten best."""
    scored = pipeline.retrieval(split.images, split.texts, source)
    size = len(split.images if direction == "text_to_image" else split.texts)
    counts = torch.zeros(size, dtype=torch.float64)
    for scores in scored.scores(direction):
        counts += torch.bincount(scores.topk(10).indices.flatten(), minlength=size)
    away = counts - counts.mean()
    return (away.pow(3).mean() / away.square().mean().pow(1.5)).item()


def measured(
    method: str, direction: Direction, pipeline: Pipeline, value: float | None, test: Split, source: FeatureSource
) -> Row:
    """On the test split, beside plain."""
    plain, ranks = (ranked(one, test, source, direction) for one in (PLAIN, pipeline))
    units = torch.arange(len(test.images)) if direction == "image_to_text" else test.owners
    recall, differences = {}, {}
    for k in KS:
        first, second = hit_probability(plain, k), hit_probability(ranks, k)
        recall[f"recall@{k}"] = second.mean().item()
        change = paired_difference(first, second, units=units, num_permutations=1)
        differences[f"recall@{k}"] = (change.difference, change.low, change.high)
    settings = {key: one for addon in pipeline.addons for key, one in addon.settings().items() if key != "bank_size"}
    return Row(method, direction, settings, value, recall, differences, skew(pipeline, test, source, direction))


def rows(model: str, data: Path, methods: Sequence[str]) -> Iterator[Row]:
    """Plain, then each method in both directions."""
    source = open_source(model, "cpu", FeatureCache.default())
    passes = Passes(source, workers=2)
    records = {
        split: [record for record in read_source(str(data), split=split).records if record.captions]
        for split in ("train", "dev", "test")
    }
    reference, _ = captioned_reference(passes, records["train"])
    dev = features(passes, records["dev"])
    fixed = {name: list(chosen(name, reference, dev, source)) for name in methods if name in GRIDS}
    # From here on nothing is chosen.
    test = features(passes, records["test"])
    for direction in DIRECTIONS:
        yield measured("plain", direction, PLAIN, recall_at_10(PLAIN, dev, source, direction), test, source)
        for name in fixed:
            pipeline, value = next((one, value) for where, one, value in fixed[name] if where == direction)
            yield measured(name, direction, pipeline, value, test, source)
            if name == "top_k_mean":
                seen = bank_of_the_test_queries(pipeline, test)
                yield measured(f"{name}, bank of the test queries", direction, seen, None, test, source)
    if "tta" in methods:
        yield from with_views(passes, records, list(fixed), reference, source)


def bank_of_the_test_queries(pipeline: Pipeline, test: Split) -> Pipeline:
    """NNN with a bank that no method may see."""
    (addon,) = pipeline.addons
    k = min(addon.settings()["k"], len(test.images))
    return Pipeline([replace(addon, k=k, images=test.images.pooled, texts=test.texts.pooled)])  # type: ignore[call-arg]


def with_views(
    passes: Passes,
    records: Mapping[str, Sequence[Record]],
    names: Sequence[str],
    reference: Reference,
    source: FeatureSource,
) -> Iterator[Row]:
    """TTA, and each method behind it."""
    some, _ = captioned_reference(passes, records["train"][:: len(records["train"]) // NUM_WITH_VIEWS])
    assert reference.captions is not None
    bank = replace(some, captions=replace(reference.captions, image_row=None))
    dev = features(passes, records["dev"], TEST_VIEWS)
    fixed = [("tta", *one) for one in _unchosen(Pipeline([AveragedViews()]).fit(bank, source), dev, source)]
    for name in names:
        fixed += [(f"tta + {name}", *one) for one in chosen(name, bank, dev, source, [AveragedViews()])]
    # From here on nothing is chosen.
    test = features(passes, records["test"], TEST_VIEWS)
    for name, direction, pipeline, value in fixed:
        yield measured(name, direction, pipeline, value, test, source)


def _unchosen(pipeline: Pipeline, dev: Split, source: FeatureSource) -> Iterator[tuple[Direction, Pipeline, float]]:
    for direction in DIRECTIONS:
        yield direction, pipeline, recall_at_10(pipeline, dev, source, direction)


def shown(row: Row) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
    cells = []
    for key, value in row.recall.items():
        change, low, high = (100 * number for number in row.difference[key])
        beside = "" if row.method == "plain" else f" {change:+.1f} [{low:+.1f}, {high:+.1f}]"
        cells.append(f"{key} {100 * value:.1f}{beside}")
    return f"{row.direction:<14} {row.method:<24} {'  '.join(cells)}  skew {row.skew:.2f}  ({settings})"


def table(files: Mapping[str, Path]) -> str:
    """Text-to-image recall@10 in Markdown: a row a method, a column an encoder."""
    found = {}
    for name, file in files.items():
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[name] = {one["method"]: one for one in lines if one["direction"] == "text_to_image"}
    shown = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    plain = [one["plain"] for one in found.values()]
    shown.append("| plain | " + " | ".join(f"{100 * one['recall']['recall@10']:.1f}%" for one in plain) + " |")
    shown.append("| skew of plain | " + " | ".join(f"{one['skew']:.2f}" for one in plain) + " |")
    for method in next(iter(found.values())):
        if method != "plain":
            cells = [_difference(one[method]["difference"]["recall@10"]) for one in found.values()]
            shown.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(shown)


def _difference(change: Sequence[float]) -> str:
    middle, low, high = (100 * number for number in change)
    text = f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="the folder of Flickr8k")
    what.add_argument("--table", nargs="+", metavar="NAME=FILE", help="JSON lines of encoders, to print beside another")
    parser.add_argument("--model", default=f"local-dir:{ENCODER}")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--methods", default=",".join([*GRIDS, "tta"]), help="some of them, with commas")
    arguments = parser.parse_args()
    if arguments.table:
        print(table({name: Path(file) for name, _, file in (one.partition("=") for one in arguments.table)}))
        return
    for row in rows(arguments.model, arguments.data, arguments.methods.split(",")):
        print(json.dumps(row._asdict()) if arguments.json else shown(row), flush=True)


if __name__ == "__main__":
    main()
