"""What is known of a model without loading it, remembered by its files.

Hashing the weights of a large model takes seconds, and importing the library it is built on ten more. A card holds
what commands need beside features: whoever finds all features in the cache never loads the model.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from vlkit import __version__
from vlkit.data.atomic import atomic_file
from vlkit.errors import CheckpointError, DataError
from vlkit.features.cache_folder import cannot_write
from vlkit.features.feature_set import Fingerprint, library_versions
from vlkit.features.stamps import digest, folder_stamp
from vlkit.models import catalogue
from vlkit.models.embedder import Decode, Embedder
from vlkit.models.saved import read_json

# How `vlkit.data.images` reads images for embedding; to be changed when its pixels change.
DECODERS: dict[Decode, str] = {
    "fast": "vlkit 1, fast, EXIF applied",
    "reference": "vlkit 1, reference (pillow), EXIF ignored",
}


@dataclass(frozen=True)
class ModelCard:
    """What decides over features of a model, and how its scores become probabilities."""

    name: str
    identity: str  # as `Embedder.identity`
    weights: str  # hash
    architecture: str  # hash
    preprocess: str  # as JSON
    tokenizer: str
    embed_dim: int
    logit_scale: float
    logit_bias: float | None
    family: Literal["softmax", "sigmoid"]
    decode: Decode
    precision: str  # of the weights: fp32, bf16

    @property
    def decoder(self) -> str:
        """How images are read, in words."""
        return DECODERS[self.decode]

    @property
    def fingerprint(self) -> Fingerprint:
        """Of features this model makes."""
        names = ("weights", "architecture", "preprocess", "tokenizer")
        identity = {name: str(getattr(self, name)) for name in names} | {"decoder": self.decoder}
        return Fingerprint(identity, self.name, library_versions())


def card_of(embedder: Embedder) -> ModelCard:
    """The card of a loaded model; hashes its weights."""
    record = embedder.encoder.record()
    return ModelCard(
        name=embedder.name,
        identity=embedder.identity,
        weights=embedder.weights_hash,
        architecture=digest(json.dumps(record.get("model_cfg"), sort_keys=True)).hex(),
        preprocess=json.dumps(record.get("preprocess_cfg"), sort_keys=True),
        tokenizer=str(record.get("tokenizer")),
        embed_dim=embedder.embed_dim,
        logit_scale=embedder.logit_scale,
        logit_bias=embedder.logit_bias,
        family=embedder.family,
        decode=embedder.decode,
        precision=_precision_of(embedder),
    )


def remembered_card(name: str, folder: Path, load: Callable[[], Embedder], variant: str = "") -> ModelCard:
    """The card of a named model; the model is loaded only if its files are not those of the card in `folder`.

    Args:
        name: of the model.
        folder: of the cards.
        load: gives the model.
        variant: what of the way it is loaded decides over its features: precision and decoder.
    """
    stamp = _stamp(name)
    place = None if stamp is None else folder / f"{digest(name, stamp, variant, *_versions()).hex()}.json"
    if place is not None and place.is_file():
        try:
            return ModelCard(**read_json(place))
        except (CheckpointError, TypeError):  # cut by a full disk, or of another version: made anew
            pass
    card = card_of(load())
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as file:
                file.write(json.dumps(asdict(card), indent=2).encode())
        except OSError as error:
            raise DataError(cannot_write(folder, error)) from error
    return card


def _precision_of(embedder: Embedder) -> str:
    kinds = [tensor.dtype for tensor in embedder.encoder.weights().values() if tensor.is_floating_point()]
    return "bf16" if torch.bfloat16 in kinds else "fp16" if torch.float16 in kinds else "fp32"


def _stamp(name: str) -> bytes | None:
    """16 bytes over the state of the files a model is loaded from; None where they are not known."""
    scheme, _, rest = name.partition(":")
    stamp = _STAMPS.get(scheme)
    return stamp(rest) if stamp and rest else None


def _of_folder(rest: str) -> bytes | None:
    folder = Path(rest).expanduser()
    return folder_stamp(folder) if folder.is_dir() else None


def _of_run(rest: str) -> bytes | None:
    run = Path(rest).expanduser()
    parts = [run / name for name in ("model", "checkpoints", "open_clip_config.json") if (run / name).exists()]
    if (run / "open_clip_config.json").is_file():  # a model folder itself
        return folder_stamp(run)
    return folder_stamp(*parts) if parts else None


def _of_open_clip(rest: str) -> bytes | None:
    name_and_tag, at, file = rest.partition("@")
    if at:
        return folder_stamp(Path(file).expanduser()) if Path(file).expanduser().is_file() else None
    architecture, _, tag = name_and_tag.partition("/")
    if not tag:
        return None
    place = catalogue.weights_file(catalogue.pretrained_record(architecture, tag))
    return None if place.on_disk is None else folder_stamp(place.on_disk)


def _of_timm(rest: str) -> bytes | None:
    file = Path(rest.partition("@")[2]).expanduser()
    return folder_stamp(file) if "@" in rest and file.is_file() else None


_STAMPS: dict[str, Callable[[str], bytes | None]] = {
    "open_clip": _of_open_clip,
    "run": _of_run,
    "local-dir": _of_folder,
    "hf": _of_folder,  # of the hub: not known without its client, so the model is loaded
    "timm": _of_timm,
}


@cache
def _versions() -> tuple[str, ...]:
    found = [__version__]
    for package in ("open_clip_torch", "transformers", "timm"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("absent")
    return tuple(found)
