"""Exact search for the nearest vectors: the only import of faiss.

    index = EmbeddingIndex.build(features.pooled, features.ids, fingerprint=features.fingerprint)
    scores, ids = index.search(embedder.embed_texts(["a red car"]), k=10)
    index.save("features/flickr8k/index")

Kinds: `flat` keeps 4 bytes a number and is exact; `fp16` keeps 2 and rounds each to 11 bits (scores within 1e-3).
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.errors import CheckpointError, GalleryError, did_you_mean
from vlkit.features.feature_set import Fingerprint
from vlkit.models.saved import atomic_folder

Kind = Literal["flat", "fp16"]
KINDS = ("auto", "flat", "fp16")
VECTORS, ITEMS, ABOUT = "vectors.faiss", "items.parquet", "index.json"

# Share of the memory that is free which `auto` takes for the exact kind.
_SHARE = 0.5
# Vectors given to faiss at a time, so that converting them needs little memory.
_CHUNK = 65_536


class SearchResult(NamedTuple):
    """The nearest of each query, best first."""

    scores: Tensor  # (Q,K) float32 cosine
    ids: list[list[str]]  # (Q,K)


class EmbeddingIndex:
    """Vectors with names, searched by cosine. Made by `build` or `load`.

    Attributes:
        kind: "flat" or "fp16".
        fingerprint: of the model the vectors are from, None where nobody said.
        items: one row a vector in the order they lie in; column `id`, and whatever else is known of them.
        about: what the maker wants to keep with it, as JSON types.
    """

    def __init__(
        self, vectors: Any, kind: Kind, items: pa.Table, fingerprint: Fingerprint | None, about: Mapping[str, Any]
    ) -> None:
        self.kind = kind
        self.items = items
        self.fingerprint = fingerprint
        self.about = dict(about)
        self._vectors = vectors
        self._ids: list[str] = items.column("id").to_pylist()
        assert vectors.ntotal == len(self._ids), (vectors.ntotal, len(self._ids))

    @classmethod
    def build(
        cls,
        embeddings: Tensor | NDArray[Any],
        ids: Sequence[str],
        kind: str = "auto",
        *,
        fingerprint: Fingerprint | None = None,
        items: pa.Table | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> "EmbeddingIndex":
        """An index of vectors.

        Args:
            embeddings: (N,D) unit norm, N at least 1.
            ids: (N,) names, each once.
            kind: "flat", "fp16", or "auto": flat where it takes at most half of the memory that is free, else fp16.
            fingerprint: of the model they are from; searching and adding then ask for the same.
            items: N rows of what else is known of them.
            about: kept with the index.

        Raises:
            GalleryError: no vector, NaN, not unit norm, a name twice, or an unknown kind.
        """
        if kind not in KINDS:
            raise GalleryError(f"Unknown kind of index {kind!r}. {did_you_mean(kind, KINDS)}")
        rows = _matrix(embeddings)
        if not len(rows):
            raise GalleryError("There is no vector to index.")
        chosen: Kind = _choose(rows.shape) if kind == "auto" else kind  # type: ignore[assignment]
        index = cls(_empty(rows.shape[1], chosen), chosen, _items([], None), fingerprint, about or {})
        index.add(rows, ids, items=items)
        return index

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dim(self) -> int:
        """D."""
        return int(self._vectors.d)

    @property
    def ids(self) -> tuple[str, ...]:
        """Names in the order of the vectors."""
        return tuple(self._ids)

    def search(self, queries: Tensor | NDArray[Any], k: int = 10) -> SearchResult:
        """The k nearest of each query; K is k, or the size of the gallery where that is smaller.

        Args:
            queries: (Q,D) unit norm.
            k: at least 1.

        Raises:
            GalleryError: an empty gallery, k below 1, another width, or NaN.
        """
        if k < 1:
            raise GalleryError(f"k is {k}; it must be at least 1.")
        if not len(self):
            raise GalleryError("The index is empty: everything was removed from it.")
        rows = _matrix(queries, self.dim, "queries")
        scores, places = self._vectors.search(np.ascontiguousarray(rows, np.float32), min(k, len(self)))
        return SearchResult(torch.from_numpy(scores), [[self._ids[place] for place in found] for found in places])

    def add(
        self,
        embeddings: Tensor | NDArray[Any],
        ids: Sequence[str],
        *,
        fingerprint: Fingerprint | None = None,
        items: pa.Table | None = None,
    ) -> None:
        """Add vectors.

        Args:
            embeddings: (n,D) unit norm.
            ids: (n,) names that are not there yet.
            fingerprint: of the model they are from.
            items: n rows of what else is known of them.

        Raises:
            GalleryError: another model or width, NaN, not unit norm, or a name that is there.
        """
        if fingerprint is not None and self.fingerprint is not None:
            self.fingerprint.require_same(fingerprint, "The index", "the new features")
        rows = _matrix(embeddings, self.dim)
        if len(rows) != len(ids) or (items is not None and len(items) != len(ids)):
            raise GalleryError(f"{len(rows)} vectors, but {len(ids)} ids; expected one for each.")
        there = set(self._ids)
        twice = next((name for name in ids if name in there or there.add(name)), None)  # type: ignore[func-returns-value]
        if twice is not None:
            raise GalleryError(f"{twice!r} stands twice; each vector needs a name of its own. Remove the old one.")
        for start in range(0, len(rows), _CHUNK):
            self._vectors.add(np.ascontiguousarray(rows[start : start + _CHUNK], np.float32))
        self.items = pa.concat_tables([self.items, _items(ids, items)], promote_options="default")
        self._ids += ids

    def remove(self, ids: Iterable[str]) -> int:
        """Remove vectors by name; returns how many.

        Raises:
            GalleryError: a name is not there; nothing is removed then.
        """
        wanted = set(ids)
        places = [place for place, name in enumerate(self._ids) if name in wanted]
        if len(places) < len(wanted):
            absent = sorted(wanted - set(self._ids))
            raise GalleryError(
                f"{len(absent)} of {len(wanted)} names are not in the index (first: {absent[0]!r}). "
                f"{did_you_mean(absent[0], self._ids) if len(self) <= 10_000 else ''}".rstrip()
            )
        self._vectors.remove_ids(np.array(places, np.int64))
        keep = np.ones(len(self._ids), bool)
        keep[places] = False
        self.items = self.items.filter(pa.array(keep))
        self._ids = [name for name, kept in zip(self._ids, keep, strict=True) if kept]
        return len(places)

    def vectors(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) as the index has them: rounded in an fp16 index."""
        return torch.from_numpy(self._vectors.reconstruct_n(start, stop - start))

    def save(self, folder: str | Path) -> None:
        """Write the index; an older one in this place is replaced once the new one is whole.

        Raises:
            GalleryError: it cannot be written.
        """
        fingerprint = None if self.fingerprint is None else self.fingerprint.to_json()
        about = {"kind": self.kind, "dim": self.dim, "num_items": len(self), "fingerprint": fingerprint, **self.about}
        try:
            with atomic_folder(folder) as new:
                faiss.write_index(self._vectors, str(new / VECTORS))
                pq.write_table(self.items, new / ITEMS)
                (new / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        except CheckpointError as error:  # names the folder
            raise GalleryError(str(error)) from error
        except RuntimeError as error:  # of faiss
            raise GalleryError(f"Cannot write the index {folder}: {str(error)[:200]}") from error

    @classmethod
    def load(cls, folder: str | Path, fingerprint: Fingerprint | None = None) -> "EmbeddingIndex":
        """Read what `save` wrote.

        Args:
            folder: of the index.
            fingerprint: of the model whose queries are to come.

        Raises:
            GalleryError: no index there, a file cut, or vectors of another model.
        """
        folder = Path(folder)
        about = read_index_about(folder)
        try:
            items = pq.read_table(folder / ITEMS)
            vectors = faiss.read_index(str(folder / VECTORS))
            kind, dim, count = about.pop("kind"), about.pop("dim"), about.pop("num_items")
            found = about.pop("fingerprint")
        except (OSError, RuntimeError, KeyError, pa.ArrowException) as error:
            raise GalleryError(f"The index {folder} is broken ({str(error)[:200]}). Build it again.") from error
        if not vectors.ntotal == len(items) == count or vectors.d != dim or kind not in KINDS:
            raise GalleryError(f"The index {folder} does not hold what its {ABOUT} says. Build it again.")
        stored = None if found is None else Fingerprint.from_json(found, folder / ABOUT)
        if fingerprint is not None and stored is not None:
            stored.require_same(fingerprint, f"The index {folder}", "this model")
        return cls(vectors, kind, items, stored, about)


def read_index_about(folder: Path) -> dict[str, Any]:
    """What an index says of itself: kind, dim, num_items, fingerprint and what its maker added.

    Raises:
        GalleryError: no index there.
    """
    try:
        value = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GalleryError(f"There is no index in {folder}. Make one with `vlkit index build`.") from error
    except (OSError, ValueError) as error:
        raise GalleryError(f"The index {folder} is broken ({error}). Build it again.") from error
    if not isinstance(value, dict):
        raise GalleryError(f"The index {folder} is broken: {ABOUT} is no JSON object. Build it again.")
    return value


def _empty(dim: int, kind: Kind) -> Any:
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def _choose(shape: tuple[int, ...]) -> Kind:
    """The exact kind where it fits well."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not told by this system: assume 8 GB
        free = 8 * 2**30
    return "flat" if 4 * shape[0] * shape[1] <= _SHARE * free else "fp16"


def _matrix(rows: Tensor | NDArray[Any], dim: int | None = None, what: str = "vectors") -> NDArray[Any]:
    matrix = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows
    if matrix.ndim != 2 or (dim is not None and matrix.shape[1] != dim):
        raise GalleryError(f"The {what} have shape {matrix.shape}; expected (N,{dim or 'D'}).")
    for start in range(0, len(matrix), _CHUNK):
        norms = np.linalg.norm(matrix[start : start + _CHUNK].astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) < 0.01))  # also where it is NaN
        if len(wrong):
            row = start + int(wrong[0])
            found = "not finite" if not np.isfinite(norms[wrong[0]]) else f"of length {norms[wrong[0]]:.3g}"
            raise GalleryError(f"Row {row} of the {what} is {found}; expected unit norm.")
    return matrix


def _items(ids: Sequence[str], items: pa.Table | None) -> pa.Table:
    column = pa.array(ids, pa.string())
    if items is None:
        return pa.table({"id": column})
    return items.drop_columns(["id"] if "id" in items.column_names else []).add_column(0, "id", column)
