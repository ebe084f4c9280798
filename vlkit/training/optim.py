"""AdamW with the right parameters decayed, and learning rates as pure functions of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlkit.config import OptimSettings

# A table of positions or a class token is looked up or added, never multiplied with: decay would only pull it to zero.
_EMBEDDINGS = {"positional_embedding", "class_embedding", "pos_embed", "cls_token"}


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters: matrices and kernels decay, all else does not.

    Not decayed: biases, norms, logit scale and bias (anything below two dimensions), token, position and class
    embeddings.

    Returns:
        [decayed, not decayed], each with the names of its parameters under "names"; empty groups are left out.
    """
    tables = {name for name, child in module.named_modules() if isinstance(child, nn.Embedding)}
    groups: tuple[dict[str, Any], dict[str, Any]] = (
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    )
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, own_name = name.rpartition(".")
        plain = parameter.ndim < 2 or owner in tables or own_name in _EMBEDDINGS
        group = groups[1] if plain else groups[0]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups if group["params"]]


def make_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a module, in its fused form where the device has one."""
    devices = {parameter.device.type for parameter in module.parameters()}
    return torch.optim.AdamW(
        decay_groups(module, settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=devices <= {"cpu", "cuda"},
    )


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, end: float = 0.0, kind: str = "cosine") -> float:
    """The learning rate of one step.

    It rises linearly over the first `warmup` steps, from peak/warmup in step 0 to `peak` in step warmup - 1;
    then it stays ("constant") or falls along half a cosine, which would reach `end` in step `steps`.

    Source: open_clip 3.3.0, open_clip_train.scheduler.cosine_lr.
    Differs: the cosine ends at `end`, not always at zero.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    assert kind == "cosine", kind
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def make_schedule(
    settings: OptimSettings, *, steps: int, steps_per_epoch: int, batch_size: int
) -> Callable[[int], float]:
    """The learning rate of a run as a function of the step."""
    warmup = settings.warmup.in_steps(total=steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size)

    def schedule(step: int) -> float:
        return learning_rate(
            step, steps=steps, warmup=warmup, peak=settings.lr, end=settings.min_lr, kind=settings.schedule
        )

    return schedule
