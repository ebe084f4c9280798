"""LoRA: a low-rank update beside the frozen matrices of the towers' blocks, merged into them at the end.

    adapters = add_lora(encoder, rank=8, targets=("q", "v"))      # everything else is frozen
    ...                                                           # train
    merged = merged_weights(encoder)                              # what `save_encoder` writes: a plain model
    remove_lora(encoder, merge=True)                              # the encoder itself, without adapters

The adapters are parametrizations of the blocks' own tensors, reached through `TextTower` and `VisionTower`: forward,
autocast, checkpointing and export see a weight W + alpha/rank B A, whichever layer it belongs to. In an attention
with one matrix for q, k and v (torch's `in_proj_weight`) the update goes into the rows of those that were asked for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vlkit.errors import ModelError
from vlkit.models.dual_encoder import DualEncoder

Target = Literal["q", "k", "v", "o", "mlp"]
Side = Literal["image", "text"]

# How torch names a tensor that is made of others.
_MARKER = ".parametrizations."
_QKV: tuple[Target, ...] = ("q", "k", "v")


class LoraUpdate(nn.Module):
    """W -> W + alpha/rank B A, for some row blocks of a matrix; B starts at zero, so that nothing changes at first.

    Args:
        weight: (out, in) the matrix, frozen by the caller.
        blocks: the rows that get an update of their own: (first, last + 1) of each.
        rank: columns of B and rows of A.
        alpha: strength of the update.

    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
    Differs: A starts with Kaiming's uniform numbers as in the authors' code, not Gaussian as in the paper; no
        dropout on its input, because the update is part of the weight.
    """

    blocks: Tensor  # (K,2) int64; saved, so that saved weights can be merged without knowing the settings
    scale: Tensor  # ()

    def __init__(self, weight: Tensor, blocks: Sequence[tuple[int, int]], rank: int, alpha: float) -> None:
        super().__init__()
        self.register_buffer("blocks", torch.tensor(blocks))
        self.register_buffer("scale", torch.tensor(alpha / rank))
        self._rows = tuple(blocks)  # the same without asking a device
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for first, end in blocks:
            a = torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            self.down.append(nn.Parameter(a))
            self.up.append(nn.Parameter(a.new_zeros(end - first, rank)))

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) the matrix with its update."""
        return _updated(weight, self._rows, list(self.up), list(self.down), self.scale)


class Adapted(NamedTuple):
    """A matrix that has, or is to have, an update."""

    owner: nn.Module
    name: str  # of the parameter in its owner
    blocks: tuple[tuple[int, int], ...]


def add_lora(
    encoder: DualEncoder,
    *,
    rank: int = 8,
    alpha: float | None = None,
    towers: Sequence[Side] = ("image", "text"),
    targets: Sequence[Target] = ("q", "v"),
) -> list[nn.Parameter]:
    """Freeze an encoder and put trainable updates beside matrices of its blocks.

    The temperature (and bias) keep whether they are trained. With random numbers of torch's global generator.

    Args:
        encoder: one whose towers can be entered.
        rank: of each update.
        alpha: strength; default: the rank.
        towers: which towers get updates.
        targets: which matrices of each block: q, k, v and the output o of the attention, the two of the MLP.

    Returns:
        The new parameters.

    Raises:
        ModelError: a tower that cannot be entered, or whose blocks have no such matrix; it has updates already.
    """
    if has_lora(encoder):
        raise ModelError("This encoder has LoRA updates already. Merge or remove them first (remove_lora).")
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2] not in ("logit_scale", "logit_bias"):
            parameter.requires_grad_(False)
    found = [place for side in towers for place in _places(encoder, side, targets)]
    for place in found:
        weight = getattr(place.owner, place.name)
        if rank > min(weight.shape):
            raise ModelError(
                f"LoRA of rank {rank} is no low rank for a matrix of {tuple(weight.shape)}. Lower the rank."
            )
        update = LoraUpdate(weight, place.blocks, rank, float(alpha or rank))
        parametrize.register_parametrization(place.owner, place.name, update)
    return [parameter for update in _updates(encoder) for parameter in update.parameters()]


