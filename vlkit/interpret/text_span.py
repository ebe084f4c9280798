"""TextSpan: a few texts that span what an attention head writes, which says what the head looks for.

    parts = decompose(encoder, images).with_shared_biases()
    span = text_span(parts.heads[:, -1, 3], text_features)
    [texts[i] for i in span.texts]          # "photo taken in Italy", "artwork featuring the Alps", ...

Source: Gandelsman, Efros and Steinhardt 2024, arXiv:2310.05916, Algorithm 1; released code clip_prs
(compute_complete_text_set.py): the texts are projected on the leading right singular vectors of the contributions
before these are centred, and are not brought to unit norm afterwards.
Differs: A text whose rest is shorter than 1e-6 of the longest is left out, where the released code would divide by
its length; spans stop early when no text is left.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlkit.errors import ConfigError
from vlkit.interpret.decomposition import Decomposition

RANK = 80  # the paper's: a head's output spans hardly more directions
_GONE = 1e-6


class TextSpan(NamedTuple):
    """The texts of one head in the order in which they were found."""

    texts: tuple[int, ...]  # (n,) rows of the pool
    explained: tuple[float, ...]  # (n,) share of the head's variance that the texts up to here reconstruct
    reconstruction: Tensor  # (N,D) the contributions within the span of the texts, about their mean


@torch.no_grad()
def text_span(contributions: Tensor, pool: Tensor, num_texts: int = 10, rank: int = RANK) -> TextSpan:
    """Texts whose directions explain most of the variance of one head's contributions, found greedily.

    Args:
        contributions: (N,D) of one head to N images (`Decomposition.heads[:, layer, head]`).
        pool: (M,D) unit-norm features of M texts.
        num_texts: how many to find.
        rank: singular vectors of the contributions that the texts are projected on.

    Raises:
        ConfigError: fewer than two images, or no text.
    """
    if len(contributions) < 2 or not len(pool):
        raise ConfigError(
            f"TextSpan got {len(contributions)} images and {len(pool)} texts; it needs at least 2 images, whose "
            "differences it explains, and some texts."
        )
    data = contributions.double()
    basis = torch.linalg.svd(data, full_matrices=False).Vh[:rank]
    texts = pool.double() @ basis.T @ basis
    mean = data.mean(dim=0)
    rest = data - mean
    variance = rest.square().sum().clamp_min(torch.finfo(rest.dtype).tiny)
    smallest = _GONE * texts.norm(dim=-1).max()
    found: list[int] = []
    explained: list[float] = []
    for _ in range(min(num_texts, len(pool))):
        deviation = (rest @ texts.T).std(dim=0)
        deviation[texts.norm(dim=-1) <= smallest] = -1
        best = int(deviation.argmax())
        if deviation[best] < 0:
            break
        direction = texts[best] / texts[best].norm()
        rest = rest - (rest @ direction)[:, None] * direction
        texts = texts - (texts @ direction)[:, None] * direction
        found.append(best)
        explained.append(float(1 - rest.square().sum() / variance))
    return TextSpan(tuple(found), tuple(explained), (data - rest).to(contributions.dtype))


def without_heads(
    parts: Decomposition, heads: list[tuple[int, int]], means: Tensor | None = None, mlps: bool = False
) -> Tensor:
    """Image features with some heads replaced by their mean: how a spurious cue is taken out.

    Args:
        parts: of B images.
        heads: (layer, head) pairs; a negative layer counts from the end.
        means: (N,H,D) mean of each head's contributions over a reference set; default over these images.
        mlps: also put the mean of these images for every MLP and the embedding, as the paper does.

    Returns:
        (B,D) unit norm.

    Raises:
        ConfigError: a head that is not there.
    """
    num_layers, num_heads = parts.heads.shape[1:3]
    for layer, head in heads:
        if not (-num_layers <= layer < num_layers and 0 <= head < num_heads):
            raise ConfigError(f"No head {head} in layer {layer}: this tower has {num_layers} layers of {num_heads}.")
    kept = parts.heads.clone()
    mean = parts.heads.mean(dim=0) if means is None else means
    for layer, head in heads:
        kept[:, layer, head] = mean[layer, head]
    changed = parts._replace(heads=kept)
    if mlps:
        changed = changed._replace(mlps=parts.mlps.mean(dim=0, keepdim=True).expand_as(parts.mlps))
    return torch.nn.functional.normalize(changed.total(), dim=-1)
