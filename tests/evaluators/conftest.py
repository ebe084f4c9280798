"""A source of features that needs no model: vectors that follow from names, with some set by the test."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlkit.data.records import Record


class Read(NamedTuple):
    embeddings: Tensor
    kept: list[int]
    failures: list[tuple[int, str]]


@dataclass
class NamedVectors:
    """Images by key and texts by their words; what is not set is a random vector of its name."""

    dim: int = 16
    vectors: dict[str, Tensor] = field(default_factory=dict)
    logit_scale: float = 20.0
    logit_bias: float | None = None
    family: Literal["softmax", "sigmoid"] = "softmax"
    num_images: int = 0
    texts: list[str] = field(default_factory=list)

    def vector(self, name: str) -> Tensor:
        if name not in self.vectors:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
            drawn = np.random.default_rng(seed).normal(size=self.dim)
            self.vectors[name] = torch.from_numpy(drawn).float()
        return normalize(self.vectors[name], dim=0)

    def embed_images_where_readable(
        self, images: Sequence[Record], batch_size: int = 64, progress: Any = None, workers: int | None = None
    ) -> Read:
        self.num_images += len(images)
        kept = [row for row, record in enumerate(images) if record.image.data != b"broken"]
        failures = [(row, "no image") for row in range(len(images)) if row not in set(kept)]
        if progress:
            progress(len(images), len(images))
        vectors = [self.vector(images[row].key) for row in kept]
        return Read(torch.stack(vectors) if vectors else torch.empty(0, self.dim), kept, failures)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Any = None) -> Tensor:
        self.texts += texts
        if progress:
            progress(1, 1)
        return torch.stack([self.vector(text) for text in texts])


@pytest.fixture
def named_vectors() -> Callable[..., NamedVectors]:
    """`named_vectors(dim=4, key=[...], ...)` or with a mapping of names to vectors."""

    def make(vectors: Mapping[str, Sequence[float] | Tensor] | None = None, **options: Any) -> NamedVectors:
        given = {name: torch.as_tensor(vector, dtype=torch.float32) for name, vector in (vectors or {}).items()}
        dim = len(next(iter(given.values()))) if given else 16
        return NamedVectors(vectors=given, **{"dim": dim, **options})

    return make
