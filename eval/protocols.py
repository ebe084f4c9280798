"""Protocols: named presets that fix every choice that moves a number.

    vlkit protocols
    vlkit eval suite --models run:runs/f8k --protocols flickr8k-test,caltech101 --data DATA --out results/

A protocol fixes split, caption rule, class names, templates, resize and metric; how the weights are stored and images
decoded is the caller's, fp32 and the reference decode unless asked otherwise. All of it stands in the result under
`protocol`, with a hash, the fingerprint: numbers of equal fingerprint may be compared.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from eval.published import has_published
from vlkit.addons.class_weights.templates import load_templates, templates_hash
from vlkit.errors import ConfigError, did_you_mean

FROM_DATA = "from the data"
RESIZE = "the model's own: size, filter, crop and mean of its weights"

_CIFAR_KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_CALTECH = (
    "a photo of {a}", "a painting of {a}", "{a:plastic}", "a sculpture of {a}", "a sketch of {a}", "a tattoo of {a}",
    "{a:toy}", "a rendition of {a}", "{a:embroidered}", "a cartoon {}", "{a} in a video game", "{a:plushie}",
    "{a:origami}", "art of {a}", "graffiti of {a}", "a drawing of {a}", "a doodle of {a}",
)  # fmt: skip


def _cifar_templates() -> tuple[str, ...]:
    """The 18 of OpenAI's prompts for CIFAR-10 and CIFAR-100."""
    return tuple(
        [f"a {kind}photo of {article} {{}}." for article in ("a", "the") for kind in _CIFAR_KINDS]
        + [f"a photo of {article} {size} {{}}." for article in ("a", "the") for size in ("small", "big")]
    )


def _caltech_templates() -> tuple[str, ...]:
    """The 34 of OpenAI's prompts for Caltech101."""
    out = []
    for article in ("a", "the"):
        for pattern in _CALTECH:
            text = pattern.replace("a cartoon {}", f"{article} cartoon {{}}").replace("{a}", f"{article} {{}}")
            if "{a:" in text:  # "a plastic {}", "the plastic {}"
                before, _, rest = text.partition("{a:")
                word, _, after = rest.partition("}")
                text = f"{before}{article} {word} {{}}{after}"
            out.append(text + ".")
    return tuple(out)


# Sets of templates that belong to one data set; the ImageNet ones are open_clip's.
# Source: OpenAI CLIP, data/prompts.md.
TEMPLATES = {"cifar18": _cifar_templates, "caltech34": _caltech_templates}


@dataclass(frozen=True)
class Protocol:
    """One preset.

    Attributes:
        name: on the command line.
        title: what is measured, in a few words.
        task: which evaluator.
        folders: names of the data's folder below `--data`, in order of preference.
        metric: the one a table shows.
        split: which part of the data; None for all.
        format: how it is read; None finds out.
        captions: how many captions of each image, in their order; None for all.
        folds: parts of equal size whose metrics are averaged, in the order of the split.
        num_images: images that must be there; None takes what is there.
        num_classes: classes that must be there.
        templates: a set's name, or those that come with the data.
        class_names: "folder" (`_` as space), "imagenet" (open_clip's, in sorted folder order), or from the data.
        renamed: folders whose class goes by another name.
        excluded: folders that are left out where they are there.
        half: CoOp's base-to-new protocol: the first or the second half of the classes, each among its own half.
    """

    name: str
    title: str
    task: Literal["retrieval", "classification", "multi-label"]
    folders: tuple[str, ...]
    metric: str
    split: str | None = None
    format: str | None = None
    captions: int | None = None
    folds: int = 1
    num_images: int | None = None
    num_classes: int | None = None
    templates: str = "imagenet80"
    class_names: Literal["folder", "imagenet", "from the data"] = "folder"
    renamed: tuple[tuple[str, str], ...] = ()
    excluded: tuple[str, ...] = ()
    half: Literal["base", "new"] | None = None

    def prompts(self) -> tuple[str, ...]:
        """Its templates; empty where the data bring them."""
        if self.task == "retrieval":
            return ("{}",)
        if self.templates == FROM_DATA:
            return ()
        return TEMPLATES[self.templates]() if self.templates in TEMPLATES else load_templates(self.templates)

    def settings(self, precision: str, decoder: str) -> dict[str, Any]:
        """Everything that decides comparability, with the fingerprint; goes into a result's `protocol`.

        Args:
            precision: of the model's weights.
            decoder: how images are read, in words.
        """
        prompts = self.prompts()
        found: dict[str, Any] = {
            "name": self.name,
            "task": self.task,
            "split": self.split or "all",
            "metric": self.metric,
            "resize": RESIZE,
            "precision": precision,
            "decoder": decoder,
        }
        if self.task == "retrieval":
            found["captions"] = "all of each image" if self.captions is None else f"the first {self.captions} of each"
            found["folds"] = self.folds
        else:
            found["templates"] = self.templates
            found["num_templates"] = len(prompts)
            found["templates_hash"] = templates_hash(prompts) if prompts else FROM_DATA
            found["class_names"] = self._naming()
            found["half"] = self.half or "all classes"
        found["fingerprint"] = fingerprint(found)
        return found

    @property
    def published(self) -> bool:
        """Whether numbers of known weights can be compared."""
        return has_published(self.name)

    def _naming(self) -> str:
        renamed = "".join(f"; {old} is {new}" for old, new in self.renamed)
        without = f"; without {', '.join(self.excluded)}" if self.excluded else ""
        how = {"folder": "folder name, _ as space", "imagenet": "open_clip's ImageNet names"}
        return how.get(self.class_names, self.class_names) + renamed + without


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits, equal for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


