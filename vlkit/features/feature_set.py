"""Features of a set of images or texts with the fingerprint of what made them."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from vlkit import __version__
from vlkit.errors import GalleryError

# What can change a feature in its last bits; for the record only.
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "pillow", "simplejpeg", "numpy")


@dataclass(frozen=True)
class Fingerprint:
    """What made features.

    Attributes:
        identity: weights, architecture, preprocess, tokenizer, decoder. Features of equal identity may be compared.
        model: the name the model was given by.
        versions: of the libraries, for the record.
    """

    identity: Mapping[str, str]
    model: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def differences(self, other: "Fingerprint") -> list[str]:
        """One line for each part of the identity that differs; empty when features may be compared."""
        keys = [*self.identity, *(key for key in other.identity if key not in self.identity)]
        pairs = [(key, self.identity.get(key, "none"), other.identity.get(key, "none")) for key in keys]
        return [f"{key}: {_short(mine)} here, {_short(theirs)} there" for key, mine, theirs in pairs if mine != theirs]

    def require_same(self, other: "Fingerprint", here: str, there: str) -> None:
        """Refuse to mix features of two models.

        Args:
            other: what is to be used together with this.
            here: what this one is about, for the message.
            there: what the other is about.

        Raises:
            GalleryError: they differ; the message says in what.
        """
        found = self.differences(other)
        if found:
            raise GalleryError(
                f"{here} (model {self.model}) and {there} (model {other.model}) do not go together: "
                f"{'; '.join(found)}. Use the same model for both, or embed again with it."
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"identity": dict(self.identity), "model": self.model, "versions": dict(self.versions)}

    @classmethod
    def from_json(cls, value: Any, where: object) -> "Fingerprint":
        """Read what `to_json` gave.

        Raises:
            GalleryError: it is something else.
        """
        try:
            return cls({str(k): str(v) for k, v in value["identity"].items()}, str(value["model"]), value["versions"])
        except (KeyError, TypeError, AttributeError) as error:
            raise GalleryError(f"{where} holds no fingerprint of a model ({error!r}). Embed again.") from error


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images, or of N texts.

    Attributes:
        pooled: (N,D) float32, unit norm.
        norm: (N,) length before they were brought to unit norm; None for texts. Raw features are pooled x norm.
        ids: (N,) names, each once.
        fingerprint: of the model.
        patches: (N,P,D) unit norm in the joint space, as stored (float16 or float32).
        grid: rows and columns of the patches.
        views: (N,V,D) features of other views of the images.
        text_to_image: (N,) of texts: the row each belongs to in the set of images.
        labels: (N,) int64 class of each image, -1 where there is none.
    """

    pooled: Tensor
    norm: Tensor | None
    ids: tuple[str, ...]
    fingerprint: Fingerprint
    patches: Tensor | None = None
    grid: tuple[int, int] | None = None
    views: Tensor | None = None
    text_to_image: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            GalleryError: rows that do not go together, or a name that occurs twice.
        """
        for name, rows in self._columns():
            if len(rows) != len(self.pooled):
                raise GalleryError(f"{len(self.pooled)} features, but {len(rows)} {name}; expected one for each.")
        if len(set(self.ids)) != len(self.ids):
            raise GalleryError(
                f"{len(self.ids)} features have {len(set(self.ids))} distinct ids; each must be one's own."
            )

    def __len__(self) -> int:
        return len(self.pooled)

    def _columns(self) -> Iterator[tuple[str, Any]]:
        for name in ("ids", "norm", "patches", "views", "text_to_image", "labels"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


def check_finite(features: Tensor, names: Sequence[str], what: str) -> None:
    """Refuse features from which no ranking follows.

    Args:
        features: (n,D).
        names: (n,) shown for the first broken row.
        what: "images" or "texts".

    Raises:
        GalleryError: a feature is NaN or infinite.
    """
    broken = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise GalleryError(
            f"The model gives features that are not finite for {len(broken)} of {len(features)} {what} "
            f"(first: {names[broken[0]]!r}). Its weights are damaged or its training diverged; use another checkpoint."
        )


def library_versions() -> dict[str, str]:
    """What is installed of the libraries that can change a feature."""
    found = {"vlkit": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _short(value: str) -> str:
    """Hashes cut to what people compare; texts up to a line."""
    if len(value) >= 32 and all(char in "0123456789abcdef" for char in value):
        return value[:12]
    return value if len(value) <= 120 else json.dumps(value[:120]) + "..."
