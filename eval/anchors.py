"""Published rows of add-ons on known weights, each with everything that is known of how it was measured.

    row = ANCHORS["dn/flickr-0.5"]
    for metric, found in run_anchor(row, "data", open_source(row.model)).items():
        print(metric, found.published, found.difference, found.within)

A row is ready to run where weights and data are: `vlkit eval anchors --data DATA dn/flickr-0.5`. What the papers leave
open stands in `open_points`, and is why the tolerance is wider than that of plain protocols (`eval.published`).

Source: Zhou et al. 2023 (DN), arXiv:2302.11084; Chowdhury et al. 2024 (NNN), arXiv:2410.24114; Bogolin et al. 2022
(QB-Norm), arXiv:2112.12777; Lan et al. 2024 (ClearCLIP), arXiv:2407.12442, with MaskCLIP's row as later tables have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from eval.classification import ClassificationEvaluator
from eval.coco_instances import read_instances
from eval.label_folders import is_label_folder, read_label_folder
from eval.published import Anchor
from eval.retrieval import RetrievalEvaluator
from eval.segmentation import SegmentationEvaluator
from vlkit.addons.adapt import captioned_reference
from vlkit.addons.class_names import parse_class
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.contracts import Evaluation, Progress
from vlkit.data.records import Record
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError, did_you_mean
from vlkit.features.source import FeatureSource
from vlkit.models.zero_shot_text import imagenet_class_names

Task = Literal["retrieval", "classification", "segmentation"]
PREFIX = "A photo depicts "
B32, B16 = "open_clip:ViT-B-32/openai", "open_clip:ViT-B-16/openai"
VIEWS_OPEN = "; which augmentations TTA averages is not published, ours stand for them"
_RECALLS = tuple(f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


@dataclass(frozen=True)
class AnchorRow:
    """One published row.

    Attributes:
        name: on the command line.
        task: which evaluator.
        model: the weights it was measured on.
        folder: of the data below the root; retrieval and classification also read their bank from it.
        addons: as on the command line; none for the plain row beside which they stand.
        published: metric -> value.
        tolerance: difference that the open points may make.
        open_points: what public sources do not fix, and the choice made.
        split: that is measured.
        bank: split that add-ons are fitted on.
        bank_images: how many of it, by seed; None takes a fifth (NNN).
        num_images: that the measured split must have; 0: any number.
        text_prefix: before every text.
        background, threshold, logit_scale: of segmentation.
    """

    name: str
    task: Task
    model: str
    folder: str
    addons: tuple[str, ...]
    published: Mapping[str, float]
    tolerance: float
    open_points: str
    split: str = "test"
    bank: str = "train"
    bank_images: int | None = 500
    num_images: int = 0
    text_prefix: str = ""
    background: Literal["ignored", "class"] = "ignored"
    threshold: float = 0.0
    logit_scale: float = 40.0


def run_anchor(
    row: AnchorRow, data: str | Path, source: FeatureSource, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Anchor]:
    """Measure one row, and compare.

    Args:
        row: of `ANCHORS`.
        data: folder that holds the row's data.
        source: the model; that of the row, or the numbers say nothing.
        seed: of the bank.
        progress: called with (done, total) images.

    Raises:
        DataError: the data are missing, or are not those the row was measured on.
        ConfigError, ModelError: see the evaluators.
    """
    place = Path(data) / row.folder
    if not place.exists():
        raise DataError(f"{row.name} reads {place}, which is not there. Put the data set there, or name another root.")
    found = _TASKS[row.task](row, place, source, seed, progress)
    differences = {metric: found.metrics[metric] - value for metric, value in row.published.items()}
    return {
        metric: Anchor(value, differences[metric], abs(differences[metric]) <= row.tolerance)
        for metric, value in row.published.items()
    }


def find_anchor(name: str) -> AnchorRow:
    """The row of a name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    if name not in ANCHORS:
        raise ConfigError(f"No published row is called {name!r}. {did_you_mean(name, ANCHORS)} --list shows all.")
    return ANCHORS[name]


def _retrieval(row: AnchorRow, place: Path, source: FeatureSource, seed: int, progress: Progress | None) -> Evaluation:
    records = [one for one in read_source(str(place), split=row.split).records if one.captions]
    _check_number(row, place, len(records))
    passes, pipeline = Passes(source), Pipeline([make_addon(text) for text in row.addons])
    if pipeline.addons:
        pool = [one for one in read_source(str(place), split=row.bank).records if one.captions]
        bank = _drawn(pool, row.bank_images, seed)
        reference, _ = captioned_reference(passes, bank, seed=seed, split=row.bank, text_prefix=row.text_prefix)
        pipeline = pipeline.fit(reference, source)
    evaluator = RetrievalEvaluator(records, passes=passes, text_prefix=row.text_prefix, progress=progress)
    return evaluator.run(source, pipeline)


