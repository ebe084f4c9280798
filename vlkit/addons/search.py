"""Search in a folder of features through a pipeline of add-ons: exact, all images scored.

search_with_addons("features/flickr8k", source, Query(text="a dog in the snow"), pipeline, k=10)
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlkit.addons.adapted import merged_scores
from vlkit.addons.exchange import Vectors, no_vectors
from vlkit.addons.pipeline import Pipeline
from vlkit.data.records import ImageRef
from vlkit.errors import ConfigError
from vlkit.features.source import FeatureSource
from vlkit.features.store import open_features
from vlkit.index.gallery import Found, Query


def search_with_addons(
    folder: str | Path, source: FeatureSource, query: Query, pipeline: Pipeline, k: int = 10
) -> list[Found]:
    """The k images that fit best, fewer where there are fewer; a query of words and an image is merged.

    Args:
        folder: features made by `vlkit embed`.
        source: the model they are from.
        query: words, an image, or both; a merge in the pipeline says how both count, else their mean does.
        pipeline: fitted for retrieval.
        k: results.

    Raises:
        ConfigError: an add-on that is not fitted, or that would have had to be there when the images were embedded.
        GalleryError: features of another model.
    """
    if pipeline.edits:
        raise ConfigError(
            f"{pipeline.edits[0].name} changes how images are encoded, but the images of {folder} are encoded already. "
            "Leave it out."
        )
    stored = open_features(folder)
    features = stored.images(patches=pipeline.local)
    features.fingerprint.require_same(source.card.fingerprint, "The gallery", "this model")
    patches = None if features.patches is None else features.patches.float()
    images = Vectors("image", features.pooled, norm=features.norm, patches=patches, grid=features.grid)
    scores = merged_scores(pipeline.merge, list(_parts(images, source, query, pipeline)))[0]
    best = scores.topk(min(k, len(images)))
    known = stored.metadata.take(best.indices.numpy()).to_pylist()
    return [
        Found(rank, str(row["key"]), score, _reference(row), row.get("caption"))
        for rank, (row, score) in enumerate(zip(known, best.values.tolist(), strict=True), start=1)
    ]


def _parts(images: Vectors, source: FeatureSource, query: Query, pipeline: Pipeline) -> Iterator[Tensor]:
    """(1,N) scores of the words, and of the image."""
    none = no_vectors("text", source.embed_dim)
    if query.text is not None:
        texts = Vectors("text", source.embed_texts([query.text]))
        yield torch.cat(list(pipeline.retrieval(images, texts, source).scores("text_to_image")))
    if query.image is not None:
        pipeline.require_usable(source, "retrieval")
        asked = Vectors("image", source.embed_images([query.image], workers=0))
        # A bias is known for texts that ask for images; two images are compared as the maps leave them.
        yield pipeline.map(asked, none)[0].pooled @ pipeline.map(images, none)[0].pooled.T


def _reference(row: dict[str, object]) -> ImageRef:
    return ImageRef(path=row["image_path"], offset=row["offset"], size=row["size"], column=row["column"])  # type: ignore[arg-type]
