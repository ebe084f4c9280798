"""Prompt learning that needs more than class folders, on real data with the small encoder: reasons, maps, questions.

    python tests/benchmarks/prompt_measured.py why --data $VLKIT_DATA > why.jsonl      # or another part
    python tests/benchmarks/addons_measured.py collect *.jsonl      # into addons_measured.json; then `make readme`

Parts, each with seeds 1, 2 and 3:
    why     why_prompt beside the plain encoder in `eval.doubly_right`. Images with a class and a reason found on the
            web cannot be passed on, so captions stand in for them: photographs of Flickr8k that the encoder was not
            trained on (dev and test), whose class is the one of CLASSES that at least two captions name, and whose
            reason is what most of them name out of REASONS. A fifth, the same for all seeds, is validated on
            (GRID_WHY); of the rest each seed learns from half and tests on half.
    deal    what DEAL is for, beside accuracy (which `vlkit eval prompts` measures): on the base test images of
            Caltech-101, with the true class and its concepts (caltech101_concepts.json, written before anything was
            measured), how much maps of concepts overlap and how far their sum is from the class's map; on coco_small,
            the pointing game with the tuned weights. With all three terms at 0 as the control.
    active_cifar10, active_caltech101    active prompt learning, 100 and 16 images a class to ask about: what asking by
            clusters gains over asking at random and by entropy, with equally many labels, and what `selective` gains;
            CoOp with words for each class as the learner. Tested on the images that are left.

Nothing is chosen on test images. Intervals: 95%, percentile bootstrap of the difference, over images, those of all
seeds together.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from addons_measured import CALTECH, ENCODER, SEEDS, Hits, Line, column, compared, pooled
from torch import Tensor

from eval.class_names import name_classes
from eval.coco_instances import read_instances
from eval.doubly_right import DoublyRightEvaluator
from eval.general_encoder import CALTECH_NAMES
from eval.pointing import PointingEvaluator
from eval.prompt_grid import PromptSet, draw
from vlkit.addons.active import active_learning
from vlkit.addons.class_names import ClassName, parse_class
from vlkit.addons.class_texts import read_class_texts, texts_of
from vlkit.addons.confidence import fitted_scale
from vlkit.addons.passes import Passes, editing
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.addons.towers.deal import concept_maps, terms
from vlkit.addons.towers.why_prompt import rationale_texts, reasons_of
from vlkit.data.images import read_image
from vlkit.data.records import Record
from vlkit.data.sources import read_source
from vlkit.features.cache import FeatureCache
from vlkit.features.source import FeatureSource, open_source

TEMPLATES = "photo"
CLASSES = {
    "dog": ("dog", "dogs", "puppy"),
    "man": ("man", "men"),
    "woman": ("woman", "women", "lady"),
    "boy": ("boy", "boys"),
    "girl": ("girl", "girls"),
}
REASONS = {
    "water": ("water", "ocean", "sea", "lake", "river", "pool", "stream", "wave", "waves"),
    "snow": ("snow", "snowy", "ice"),
    "grass": ("grass", "grassy", "lawn", "field"),
    "a ball": ("ball", "balls", "football", "soccer", "basketball", "baseball", "tennis"),
    "a bike": ("bike", "bikes", "bicycle", "bicycles", "motorcycle"),
    "a beach": ("beach", "sand", "sandy", "shore"),
    "rock": ("rock", "rocks", "rocky", "cliff", "mountain", "mountains"),
    "a street": ("street", "road", "sidewalk", "city"),
    "a skateboard": ("skateboard", "skateboarder", "skateboarding"),
    "a building": ("building", "house", "wall", "brick"),
}
# Tried on validation images; the lowest cross-entropy over all pairs, at the multiplier that fits, is taken.
GRID_WHY = tuple(f"why_prompt:epochs=10,lr={lr}" for lr in (4, 40))
WHY_KEYS = {
    "both": "doubly right", "only_class": "class alone right", "only_reason": "reason alone right", "class": "accuracy",
}  # fmt: skip
CONCEPTS = Path(__file__).with_name("caltech101_concepts.json")
DEAL = "epochs=1,batch_size=32,crop=0.5,confidence=fitted,lr=1e-4"
LEARNER = "coop:context=4,per_class=true,optimizer=adamw,lr=0.01,epochs=60,batch_size=10000"


class Scene(NamedTuple):
    """Images of one seed: to learn from, and to test on."""

    train: tuple[Record, ...]
    test: tuple[Record, ...]


def why(source: FeatureSource, data: Path) -> Iterator[Line]:
    passes = Passes(source, workers=1)
    names = tuple(parse_class(name) for name in CLASSES)
    records = with_reasons(data)
    val, scenes = shared_split(records)
    first = shots_of(passes, scenes[0].train)
    losses = {name: pair_loss(fitted(name, names, first, 1, passes), passes, names, val) for name in GRID_WHY}
    remark(f"plain {pair_loss(PLAIN, passes, names, val):.4f}, {losses}")
    chosen = min(losses, key=lambda name: losses[name])
    found: dict[bool, dict[str, list[Hits]]] = {tuned: {key: [] for key in WHY_KEYS} for tuned in (False, True)}
    for seed, scene in zip(SEEDS, scenes, strict=True):
        pipeline = fitted(chosen, names, shots_of(passes, scene.train), seed, passes)
        for tuned, one in ((False, PLAIN), (True, pipeline)):
            for key, hits in judged(source, one, scene.test).items():
                found[tuned][key].append(hits)
    settings = chosen.partition(":")[2].replace("=", " ").replace(",", " ")
    words = (
        f"{len(CLASSES)} classes x {len(REASONS)} reasons out of captions, learned from {len(scenes[0].train)} images"
    )
    for key in WHY_KEYS:
        plain, value = (pooled(found[kind][key]) for kind in (False, True))
        yield compared("why_prompt", "Flickr8k", "", plain, value, WHY_KEYS[key], settings=settings, note=words)


def with_reasons(data: Path) -> list[Record]:
    """Photographs of one class of CLASSES, the reason as their caption."""
    found = []
    for record in read_source(str(data / "flickr8k")).records:
        told = [set(re.findall("[a-z]+", caption.lower())) for caption in record.captions]
        if record.split == "train" or not told:
            continue
        classes = [place for place, words in enumerate(CLASSES.values()) if count(told, words) >= 2]
        counts = {reason: count(told, words) for reason, words in REASONS.items()}
        reason = max(counts, key=lambda one: counts[one])
        if len(classes) == 1 and counts[reason] >= 2:
            found.append(Record(record.key, record.image, (reason,), classes[0]))
    return found


def count(captions: Sequence[set[str]], words: Sequence[str]) -> int:
    return sum(not caption.isdisjoint(words) for caption in captions)


def shared_split(records: Sequence[Record]) -> tuple[list[Record], list[Scene]]:
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    val, rest = order[: len(order) // 5], order[len(order) // 5 :]
    scenes = []
    for seed in SEEDS:
        drawn = [rest[row] for row in torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()]
        halves = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
        scenes.append(Scene(*(tuple(records[row] for row in half) for half in halves)))
    return [records[row] for row in val], scenes


def shots_of(passes: Passes, records: Sequence[Record]) -> Part:
    labels = [record.label for record in records]
    return Part("train", passes.read(records).vectors, torch.tensor(labels), tuple(records))


def fitted(method: str, names: tuple[ClassName, ...], shots: Part, seed: int, passes: Passes) -> Pipeline:
    reference = Reference(class_names=names, few_shot=shots, seed=seed, passes=passes)
    return Pipeline([make_addon(method)]).fit(reference, passes.source, TEMPLATES)


def pair_loss(pipeline: Pipeline, passes: Passes, names: tuple[ClassName, ...], records: Sequence[Record]) -> float:
    distinct, own = reasons_of(records)
    texts = passes.source.embed_texts(rationale_texts([item.shown for item in names], distinct).texts)
    targets = torch.tensor([record.label for record in records]) * len(distinct) + own
    scores = passes.read(records, pipeline.edits).vectors.pooled @ texts.T
    return calibrated(scores, targets)


def calibrated(scores: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(fitted_scale(scores, targets, 100.0) * scores, targets).item()


def judged(source: FeatureSource, pipeline: Pipeline, records: Sequence[Record]) -> dict[str, Hits]:
    table = DoublyRightEvaluator(records, tuple(CLASSES), workers=1).run(source, pipeline).per_item
    assert table is not None
    right, reasoned = (torch.tensor(table.column(name).to_pylist()) for name in ("class_right", "reason_right"))
    of_key = {"both": right & reasoned, "only_class": right & ~reasoned, "only_reason": ~right & reasoned}
    keys = table.column("key").to_pylist()
    return {key: (one.double().tolist(), keys) for key, one in (of_key | {"class": right}).items()}


def deal(source: FeatureSource, data: Path) -> Iterator[Line]:
    source = open_source(source.name, "cpu", None)  # texts change with the weights
    passes = Passes(source, workers=1)
    scenes = read_instances(data / "coco_small")
    pictured = caltech(data)
    names = pictured.classes[: (len(pictured.classes) + 1) // 2]
    kinds = {
        "plain": "",
        "": f"deal:{DEAL},file={CONCEPTS}",
        "all terms at 0, the control": f"deal:{DEAL},separate=0,consistent=0,file={CONCEPTS},sparse=0",
    }
    found: dict[str, dict[str, list[Hits]]] = {kind: {} for kind in kinds}
    for seed in SEEDS:
        drawn = draw(pictured, 16, seed)
        shots = shots_of(passes, [one for one in drawn.train if (one.label or 0) < len(names)])
        test = [one for one in drawn.test if (one.label or 0) < len(names)]
        for kind, method in kinds.items():
            pipeline = fitted(method, names, shots, seed, passes) if method else PLAIN
            with editing(source.embedder.encoder, pipeline.edits):
                hits = explained(source, names, test)
                hits["pointing game"] = column(PointingEvaluator(scenes, method="relevance").run(source), "hit")
            for metric, one in hits.items():
                found[kind].setdefault(metric, []).append(one)
    for kind in list(kinds)[1:]:
        for metric, parts in found[kind].items():
            where = "coco_small" if metric == "pointing game" else CALTECH
            settings = DEAL.replace("=", " ").replace(",", " ")
            plain = pooled(found["plain"][metric])
            yield compared("deal", where, "16", plain, pooled(parts), metric, settings=settings, note=kind)


def caltech(data: Path) -> PromptSet:
    found = read_source(str(data / "caltech101"))
    classes = name_classes(found.class_names, found.records, exclude=["Faces_easy"])
    names = [CALTECH_NAMES.get(name, name) for name in classes.names]
    return PromptSet(CALTECH, tuple(parse_class(name) for name in names), tuple(classes.records))


def explained(source: FeatureSource, names: Sequence[ClassName], records: Sequence[Record]) -> dict[str, Hits]:
    """Of each image the overlap of the maps of its class's concepts, and their distance from the map of its name."""
    encoder = source.embedder.encoder
    lists = [texts[:5] for texts in texts_of(names, read_class_texts(str(CONCEPTS), "deal"), CONCEPTS.name)]
    concepts = source.embed_texts([text for texts in lists for text in texts]).view(len(names), 5, -1)
    categories = source.embed_texts([f"a photo of a {item.shown}." for item in names])
    overlap, distance = [], []
    for start in range(0, len(records), 50):
        part = records[start : start + 50]
        images = torch.stack([encoder.preprocess(read_image(record)) for record in part])
        labels = torch.tensor([record.label for record in part])
        with torch.inference_mode(False), torch.enable_grad():
            maps = concept_maps(encoder, images, categories[labels].clone(), concepts[labels].clone())
        for row in range(len(part)):
            held = terms(maps.concepts[row : row + 1].detach(), maps.category[row : row + 1].detach())
            overlap.append(held.separate.item())
            distance.append(held.consistent.item())
    keys = [record.key for record in records]
    return {"overlap of concepts": (overlap, keys), "distance from the class": (distance, keys)}


