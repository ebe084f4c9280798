"""CoOp's data sets as they lie on people's disks, and the protocols over them that papers report.

    preset = PRESETS["coop11-base-to-new"]
    found = read_coop_sets("DATA", preset)         # those that are there; found.missing names the others
    Grid(methods=("zero-shot",), sets=found.sets, protocol=preset.protocol)

Below one folder, as CoOp's DATASETS.md lays them out: caltech-101/split_zhou_Caltech101.json with its images beside it,
and so on. Split, order of the classes, their names and the template of each set are CoOp's.

Source: Zhou et al. 2022, "Learning to Prompt for Vision-Language Models", arXiv:2109.01134, and the authors' code,
commit ff61507 (datasets/*.py, trainers/zsclip.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from eval.prompt_grid import PromptProtocol, PromptSet
from vlkit.addons.class_names import parse_class
from vlkit.data.records import ImageRef, Record
from vlkit.data.sources import read_source
from vlkit.data.sources.annotated import read_lines
from vlkit.errors import DataError

PHOTO = "a photo of a {}."


class Labelled(NamedTuple):
    """What a set's files say."""

    class_names: tuple[str, ...]
    records: list[Record]


class CoopSet(NamedTuple):
    """One data set."""

    name: str
    folder: str  # below the root
    template: str
    read: Callable[[Path], Labelled]
    distinct: bool = True  # no two classes share a name


class Preset(NamedTuple):
    """A protocol over several sets; in a transfer the first is learned."""

    title: str
    protocol: PromptProtocol
    sets: tuple[CoopSet, ...]


class Found(NamedTuple):
    """What is there of a preset."""

    sets: tuple[PromptSet, ...]
    missing: tuple[str, ...]  # folders


def read_coop_sets(root: str | Path, preset: Preset) -> Found:
    """The sets of a preset below a folder.

    Raises:
        DataError: none is there; a transfer without the set that is learned; or one that is not as it should be.
    """
    root = Path(root)
    there = [one for one in preset.sets if (root / one.folder).is_dir()]
    short = preset.protocol == "transfer" and (preset.sets[0] not in there or len(there) < 2)
    if not there or short:
        raise DataError(
            f"{root} holds {', '.join(one.folder for one in there) or 'none'} of the folders of {preset.title}: "
            f"{', '.join(one.folder for one in preset.sets)}."
            + (f" {preset.sets[0].folder} is learned, and at least one other tested." if short else "")
        )
    missing = tuple(one.folder for one in preset.sets if one not in there)
    return Found(tuple(_read(one, root) for one in there), missing)


def _read(one: CoopSet, root: Path) -> PromptSet:
    names, records = one.read(root / one.folder)
    classes = tuple(parse_class(name.replace("_", " ")) for name in names)
    return PromptSet(one.name, classes, tuple(records), one.template, one.distinct)


def _split_file(folder: Path) -> Labelled:
    source = read_source(str(folder), format="coop")
    return Labelled(source.class_names, list(source.records))


def _aircraft(folder: Path) -> Labelled:
    """variants.txt names the classes in order; images_variant_SPLIT.txt has an image and its class a line."""
    names = tuple(line for line in read_lines(folder / "variants.txt") if line)
    number = {name: place for place, name in enumerate(names)}
    records = []
    for split in ("train", "val", "test"):
        for line in filter(None, read_lines(folder / f"images_variant_{split}.txt")):
            image, _, name = line.partition(" ")
            if name not in number:
                raise DataError(f"{folder}/images_variant_{split}.txt: {line!r} names no class of variants.txt.")
            path = folder / "images" / f"{image}.jpg"
            records.append(Record(path.name, ImageRef(path=str(path)), label=number[name], split=split))
    return Labelled(names, records)