def has_lora(encoder: nn.Module) -> bool:
    """Whether some matrix has an update."""
    return any(True for _ in _updates(encoder))


def merged_weights(encoder: DualEncoder) -> dict[str, Tensor]:
    """The encoder's weights as a plain model has them, each update added to its matrix."""
    return merge_updates(encoder.weights())


def merge_updates(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with updates -> that of the plain model; one without is returned as it is."""
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        owner, marker, rest = name.rpartition(_MARKER)
        if not marker:
            merged[name] = value
        elif rest.endswith(".original"):
            plain = rest.removesuffix(".original")
            merged[f"{owner}.{plain}"] = _merged(weights, f"{owner}{marker}{plain}.0", value)
    return merged


def remove_lora(encoder: DualEncoder, merge: bool = True) -> None:
    """Take the updates off: added to the matrices, or dropped."""
    for module in list(encoder.modules()):
        if parametrize.is_parametrized(module):
            changed: Any = module
            for name in list(changed.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=merge)


@torch.no_grad()
def _merged(weights: Mapping[str, Tensor], update: str, value: Tensor) -> Tensor:
    rows = [(first, end) for first, end in weights[f"{update}.blocks"].tolist()]
    up, down = ([weights[f"{update}.{side}.{i}"] for i in range(len(rows))] for side in ("up", "down"))
    return _updated(value, rows, up, down, weights[f"{update}.scale"])


def _updated(
    weight: Tensor, rows: Sequence[tuple[int, int]], up: Sequence[Tensor], down: Sequence[Tensor], scale: Tensor
) -> Tensor:
    parts, done = [], 0
    for (first, end), b, a in zip(rows, up, down, strict=True):
        parts += [weight[done:first], weight[first:end] + scale.to(b.dtype) * (b @ a)]
        done = end
    return torch.cat([*parts, weight[done:]])


def _updates(encoder: nn.Module) -> Iterator[LoraUpdate]:
    return (module for module in encoder.modules() if isinstance(module, LoraUpdate))


def _places(encoder: DualEncoder, side: Side, targets: Sequence[Target]) -> Iterator[Adapted]:
    tower = encoder.vision_tower if side == "image" else encoder.text_tower
    for block in tower.blocks:
        yield from _attention_places(block.module, side, targets)
        if "mlp" in targets:
            yield from _mlp_places(block.module, side)


def _attention_places(block: nn.Module, side: Side, targets: Sequence[Target]) -> Iterator[Adapted]:
    attention = getattr(block, "attn", None)
    wanted = [name for name in _QKV if name in targets]
    if not wanted and "o" not in targets:
        return
    if not isinstance(getattr(attention, "in_proj_weight", None), Tensor):
        raise ModelError(
            f"The {side} tower's attention is {type(attention).__name__} without in_proj_weight: LoRA has no q, k, v "
            'to update there. Take a model with open_clip\'s own transformer, or targets = ["mlp"].'
        )
    assert attention is not None
    if wanted:
        width = len(attention.in_proj_weight) // 3
        rows = tuple((_QKV.index(name) * width, (_QKV.index(name) + 1) * width) for name in wanted)
        yield Adapted(attention, "in_proj_weight", rows)
    if "o" in targets:
        yield _whole(attention.out_proj)


def _mlp_places(block: nn.Module, side: Side) -> Iterator[Adapted]:
    mlp = getattr(block, "mlp", None)
    found = [child for child in mlp.modules() if isinstance(child, nn.Linear)] if mlp is not None else []
    if not found:
        raise ModelError(f"The {side} tower's blocks have no MLP of linear layers for LoRA to update.")
    yield from map(_whole, found)


def _whole(linear: Any) -> Adapted:
    return Adapted(linear, "weight", ((0, linear.weight.shape[0]),))