PAIRS = (("clusters", "random"), ("clusters", "entropy"), ("entropy", "random"), ("selective", "clusters"))
MOST = 2  # times as many rounds, where some labels are not asked for


class Asked(NamedTuple):
    """State of a learner with so many labels."""

    labels: int
    assumed: int  # beside them
    right: int  # of those
    hits: Hits


def active_caltech101(source: FeatureSource, data: Path) -> Iterator[Line]:
    yield from asked_on(source, caltech(data), 16, (1, 3))


def active_cifar10(source: FeatureSource, data: Path) -> Iterator[Line]:
    cifar = read_source(str(data / "cifar10_test"))
    classes = tuple(parse_class(name) for name in cifar.class_names)
    yield from asked_on(source, PromptSet("CIFAR-10", classes, tuple(cifar.records)), 100, (1, 4, 8))


def asked_on(source: FeatureSource, data: PromptSet, pool: int, rounds: Sequence[int]) -> Iterator[Line]:
    """At the ends of some rounds, one label a class in each."""
    ways = {"random": False, "entropy": False, "clusters": False, "selective": True}
    found: dict[str, list[list[Asked]]] = {way: [] for way in ways}
    for seed in SEEDS:
        for way, selective in ways.items():
            found[way].append(course(source, data, pool, rounds, seed, way, selective))
            right = [f"{one.labels}: {statistics.mean(one.hits[0]):.3f}" for one in found[way][-1]]
            remark(f"{data.name}, seed {seed}, {way}: {right}")
    for place, number in enumerate(rounds):
        shots = f"{number * len(data.classes)} labels"
        for way, beside in PAIRS:
            if number == 1 and way == "selective":  # it begins with clusters
                continue
            plain, value = (pooled([one[place].hits for one in found[name]]) for name in (beside, way))
            words = spared([one[place] for one in found[way]]) if way == "selective" else ""
            settings = f"{way}, plain: {beside}"
            yield compared("active", data.name, shots, plain, value, settings=settings, note=words)._replace(slot="")