def _classification(
    row: AnchorRow, place: Path, source: FeatureSource, seed: int, progress: Progress | None
) -> Evaluation:
    found = read_source(str(place / row.split))
    _check_number(row, place / row.split, len(found.records))
    imagenet = len(found.class_names) == 1000
    names = imagenet_class_names() if imagenet else tuple(name.replace("_", " ") for name in found.class_names)
    template = row.text_prefix + "a photo of a {}."
    passes, pipeline = Passes(source), Pipeline([make_addon(text) for text in row.addons])
    if pipeline.addons:
        bank = _drawn(list(read_source(str(place / row.bank)).records), row.bank_images, seed)
        read = passes.read(bank)
        images = Part(row.bank, read.vectors, None, tuple(bank[kept] for kept in read.kept))
        classes = tuple(parse_class(name) for name in names)  # two pairs of ImageNet's share a name
        given = Reference(images=images, class_names=classes, seed=seed, passes=passes)
        pipeline = pipeline.fit(given, source, (template,))
    evaluator = ClassificationEvaluator(
        found.records, names, templates=(template,), distinct=not imagenet, passes=passes, progress=progress
    )
    return evaluator.run(source, pipeline)


def _segmentation(
    row: AnchorRow, place: Path, source: FeatureSource, seed: int, progress: Progress | None
) -> Evaluation:
    scenes = read_label_folder(place) if is_label_folder(place) else read_instances(place)
    pipeline = Pipeline([make_addon(text) for text in row.addons]).fit(Reference(), source)
    size = source.embedder.encoder.image_size
    evaluator = SegmentationEvaluator(
        scenes,
        background=row.background,
        threshold=row.threshold,
        logit_scale=row.logit_scale,
        short_side=size * 3 // 2,
        stride=size // 2,
        progress=progress,
    )
    return evaluator.run(source, pipeline)


_TASKS = {"retrieval": _retrieval, "classification": _classification, "segmentation": _segmentation}


def _check_number(row: AnchorRow, place: Path, number: int) -> None:
    if row.num_images and number != row.num_images:
        raise DataError(f"{place} gives {number} images; {row.name} was measured on {row.num_images}.")


def _drawn(records: list[Record], count: int | None, seed: int) -> list[Record]:
    """Some of the records, a fifth by default, in their order."""
    wanted = len(records) // 5 if count is None else min(count, len(records))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:wanted]
    return [records[row] for row in sorted(order.tolist())]


