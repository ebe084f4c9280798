"""The cache of features: every image and every text is encoded once by each model.

    cache = FeatureCache.default()
    with cache.images(card) as store: ...

It lies in `VLKIT_CACHE`, else in the user's cache folder. Images are known by path, size and time of change, texts by
their words; both lie under the identity of the encoder. Nothing is ever thrown out but by `clear`.

    models/KEY.json                     cards of models, see `model_card.py`
    images/IDENTITY/{about.json,*.npy}  rows (key, features, norm), see `vectors.py`
    texts/IDENTITY/{about.json,*.npy}   rows (key, features)
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError
from vlkit.features.cache_folder import cache_folder, cannot_write
from vlkit.features.model_card import ModelCard
from vlkit.features.stamps import digest
from vlkit.features.vectors import VectorStore

Kind = Literal["images", "texts"]
KINDS: tuple[Kind, ...] = ("images", "texts")


class CacheEntry(NamedTuple):
    """What the cache holds of one model."""

    model: str  # the name it was first loaded by
    identity: str
    kind: Kind
    decoder: str  # how the images were read; empty for texts
    num_items: int  # rows; one stands twice when two processes added it at once
    num_bytes: int
    folder: Path


@dataclass(frozen=True)
class FeatureCache:
    """The cache in one folder, which is made when something is written."""

    folder: Path

    @classmethod
    def default(cls) -> "FeatureCache":
        """In `VLKIT_CACHE`, else below the user's cache folder."""
        return cls(cache_folder())

    @property
    def cards(self) -> Path:
        """Folder of the cards of models."""
        return self.folder / "models"

    def images(self, card: ModelCard) -> VectorStore:
        """Rows of D features and their norm; keys from `Stamper.key`."""
        return self._store("images", card, card.embed_dim + 1)

    def texts(self, card: ModelCard) -> VectorStore:
        """Rows of D features; keys from `text_key`."""
        return self._store("texts", card, card.embed_dim)

    def entries(self) -> list[CacheEntry]:
        """What is there, by model."""
        found = [self._entry(kind, path) for kind in KINDS for path in (self.folder / kind).glob("*") if path.is_dir()]
        return sorted(found)

    def clear(self, model: str | None = None) -> int:
        """Remove everything, or the features of one model by its name or the beginning of its identity.

        Returns:
            Bytes freed.

        Raises:
            DataError: there is nothing of that model, or it cannot be removed.
        """
        entries = self.entries()
        chosen = [entry for entry in entries if model is None or _is(entry, model)]
        if model is not None and not chosen:
            known = ", ".join(sorted({entry.model for entry in entries})) or "nothing"
            raise DataError(f"The cache {self.folder} holds no features of {model!r}. It holds: {known}.")
        try:
            for entry in chosen:
                shutil.rmtree(entry.folder)
            if model is None and self.cards.is_dir():
                shutil.rmtree(self.cards)
        except FileNotFoundError:  # another process clears as well
            pass
        except OSError as error:
            raise DataError(f"Cannot clear the cache {self.folder}: {error.strerror or error}.") from error
        return sum(entry.num_bytes for entry in chosen)

    def _store(self, kind: Kind, card: ModelCard, width: int) -> VectorStore:
        folder = self.folder / kind / _folder_name(kind, card)
        about = folder / "about.json"
        if not about.is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_file(about) as file:
                    known = {"model": card.name, "identity": card.identity, "decoder": _decoder(kind, card)}
                    file.write(json.dumps(known).encode())
            except OSError as error:
                raise DataError(cannot_write(self.folder, error)) from error
        return VectorStore(folder, width)

    def _entry(self, kind: Kind, path: Path) -> CacheEntry:
        try:
            about = json.loads((path / "about.json").read_text(encoding="utf-8"))
            model, identity, decoder = str(about["model"]), str(about["identity"]), str(about.get("decoder", ""))
        except (OSError, ValueError, KeyError, TypeError):
            model, identity, decoder = "unknown", path.name, ""
        files = [file for file in path.glob("*.npy") if file.is_file()]
        rows = sum(_num_rows(file) for file in files)
        return CacheEntry(model, identity, kind, decoder, rows, sum(file.stat().st_size for file in files), path)


def text_key(text: str) -> bytes:
    """16 bytes, equal for equal texts."""
    return digest(text)


def _folder_name(kind: Kind, card: ModelCard) -> str:
    return digest(card.identity, _decoder(kind, card)).hex()


def _decoder(kind: Kind, card: ModelCard) -> str:
    return card.decoder if kind == "images" else ""


def _is(entry: CacheEntry, model: str) -> bool:
    return entry.model == model or (len(model) >= 6 and entry.identity.startswith(model))


def _num_rows(file: Path) -> int:
    try:
        return len(np.load(file, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return 0
