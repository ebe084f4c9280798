"""Class weights made of texts, on CIFAR-10 test images (2,000 in the data folder), each beside plain zero-shot weights.

    python tests/benchmarks/class_texts.py --data $VLKIT_DATA/cifar10_test [--model local-dir:FOLDER] [--json]

The texts below were written before anything was measured, and nothing is chosen on the images. The closed-set model of
`semap` is the zero-shot classifier of 20 everyday names. `waffle` is the mean over seven seeds; its interval that of
seed 0.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eval.addons import Bench, Row, compare_addons
from vlkit.addons.base import AddOn
from vlkit.addons.class_names import parse_class
from vlkit.addons.passes import Passes
from vlkit.addons.reference import Reference
from vlkit.addons.registry import find_method
from vlkit.data.sources import read_source
from vlkit.features.cache import FeatureCache
from vlkit.features.source import open_source

ENCODER = Path(__file__).parents[1] / "data" / "encoder"
METRIC = "accuracy@1"
DESCRIPTORS = {
    "airplane": ["two wings", "a long white body", "jet engines", "a tail fin", "blue sky around it"],
    "automobile": ["four wheels", "a windshield", "headlights", "a shiny metal body", "a road under it"],
    "bird": ["feathers", "a beak", "two wings", "thin legs", "a small round head"],
    "cat": ["whiskers", "pointed ears", "soft fur", "a long tail", "round eyes"],
    "deer": ["antlers", "brown fur", "thin long legs", "a forest or a meadow around it", "large ears"],
    "dog": ["a wet nose", "fur", "a wagging tail", "floppy ears", "an open mouth with a tongue"],
    "frog": ["green wet skin", "bulging eyes", "long hind legs", "a wide mouth", "no tail"],
    "horse": ["a mane", "long strong legs", "hooves", "a long face", "a grassy field around it"],
    "ship": ["a hull", "water around it", "a mast or a funnel", "a deck", "a bow"],
    "truck": ["a large cargo bed", "many big wheels", "a driver's cabin", "a heavy boxy body", "a road under it"],
}
SENTENCES = {
    name: [f"A photo of a {name}, which has {one}." for one in texts] + [f"A {name} seen from nearby."]
    for name, texts in DESCRIPTORS.items()
}
KINDS = {
    "airplane": ["jet", "biplane", "airliner", "fighter plane"],
    "automobile": ["car", "sports car", "sedan", "taxi"],
    "bird": ["sparrow", "ostrich", "parrot", "eagle", "duck"],
    "cat": ["tabby cat", "kitten", "Persian cat", "black cat"],
    "deer": ["stag", "fawn", "reindeer", "elk"],
    "dog": ["puppy", "poodle", "terrier", "retriever", "pug"],
    "frog": ["tree frog", "toad", "bullfrog"],
    "horse": ["pony", "foal", "stallion", "racehorse"],
    "ship": ["sailing boat", "cruise ship", "cargo ship", "speedboat"],
    "truck": ["pickup truck", "fire engine", "lorry", "dump truck"],
}
KNOWN = (
    "plane", "car", "sparrow", "kitten", "elk", "puppy", "toad", "pony", "boat", "lorry",
    "bus", "train", "bicycle", "cow", "sheep", "fish", "flower", "tree", "house", "person",
)  # fmt: skip
CONTEXTS = "on grass|in the sky|on water|on a road|in the snow|indoors"


class Line(NamedTuple):
    """One way of making class weights."""

    method: str
    settings: str
    accuracy: float
    change: float  # to plain
    low: float  # 95%, paired
    high: float


def candidates(folder: Path) -> list[tuple[str, AddOn]]:
    """Every method with its files."""
    for name, table in (("descriptors", DESCRIPTORS), ("sentences", SENTENCES), ("kinds", KINDS)):
        (folder / f"{name}.json").write_text(json.dumps(table))
    (folder / "known.txt").write_text("\n".join(KNOWN))
    files: dict[str, Any] = {name: str(folder / f"{name}.json") for name in ("descriptors", "sentences", "kinds")}
    names = str(folder / "known.txt")
    tried: list[tuple[str, str, dict[str, Any]]] = [
        ("templates", "imagenet80", {}),
        ("mean_of_similarities", "simple", {"templates": "simple"}),
        ("descriptions", "descriptors", {"file": files["descriptors"]}),
        ("descriptions", "descriptors and simple templates", {"file": files["descriptors"], "templates": "simple"}),
        ("descriptions", "sentences", {"file": files["sentences"], "form": "sentences"}),
        ("chils", "", {"file": files["kinds"]}),
        ("chils", "not reweighted", {"file": files["kinds"], "reweight": False}),
        ("ideal_words", "contexts left out", {"spurious": CONTEXTS, "template": "a photo of a {}."}),
        ("semap", "one of 20 names", {"names": names, "mapping": "one"}),
        ("semap", "several of 20 names", {"names": names, "mapping": "many"}),
        ("semap", "random, the control", {"names": names, "mapping": "random"}),
    ]
    return [(settings, find_method(name)(**values)) for name, settings, values in tried]


def lines(model: str, data: Path) -> Iterator[Line]:
    """Plain, then each of them."""
    source = open_source(model, "cpu", FeatureCache.default())
    passes = Passes(source, workers=2)
    read = read_source(str(data), format="folder")
    classes = tuple(parse_class(name) for name in read.class_names)
    reference = Reference(class_names=classes, passes=passes)
    bench = Bench("classification", tuple(read.records), reference, tuple(read.class_names), "simple", "texts alone")

    def row(addon: AddOn, place: int) -> Row:
        board = compare_addons(bench, source, passes, [addon])
        assert not board.left_out, board.left_out
        return board.rows[place]

    yield Line("plain", "simple", row(find_method("templates")(), 0).metrics[METRIC], 0.0, 0.0, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for settings, addon in candidates(Path(folder)):
            found = row(addon, 1)
            yield Line(addon.name, settings, found.metrics[METRIC], *found.differences[METRIC][:3])
    waffle: Any = find_method("waffle")
    seeds = [row(waffle(seed=seed), 1) for seed in range(7)]
    accuracy = statistics.mean(one.metrics[METRIC] for one in seeds)
    change = statistics.mean(one.differences[METRIC].difference for one in seeds)
    yield Line("waffle", "7 seeds", accuracy, change, *seeds[0].differences[METRIC][1:3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of class folders")
    parser.add_argument("--model", default=f"local-dir:{ENCODER}")
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    for line in lines(arguments.model, arguments.data):
        if arguments.json:
            print(json.dumps(line._asdict()), flush=True)
            continue
        change = f"{100 * line.change:+.1f} [{100 * line.low:+.1f}, {100 * line.high:+.1f}]"
        print(f"{line.method:<22} {line.settings:<34} {100 * line.accuracy:5.1f}  {change}", flush=True)


if __name__ == "__main__":
    main()