def _imagenet(folder: Path) -> Labelled:
    """images/train and images/val in class folders; the validation images test, as in CoOp."""
    train, test = (read_source(str(folder / "images" / part), format="folder") for part in ("train", "val"))
    if train.class_names != test.class_names:
        raise DataError(f"{folder}/images: train and val hold other class folders.")
    records = [replace(one, split="train") for one in train.records]
    records += [replace(one, split="test") for one in test.records]
    return Labelled(_imagenet_names(folder, train.class_names), records)


def _shift(inner: str) -> Callable[[Path], Labelled]:
    """ImageNet's classes in other pictures: folders of WordNet ids, or (V2) of numbers that count all classes."""

    def read(folder: Path) -> Labelled:
        source = read_source(str(folder / inner), format="folder")
        records, ids = [replace(one, split="test") for one in source.records], source.class_names
        base = folder.parent / "imagenet"
        if not all(one.isdecimal() for one in ids):
            return Labelled(_imagenet_names(base, ids), records)
        names = _imagenet_names(base)
        beyond = [one for one in ids if int(one) >= len(names)]
        if beyond:
            raise DataError(f"{folder / inner} has class {beyond[0]}, but classnames.txt names {len(names)} classes.")
        return Labelled(names, [replace(one, label=int(ids[one.label or 0])) for one in records])

    return read


def _imagenet_names(folder: Path, ids: Sequence[str] | None = None) -> tuple[str, ...]:
    """Of these WordNet ids, or of all in sorted order, by CoOp's classnames.txt (`n01440764 tench` a line)."""
    file = folder / "classnames.txt"
    pairs = [line.partition(" ") for line in read_lines(file) if line.strip()]
    names = {wnid: name.strip() for wnid, _, name in pairs}
    unknown = [one for one in ids or () if one not in names]
    if unknown:
        raise DataError(f"{file} names no class {unknown[0]}; expected CoOp's file, `WNID name` a line.")
    return tuple(names[one] for one in (sorted(names) if ids is None else ids))


# Two pairs of ImageNet's classes go by one name in CoOp's file.
_IMAGENET = CoopSet("imagenet", "imagenet", PHOTO, _imagenet, distinct=False)
_TEN = (
    CoopSet("caltech101", "caltech-101", PHOTO, _split_file),
    CoopSet("oxford-pets", "oxford_pets", "a photo of a {}, a type of pet.", _split_file),
    CoopSet("stanford-cars", "stanford_cars", PHOTO, _split_file),
    CoopSet("flowers102", "oxford_flowers", "a photo of a {}, a type of flower.", _split_file),
    CoopSet("food101", "food-101", "a photo of {}, a type of food.", _split_file),
    CoopSet("fgvc-aircraft", "fgvc_aircraft", "a photo of a {}, a type of aircraft.", _aircraft),
    CoopSet("sun397", "sun397", PHOTO, _split_file),
    CoopSet("dtd", "dtd", "{} texture.", _split_file),
    CoopSet("eurosat", "eurosat", "a centered satellite photo of {}.", _split_file),
    CoopSet("ucf101", "ucf101", "a photo of a person doing {}.", _split_file),
)
_SHIFTS = tuple(
    CoopSet(name, folder, PHOTO, _shift(inner), distinct=False)
    for name, folder, inner in (
        ("imagenet-v2", "imagenetv2", "imagenetv2-matched-frequency-format-val"),
        ("imagenet-sketch", "imagenet-sketch", "images"),
        ("imagenet-a", "imagenet-adversarial", "imagenet-a"),
        ("imagenet-r", "imagenet-rendition", "imagenet-r"),
    )
)
PRESETS = {
    "coop11-base-to-new": Preset("CoOp's eleven sets, base to new", "base-to-new", (_IMAGENET, *_TEN)),
    "coop11-few-shot": Preset("CoOp's eleven sets, all classes", "few-shot", (_IMAGENET, *_TEN)),
    "coop-cross-dataset": Preset("ImageNet to CoOp's other ten sets", "transfer", (_IMAGENET, *_TEN)),
    "coop-domain-shift": Preset("ImageNet to V2, Sketch, A and R", "transfer", (_IMAGENET, *_SHIFTS)),
}
