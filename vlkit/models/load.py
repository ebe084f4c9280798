"""One name for every model: `open_clip:ViT-B-32/laion2b_s34b_b79k`, `run:runs/demo`, `local-dir:path`."""

import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from vlkit.errors import CheckpointError, ModelError, did_you_mean
from vlkit.models import catalogue
from vlkit.models.saved import (
    CONFIG,
    LAYOUTS,
    MANIFEST,
    RECORD,
    WEIGHTS,
    check_manifest,
    layout_in,
    load_exact,
    model_folder_of_run,
    read_json,
)
from vlkit.models.weight_files import weight_names

if TYPE_CHECKING:
    from vlkit.models.dual_encoder import DualEncoder
    from vlkit.models.embedder import Decode, Embedder
    from vlkit.models.open_clip_encoder import OpenClipEncoder

_log = logging.getLogger(__name__)

# Of the weights, see `vlkit.models.bf16`: it changes a feature by a cosine of 0.99999, and is about twice as fast where
# the processor has it.
Precision = Literal["auto", "fp32", "bf16"]


def load_encoder(name: str, device: str = "cpu", *, image_size: int | None = None) -> "DualEncoder":
    """An encoder with trained weights, in eval mode.

    Args:
        name: `open_clip:ARCHITECTURE/TAG`, the same with `@FILE` for weights that are on disk already,
            `run:FOLDER` (the `out` folder of a training run), `local-dir:FOLDER` (open_clip's layout),
            `hf:ORG/NAME` (CLIP and SigLIP of transformers, from the hub or a folder) or `timm:NAME` (images only).
        device: "auto" (cuda, mps, cpu), or a torch device.
        image_size: side of the square input in pixels, to take trained weights on to another resolution;
            default what they were trained with.

    Raises:
        ModelError: an unknown name, weights that cannot be had, a device this machine lacks.
        CheckpointError: a folder or file that is missing, cut or of another architecture.
    """
    scheme, _, rest = name.partition(":")
    if scheme not in SCHEMES or not rest:
        raise ModelError(_unknown_scheme(name))
    target = pick_device(device)
    encoder = SCHEMES[scheme](rest, image_size)
    return encoder.to(target).eval()


def load_embedder(
    name: str, device: str = "auto", *, precision: Precision = "fp32", decode: "Decode" = "fast"
) -> "Embedder":
    """Images and texts in, vectors out: the model `name` (see `load_encoder`) ready for use.

    Args:
        name: as for `load_encoder`.
        device: "auto" (cuda, mps, cpu), or a torch device.
        precision: of the weights; "auto" is bf16 for transformer towers where the processor multiplies it in
            hardware, else fp32.
        decode: how images are read, see `vlkit.models.embedder.Decode`.

    Raises:
        ModelError: as `load_encoder`; or an unknown precision.
    """
    from vlkit.models.bf16 import to_bf16
    from vlkit.models.embedder import Embedder

    encoder = load_encoder(name, device)
    if _is_wanted_bf16(encoder, precision):
        to_bf16(encoder)
    return Embedder(encoder=encoder, name=name, decode=decode)


def in_auto_precision(embedder: "Embedder") -> "Embedder":
    """The same model in the precision that "auto" chooses; in bf16 a copy that shares what is not rounded."""
    from vlkit.models.bf16 import bf16_copy

    return (
        replace(embedder, encoder=bf16_copy(embedder.encoder))
        if _is_wanted_bf16(embedder.encoder, "auto")
        else embedder
    )


def pick_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What "auto" means on a device; the others as they are.

    Raises:
        ModelError: an unknown word.
    """
    if precision == "auto":
        return "bf16" if _multiplies_bf16(device) else "fp32"
    if precision not in ("fp32", "bf16"):
        raise ModelError(f"Unknown precision {precision!r}. {did_you_mean(precision, ['auto', 'fp32', 'bf16'])}")
    return precision


def _is_wanted_bf16(encoder: "DualEncoder", precision: Precision) -> bool:
    if pick_precision(precision, encoder.device) == "fp32":
        return False
    from vlkit.models.bf16 import gains_by_bf16

    return precision == "bf16" or gains_by_bf16(encoder)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is the first of cuda, mps, cpu that works here.

    Raises:
        ModelError: no such device on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, works in available.items() if works))
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"Unknown device {device!r}. {did_you_mean(device, ['auto', *available])}") from error
    beyond = target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count()
    if not available.get(target.type, True) or beyond:
        usable = ", ".join(kind for kind, works in available.items() if works)
        raise ModelError(f"Device {device!r} is not available on this machine. Usable: auto, {usable}.")
    return target


def _from_open_clip(rest: str, image_size: int | None) -> "OpenClipEncoder":
    name_and_tag, at, file = rest.partition("@")
    architecture, _, tag = name_and_tag.partition("/")
    catalogue.architecture(architecture)
    if not tag:
        raise ModelError(_no_tag(architecture, file if at else None))
    record = catalogue.pretrained_record(architecture, tag)
    path = Path(file).expanduser() if at else _download(architecture, tag, record)
    if not path.is_file():
        raise CheckpointError(f"No file of weights {path}.")

    from vlkit.models.architecture import published_architecture
    from vlkit.models.open_clip_encoder import construct, load_published

    names = weight_names(path)  # before the model is built: a bad file fails at once
    encoder = construct(published_architecture(architecture, tag).with_changes(image_size=image_size))
    load_published(encoder, path, names, where=str(path) if at else f"open_clip:{name_and_tag}")
    return encoder


def _from_run(rest: str, image_size: int | None) -> "DualEncoder":
    return _from_folder(str(model_folder_of_run(rest)), image_size)


def _from_folder(rest: str, image_size: int | None) -> "DualEncoder":
    """A model folder: exactly as saved when it is ours, by open_clip's rules when it is not."""
    folder = Path(rest).expanduser()
    layout = layout_in(folder)
    if layout is None:
        raise CheckpointError(
            f"{folder} is no model folder: it has no {CONFIG}. Expected open_clip's layout ({CONFIG} and {WEIGHTS}); "
            f"for the folder of a training run use run:{folder}, for one that transformers wrote hf:{folder}."
        )
    problem = check_manifest(folder) if (folder / MANIFEST).is_file() else None
    if problem:
        raise CheckpointError(f"The model folder {folder} is damaged: {problem}. Copy or save it again.")

    if layout is LAYOUTS["transformers"]:
        from vlkit.models.hf_encoder import load_saved_hf

        return load_saved_hf(folder, image_size)
    from vlkit.models.architecture import resolve_architecture
    from vlkit.models.open_clip_encoder import construct, load_published

    config = read_json(folder / CONFIG)
    model_cfg = _table(config, "model_cfg", folder)
    resolved = resolve_architecture(model_cfg, config.get("preprocess_cfg"), name=_name_of(folder))
    encoder = construct(resolved.with_changes(image_size=image_size), folder)
    weights = _weights_in(folder)
    if (folder / RECORD).is_file() and image_size in (None, resolved.image_size):
        load_exact(encoder, weights)
    else:
        load_published(encoder, weights, weight_names(weights), where=str(weights))
    return encoder


