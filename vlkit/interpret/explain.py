"""Heat maps of images for texts by any of the methods, in batches.

maps = explain(embedder.encoder, pixels, text_features, method="legrad")      # (B,C,rows,columns)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vlkit.errors import ConfigError, did_you_mean
from vlkit.interpret.decomposition import heat_maps
from vlkit.interpret.legrad import legrad
from vlkit.interpret.relevance import image_relevance
from vlkit.models.dual_encoder import DualEncoder


def explain(encoder: DualEncoder, images: Tensor, texts: Tensor, method: str, last_layers: int | None = None) -> Tensor:
    """Where in each image each text is seen.

    Args:
        encoder: with a CLIP ViT of open_clip.
        images: (B,3,S,S) uint8, or float in [0,1].
        texts: (C,D) unit-norm text features. `decomposition` compares them with each other: what all have in common
            is left out where there are several.
        method: decomposition, legrad or relevance.
        last_layers: layers that count, from the end; default the method's own (all, 2, 1).

    Returns:
        (B,C,rows,columns), on the method's own scale.

    Raises:
        ConfigError: an unknown method, or more layers than there are.
        ModelError: the encoder has no such tower.
    """
    if method not in EXPLAINERS:
        raise ConfigError(f"No way of explaining is called {method!r}. {did_you_mean(method, EXPLAINERS)}")
    return EXPLAINERS[method](encoder, images, texts, last_layers)


def _by_decomposition(encoder: DualEncoder, images: Tensor, texts: Tensor, last_layers: int | None) -> Tensor:
    directions = texts - texts.mean(dim=0) if len(texts) > 1 else texts
    return heat_maps(encoder, images, directions, last_layers)


def _by_legrad(encoder: DualEncoder, images: Tensor, texts: Tensor, last_layers: int | None) -> Tensor:
    return _text_by_text(legrad, encoder, images, texts, 2 if last_layers is None else last_layers)


def _by_relevance(encoder: DualEncoder, images: Tensor, texts: Tensor, last_layers: int | None) -> Tensor:
    return _text_by_text(image_relevance, encoder, images, texts, 1 if last_layers is None else last_layers)


def _text_by_text(
    method: Callable[[DualEncoder, Tensor, Tensor, int], Tensor],
    encoder: DualEncoder,
    images: Tensor,
    texts: Tensor,
    last_layers: int,
) -> Tensor:
    maps = [method(encoder, images, text.expand(len(images), -1), last_layers) for text in texts]
    return torch.stack(maps, dim=1)


EXPLAINERS: dict[str, Callable[[DualEncoder, Tensor, Tensor, int | None], Tensor]] = {
    "decomposition": _by_decomposition,
    "legrad": _by_legrad,
    "relevance": _by_relevance,
}
