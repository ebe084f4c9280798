"""What open_clip offers and what of it lies on this disk, read without importing open_clip.

The architectures are JSON files and the pretrained tags one module of data inside the installed package. Importing
the package would take ten seconds, for torchvision and timm, which none of this needs.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from vlkit.errors import ModelError, did_you_mean

# A package of this name stands for open_clip's folder, but runs none of open_clip/__init__.py.
_PARTS = "_vlkit_open_clip_parts"
_HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@cache
def open_clip_folder() -> Path:
    """Where the open_clip package is installed.

    Raises:
        ModelError: it is not installed.
    """
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("open_clip is not installed. Install it: pip install open_clip_torch.")
    return Path(next(iter(spec.submodule_search_locations)))


def open_clip_part(name: str) -> ModuleType:
    """One module of open_clip, without the rest of the package when it is not imported yet.

    Args:
        name: "tokenizer", "pretrained" or "zero_shot_metadata": modules that need little of the others.
    """
    if "open_clip" in sys.modules:
        return import_module(f"open_clip.{name}")
    if _PARTS not in sys.modules:
        package = ModuleType(_PARTS)
        package.__path__ = [str(open_clip_folder())]
        sys.modules[_PARTS] = package
    try:
        return import_module(f"{_PARTS}.{name}")
    except ImportError:  # another release of open_clip, whose parts lean on each other
        return import_module(f"open_clip.{name}")


@cache
def architectures() -> Mapping[str, dict[str, Any]]:
    """Every architecture open_clip ships, by name: its configuration, not to be changed in place."""
    found = {}
    for path in sorted((open_clip_folder() / "model_configs").glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
            found[path.stem] = config
    return found


def architecture(name: str) -> dict[str, Any]:
    """A copy of the configuration of one architecture.

    Raises:
        ModelError: no such name; the message gives the nearest ones.
    """
    known = architectures()
    if name not in known:
        raise ModelError(f"No architecture {name!r} in open_clip. {did_you_mean(name, known)} See `vlkit models`.")
    return json.loads(json.dumps(known[name]))  # type: ignore[no-any-return]


def pretrained_tags(name: str) -> list[str]:
    """The tags of published weights for an architecture, empty when there are none."""
    return list(open_clip_part("pretrained").list_pretrained_tags_by_model(name))


def pretrained_record(name: str, tag: str) -> dict[str, Any]:
    """What open_clip records of published weights: where they are, mean, std, resizing, activation.

    Raises:
        ModelError: no such architecture or tag; the message gives the nearest ones.
    """
    architecture(name)
    pretrained = open_clip_part("pretrained")
    record = pretrained.get_pretrained_cfg(name, tag)
    if not record:
        raise ModelError(f"No weights {tag!r} for {name}. {did_you_mean(tag, pretrained_tags(name)) or _no_tags(name)}")
    return dict(record)


def _no_tags(name: str) -> str:
    return f"open_clip publishes none for {name}: give a file or folder of your own (see `vlkit models {name}`)."


@dataclass(frozen=True)
class WeightsFile:
    """Where published weights come from and where they lie once downloaded."""

    origin: str  # the address a person would open
    file_names: tuple[str, ...]  # any of these will do
    cache: Path  # the folder they are put in
    on_disk: Path | None


def weights_file(record: Mapping[str, Any]) -> WeightsFile:
    """Where the weights of one tag come from, and whether they are on this disk already."""
    hub_name = str(record.get("hf_hub") or "")
    if hub_name:
        return _hub_file(hub_name)
    url = str(record["url"])
    cache_folder = Path.home() / ".cache" / "clip"
    target = cache_folder / url.rsplit("/", 1)[-1]
    return WeightsFile(url, (target.name,), cache_folder, target if target.is_file() else None)


def _hub_file(hub_name: str) -> WeightsFile:
    from huggingface_hub import constants, try_to_load_from_cache

    repository, _, file_name = hub_name.rpartition("/")
    names = (file_name,) if file_name else _HUB_WEIGHTS
    if file_name.endswith((".bin", ".pth")):
        names = (file_name[:-4] + ".safetensors", file_name)
    found = (try_to_load_from_cache(repository, name) for name in names)
    on_disk = next((Path(path) for path in found if isinstance(path, str | os.PathLike)), None)
    return WeightsFile(f"{constants.ENDPOINT}/{repository}", names, Path(constants.HF_HUB_CACHE), on_disk)


@dataclass(frozen=True)
class Offer:
    """One line of the list of models: an architecture, with published weights or without."""

    name: str  # what load_encoder takes, or the architecture alone where no weights are published
    architecture: str
    tag: str | None
    embed_dim: int
    image_size: int
    context_length: int
    image_parameters: int | None  # None where open_clip needs a file from the hub to build the tower
    text_parameters: int | None
    on_disk: Path | None  # the downloaded weights


def offers(text: str = "") -> list[Offer]:
    """Every architecture with every tag of published weights, those whose name contains `text` in any case.

    Raises:
        ModelError: nothing contains it; the message gives the nearest architectures.
    """
    found = [offer for name in architectures() for offer in _offers_of(name) if text.lower() in offer.name.lower()]
    if not found:
        raise ModelError(f"No architecture or tag contains {text!r}. {did_you_mean(text, architectures())}")
    return found


def _offers_of(name: str) -> list[Offer]:
    config = architectures()[name]
    image, words = _parameter_counts().get(name, (None, None))
    size = config["vision_cfg"].get("image_size", 224)
    shared: dict[str, Any] = {
        "architecture": name,
        "embed_dim": config["embed_dim"],
        "image_size": size[0] if isinstance(size, list) else size,
        "context_length": config["text_cfg"].get("context_length", 77),
        "image_parameters": image,
        "text_parameters": words,
    }
    tags = pretrained_tags(name)
    if not tags:
        return [Offer(name=name, tag=None, on_disk=None, **shared)]
    return [
        Offer(
            name=f"open_clip:{name}/{tag}",
            tag=tag,
            on_disk=weights_file(pretrained_record(name, tag)).on_disk,
            **shared,
        )
        for tag in tags
    ]


@cache
def _parameter_counts() -> dict[str, tuple[int | None, int | None]]:
    # Counted once from the built models (tests/models/test_parameter_counts.py), since building all takes a minute.
    path = Path(__file__).with_name("parameter_counts.json")
    return {name: (image, text) for name, (image, text) in json.loads(path.read_text()).items()}