_COCO = ("coco", "COCO", "mscoco")
_CALTECH101 = Protocol(
    "caltech101", "Caltech101, 100 classes, OpenAI's 34 templates", "classification", ("caltech101",),
    "mean_per_class_recall", templates="caltech34", num_classes=100,
    renamed=(("Faces", "face"), ("airplanes", "airplane"), ("Leopards", "leopard"), ("Motorbikes", "motorbike")),
    excluded=("Faces_easy", "BACKGROUND_Google"),
)  # fmt: skip


def _half_of_caltech(half: Literal["base", "new"]) -> Protocol:
    return replace(
        _CALTECH101,
        name=f"caltech101-{half}",
        title=f"CoOp's {half} classes of Caltech101, zero-shot: the anchor of base-to-new",
        metric="accuracy@1",
        templates="photo",
        half=half,
    )


_ROWS = (
    Protocol(
        "coco5k-karpathy", "COCO, Karpathy's 5,000 test images, all captions", "retrieval", _COCO,
        "mean_recall@1", split="test", num_images=5000,
    ),
    Protocol(
        "coco5k-karpathy-first5", "the same with the first five captions of each image", "retrieval", _COCO,
        "mean_recall@1", split="test", num_images=5000, captions=5,
    ),
    Protocol(
        "coco1k-folds", "COCO, mean over the five folds of 1,000 test images", "retrieval", _COCO,
        "mean_recall@1", split="test", num_images=5000, folds=5,
    ),
    Protocol(
        "flickr1k", "Flickr30k, Karpathy's 1,000 test images", "retrieval", ("flickr30k", "Flickr30k"),
        "mean_recall@1", split="test", num_images=1000,
    ),
    Protocol(
        "flickr8k-test", "Flickr8k, the official 1,000 test images", "retrieval", ("flickr8k", "Flickr8k"),
        "mean_recall@1", split="test", num_images=1000,
    ),
    Protocol(
        "flickr8k-dev", "Flickr8k, the official 1,000 dev images: to choose on", "retrieval", ("flickr8k", "Flickr8k"),
        "mean_recall@1", split="val", num_images=1000,
    ),
    Protocol(
        "imagenet-80", "ImageNet validation, 80 templates", "classification", ("imagenet/val", "imagenet"),
        "accuracy@1", num_images=50_000, num_classes=1000, class_names="imagenet",
    ),
    Protocol(
        "imagenet-1", "ImageNet validation, `a photo of a {}.`", "classification", ("imagenet/val", "imagenet"),
        "accuracy@1", num_images=50_000, num_classes=1000, class_names="imagenet", templates="photo",
    ),
    Protocol(
        "imagenet-v2-80", "ImageNet-V2 matched frequency, 80 templates", "classification",
        ("imagenetv2-matched-frequency-format-val", "imagenet-v2", "imagenetv2"),
        "accuracy@1", num_images=10_000, num_classes=1000, class_names="imagenet",
    ),
    Protocol(
        "cifar10-18", "CIFAR-10 test images, OpenAI's 18 templates", "classification",
        ("cifar10_test", "cifar10/test", "cifar10"), "accuracy@1", num_classes=10, templates="cifar18",
    ),
    _CALTECH101,
    _half_of_caltech("base"),
    _half_of_caltech("new"),
)  # fmt: skip

PROTOCOLS: dict[str, Protocol] = {row.name: row for row in _ROWS}


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"Unknown protocol {name!r}. {did_you_mean(name, PROTOCOLS)} `vlkit protocols` lists them.")
    return PROTOCOLS[name]