def spared(parts: Sequence[Asked]) -> str:
    labels, assumed, right = map(sum, zip(*((one.labels, one.assumed, one.right) for one in parts), strict=True))
    share = f", {right / assumed:.0%} of them right" if assumed else ""
    return f"{labels / len(parts):.0f} labels, {assumed / len(parts):.0f} more assumed{share}"


def course(
    source: FeatureSource, data: PromptSet, pool: int, rounds: Sequence[int], seed: int, way: str, selective: bool
) -> list[Asked]:
    """How it stands with as many labels as others have after `rounds`, or the most that are not more."""
    passes = Passes(source, workers=1)
    drawn = draw(data, pool, seed)
    answers, images = [record.label or 0 for record in drawn.train], passes.read(drawn.train).vectors
    reference = Reference(
        images=Part("train", images, None, drawn.train),
        class_names=data.classes, seed=seed, passes=passes,
    )  # fmt: skip
    test, labels = passes.read(drawn.test).vectors, torch.tensor([record.label for record in drawn.test])
    limits = [number * len(data.classes) for number in rounds]
    found: dict[int, Asked] = {}
    strategy: Any = "clusters" if selective else way
    guessed, free, right = torch.empty(0), 0, 0
    for one in active_learning(
        make_addon(LEARNER), reference, source, lambda rows: [answers[row] for row in rows],
        rounds=MOST * rounds[-1] if selective else rounds[-1], strategy=strategy, selective=selective,
        templates=TEMPLATES,
    ):  # fmt: skip
        if one.questions > limits[-1]:
            break
        classifier = Pipeline([one.addon]).classifier(data.classes, source, TEMPLATES)
        free += len(one.assumed)
        right += sum(int(guessed[row]) == answers[row] for row in one.assumed)
        guessed = classifier.logits(images).argmax(1)
        hits = (classifier.logits(test).argmax(1) == labels).double().tolist()
        asked = Asked(one.questions, free, right, (hits, [record.key for record in drawn.test]))
        found |= {limit: asked for limit in limits if one.questions <= limit}
    return [found[limit] for limit in limits]


def remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[FeatureSource, Path], Iterator[Line]]] = {
    "why": why, "deal": deal, "active_cifar10": active_cifar10, "active_caltech101": active_caltech101,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--model", default=f"local-dir:{ENCODER}")
    arguments = parser.parse_args()
    if arguments.data is None or arguments.part is None:
        print("left out: name a part, and --data, the folder of the data sets")
        return
    source = open_source(arguments.model, "cpu", FeatureCache.default())
    for line in PARTS[arguments.part](source, arguments.data):
        print(json.dumps(line._asdict()), flush=True)
        change = f"{line.change:+.4f} [{line.low:+.4f}, {line.high:+.4f}]"
        remark(
            f"{line.method} {line.data} {line.metric} {line.settings}: {line.plain:.4f} -> {line.value:.4f}, {change}"
        )


if __name__ == "__main__":
    main()