def _from_hf(rest: str, image_size: int | None) -> "DualEncoder":
    from vlkit.models.hf_encoder import load_hf

    return load_hf(rest, image_size)


def _from_timm(rest: str, image_size: int | None) -> "DualEncoder":
    from vlkit.models.timm_encoder import load_timm

    return load_timm(rest, image_size)


SCHEMES: dict[str, Callable[[str, int | None], "DualEncoder"]] = {
    "open_clip": _from_open_clip,
    "run": _from_run,
    "local-dir": _from_folder,
    "hf": _from_hf,
    "timm": _from_timm,
}


def _download(architecture: str, tag: str, record: dict[str, Any]) -> Path:
    """Published weights, from the cache or the network."""
    place = catalogue.weights_file(record)
    if place.on_disk is not None:
        return place.on_disk
    _log.info("Fetching %s from %s", " or ".join(place.file_names), place.origin)
    try:
        _require_network(place.origin)
        return Path(catalogue.open_clip_part("pretrained").download_pretrained(record))
    except Exception as error:  # the hub's client, urllib and open_clip each raise their own types
        raise ModelError(
            f"The weights of open_clip:{architecture}/{tag} are not on this machine and cannot be fetched ({error}). "
            f"Without a network, get {' or '.join(place.file_names)} of {place.origin} on another machine and name "
            f"the file: open_clip:{architecture}/{tag}@/path/to/{place.file_names[0]}; "
            f"or copy that repository's folder into the cache {place.cache}."
        ) from error


def _require_network(address: str) -> None:
    """Fail at once without a network: the hub's client retries for most of a minute, for each file it might be."""
    host = urlsplit(address).hostname
    if host and not getproxies():
        socket.getaddrinfo(host, 443)


def _weights_in(folder: Path) -> Path:
    names = (WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"No weights in {folder}. Expected {WEIGHTS}.")


def _name_of(folder: Path) -> str:
    if (folder / RECORD).is_file():
        return str(read_json(folder / RECORD).get("architecture", folder.name))
    return folder.name


def _table(config: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / CONFIG} has no {key}. Expected model_cfg and preprocess_cfg.")
    return value


def _no_tag(architecture: str, file: str | None) -> str:
    tags = ", ".join(catalogue.pretrained_tags(architecture)) or "none published"
    if file is not None:
        return (
            f"open_clip:{architecture}@{file} does not say how the weights were trained: a bare file records neither "
            f"preprocessing nor activation. Name the tag it comes from (open_clip:{architecture}/TAG@{file}; tags: "
            f"{tags}), or put it beside an {CONFIG} that states them and use local-dir:FOLDER."
        )
    return f"open_clip:{architecture} names no weights. Write open_clip:{architecture}/TAG with one of: {tags}."


def _unknown_scheme(name: str) -> str:
    valid = "Valid: open_clip:ARCHITECTURE/TAG, hf:ORG/NAME, timm:NAME (images only), run:FOLDER, local-dir:FOLDER."
    scheme, colon, rest = name.partition(":")
    if name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        kind = "local-dir" if layout_in(folder) else "hf" if (folder / "config.json").is_file() else "run"
        return f"Model {name!r} is a folder: write {kind}:{name}. {valid}"
    if colon and not rest and scheme in SCHEMES:
        return f"Model {name!r} ends after the colon. {valid}"
    if colon:
        return f"Model {name!r} begins with an unknown kind {scheme!r}. {valid}"
    architecture, _, tag = name.partition("/")
    if architecture in catalogue.architectures():
        return f"Model {name!r} lacks its kind: write open_clip:{architecture}/{tag or 'TAG'}. {valid}"
    return f"Model {name!r} lacks its kind. {valid} `vlkit models` lists architectures and tags."