def _dn_addons(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple("tta" if part == "tta" else f"distribution_norm:lam={part}" for part in parts if part != "plain")


def _dn_retrieval() -> list[AnchorRow]:
    """Table 1 of DN: I->T R@1/5/10, then T->I."""
    numbers = {
        "coco-plain": "52.4 76.0 84.5 30.2 55.1 66.4", "coco-0.25": "52.9 76.4 84.9 32.1 57.4 68.3",
        "coco-0.5": "51.7 75.8 84.0 33.4 58.6 69.4", "coco-tta": "53.9 77.5 85.5 32.1 57.5 68.3",
        "coco-tta-0.25": "54.7 77.8 85.6 33.8 59.4 70.1", "coco-tta-0.5": "53.6 76.9 84.8 34.8 60.4 70.8",
        "flickr-plain": "81.3 95.0 98.5 62.7 86.0 92.0", "flickr-0.25": "83.5 96.2 98.5 64.8 87.5 93.1",
        "flickr-0.5": "83.3 96.4 98.6 66.2 88.2 93.3", "flickr-tta": "83.2 96.8 98.4 65.2 87.9 92.9",
        "flickr-tta-0.25": "85.8 97.5 98.8 67.6 89.1 93.9", "flickr-tta-0.5": "85.8 97.5 99.1 68.1 89.4 94.1",
    }  # fmt: skip
    rows = []
    for name, values in numbers.items():
        data, *parts = name.split("-")
        published = dict(zip(_RECALLS, (round(float(value) / 100, 4) for value in values.split()), strict=True))
        folder, count = ("coco", 5000) if data == "coco" else ("flickr30k", 1000)
        rows.append(
            AnchorRow(
                f"dn/{name}", "retrieval", B32, folder, _dn_addons(parts), published, 0.03 if "tta" in parts else 0.01,
                "mean of 5 unseeded draws there, one seeded here" + (VIEWS_OPEN if "tta" in parts else ""),
                bank="val" if data == "coco" else "train", num_images=count, text_prefix=PREFIX,
            )
        )  # fmt: skip
    return rows


def _dn_classification() -> list[AnchorRow]:
    """Table 2 of DN, the columns whose split and names are fixed."""
    numbers = {
        "imagenet": {"plain": 0.610, "0.25": 0.617, "0.5": 0.616, "tta": 0.624, "tta-0.25": 0.632, "tta-0.5": 0.630},
        "cifar100": {"plain": 0.639, "0.25": 0.651, "0.5": 0.655, "tta": 0.660, "tta-0.25": 0.671, "tta-0.5": 0.675},
    }
    rows = []
    for data, values in numbers.items():
        for name, value in values.items():
            parts = name.split("-")
            rows.append(
                AnchorRow(
                    f"dn/{data}-{name}", "classification", B32, data, _dn_addons(parts), {"accuracy@1": value},
                    0.03 if "tta" in parts else 0.01, "as retrieval; class names are open_clip's, theirs are not given",
                    split="val" if data == "imagenet" else "test", num_images=50_000 if data == "imagenet" else 10_000,
                    text_prefix=PREFIX,
                )
            )  # fmt: skip
    return rows


def _hubness() -> list[AnchorRow]:
    """Section 6.2's rows of CLIP B/32: R@1 by text and by image."""
    by_text, by_image = "text_to_image/recall@1", "image_to_text/recall@1"
    more = {"text_to_image/recall@5": 0.599, "text_to_image/recall@10": 0.704}
    lam = "which lambda NNN's authors took for DN is not said; 0.5"
    rows: list[tuple[str, str, tuple[str, ...], dict[str, float], str]] = [
        ("flickr-plain", "flickr30k", (), {by_text: 0.5882, by_image: 0.7930}, ""),
        ("flickr-dn", "flickr30k", ("distribution_norm:lam=0.5,bank_size=1000",), {by_text: 0.6206}, lam),
        ("flickr-dualis", "flickr30k", ("dual_is",), {by_text: 0.6526, by_image: 0.8120}, "sharpness tuned there"),
        ("flickr-nnn-text", "flickr30k", ("top_k_mean:alpha=0.75,k=128",), {by_text: 0.6460}, ""),
        ("flickr-nnn-image", "flickr30k", ("top_k_mean:alpha=0.75,k=16",), {by_image: 0.8120}, ""),
        ("coco-plain", "coco", (), {by_text: 0.3043, by_image: 0.5002}, ""),
        ("coco-dn", "coco", ("distribution_norm:lam=0.5,bank_size=1000",), {by_text: 0.3247}, lam),
        ("coco-dualis", "coco", ("dual_is",), {by_text: 0.3782, by_image: 0.5320}, "sharpness tuned there"),
        ("coco-nnn-text", "coco", ("top_k_mean:alpha=0.75,k=256",), {by_text: 0.3753}, ""),
        ("coco-nnn-image", "coco", ("top_k_mean:alpha=0.75,k=128",), {by_image: 0.5366}, ""),
        ("coco-qb-norm", "coco", ("qb_norm:beta=20",), {by_text: 0.348, **more}, "plain there: 30.3, 56.1, 67.1"),
    ]
    return [
        AnchorRow(
            f"hubness/{name}", "retrieval", B32, folder, addons, published, 0.02 if note else 0.01,
            note or "which fifth of the training pairs is the bank is not published",
            bank_images=None, num_images=5000 if folder == "coco" else 1000,
        )
        for name, folder, addons, published, note in rows
    ]  # fmt: skip


def _dense() -> list[AnchorRow]:
    """Section 5.3's rows, ViT-B/16, without post-processing."""
    columns = ("voc21", "context60", "coco_object", "voc20", "cityscapes", "context59", "ade20k", "coco_stuff")
    numbers = {
        "maskclip": "43.4 23.2 20.6 74.9 24.9 26.4 11.9 16.7",
        "clearclip": "51.8 32.6 33.0 80.9 30.0 35.9 16.7 23.9",
    }
    # Of the classes with background: ClearCLIP's thresholds of the probability.
    threshold = {"voc21": 0.5, "context60": 0.15, "coco_object": 0.4}
    return [
        AnchorRow(
            f"dense/{method}-{data}", "segmentation", B16, data, (method,), {"mean_iou": round(float(value) / 100, 4)},
            0.02, "window of 224 at short side 336 (ClearCLIP: 448); name lists of classes are the folder's own",
            background="class" if data in threshold else "ignored", threshold=threshold.get(data, 0.0),
            logit_scale=50.0,
        )
        for method, values in numbers.items()
        for data, value in zip(columns, values.split(), strict=True)
    ]  # fmt: skip


ANCHORS: dict[str, AnchorRow] = {
    row.name: row for row in (*_dn_retrieval(), *_dn_classification(), *_hubness(), *_dense())
}
