"""AdamW or Muon with the right parameters decayed, and each group at its share of the learning rate."""

from collections.abc import Mapping, Set
from typing import Any, Literal

import torch
from torch import nn

from vlkit.config import OptimSettings
from vlkit.errors import ConfigError
from vlkit.training.muon import Muon, hidden_matrices
from vlkit.training.sharded import without_mixture

# A table of positions or a class token is looked up or added, never multiplied with: decay would only pull it to zero.
_EMBEDDINGS = {"positional_embedding", "class_embedding", "pos_embed", "cls_token"}


def decay_groups(
    module: nn.Module, weight_decay: float, lr_scale: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters: matrices and kernels decay, all else does not.

    Not decayed: biases, norms, logit scale and bias (anything below two dimensions), token, position and class
    embeddings.

    Args:
        lr_scale: name of a parameter -> its share of the learning rate; 1 for those not named.

    Returns:
        Of each share [decayed, not decayed], each with the names of its parameters under "names" and the share under
        "lr_scale"; empty groups are left out.
    """
    tables = {name for name, child in module.named_modules() if isinstance(child, nn.Embedding)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for share in sorted({1.0, *(lr_scale or {}).values()}, reverse=True):
        for decay in (weight_decay, 0.0):
            # A dict of its own, even where the weight decay is 0 too: groups keep their number and order.
            key = (share, decay)
            groups.setdefault(key, {"params": [], "names": [], "weight_decay": decay, "lr_scale": share})
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, own_name = name.rpartition(".")
        plain = parameter.ndim < 2 or owner in tables or own_name in _EMBEDDINGS
        group = groups[(lr_scale or {}).get(name, 1.0), 0.0 if plain else weight_decay]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def make_optimizer(
    module: nn.Module,
    settings: OptimSettings,
    lr_scale: Mapping[str, float] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a module, in its fused form where the device has one, or Muon.

    Args:
        lr_scale: name of a parameter -> its share of the learning rate, which the loop multiplies with.
        precision: that the training computes in, and Muon's matrix products with it.

    Raises:
        ConfigError: Muon, and nothing that is trained is a matrix it takes.
    """
    groups = without_mixture(decay_groups(module, settings.weight_decay, lr_scale))
    fused = {parameter.device.type for parameter in module.parameters()} <= {"cpu", "cuda"}
    lr, betas, eps = settings.lr, settings.betas, settings.eps
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    matrices = hidden_matrices(module)
    share = 1.0 if settings.matrix_lr is None else settings.matrix_lr / lr
    dtype = torch.bfloat16 if precision == "bf16" else None
    parts = [part for group in groups for part in _by_kind(group, matrices, share)]
    if not any(part["muon"] for part in parts):
        raise ConfigError(
            'optim.name = "muon" moves weights of linear layers inside the blocks of a tower, and this run trains none '
            '(only convolutions, LoRA or a head). Use "adamw".'
        )
    return Muon(parts, lr=lr, betas=betas, eps=eps, fused=fused, dtype=dtype)


def _by_kind(group: Mapping[str, Any], matrices: Set[str], share: float) -> list[dict[str, Any]]:
    """A group's matrices, which learn at `share` of its rate, and its other parameters."""
    found = []
    for muon in (True, False):
        pairs = [
            (parameter, name)
            for parameter, name in zip(group["params"], group["names"], strict=True)
            if (name in matrices) is muon
        ]
        if pairs:
            params, names = map(list, zip(*pairs, strict=True))
            rate = group["lr_scale"] * (share if muon else 1.0)
            found.append({**group, "params": params, "names": names, "muon": muon, "lr_scale": rate})
    return found
