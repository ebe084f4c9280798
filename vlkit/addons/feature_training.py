"""Training of a few small tensors on features that stay as they are: seconds, no towers.

keys = parameter(cache.keys)
train([keys], Schedule(epochs=20, lr=1e-3), len(labels), loss, seed=0)     # loss(rows, epoch) -> ()
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import Progress

MOMENTUM = 0.9
# Learning rate of the warm-up epochs: constant and small, as in CoOp's code.
WARMUP_LR = 1e-5


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the learning rate falls as a cosine, step by step.

    Attributes:
        epochs: passes over the items.
        lr: at the start.
        optimizer: sgd has momentum 0.9.
        batch_size: items a step.
        weight_decay, eps: of the optimizer; sgd has no eps.
        warmup_epochs: first epochs, at a learning rate of 1e-5.
    """

    epochs: int
    lr: float
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    batch_size: int = 256
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup_epochs: int = 0


def parameter(start: Tensor) -> Tensor:
    """A copy that can be trained."""
    with torch.inference_mode(False):
        return start.detach().clone().requires_grad_()


def train(
    parameters: Sequence[Tensor],
    schedule: Schedule,
    num_items: int,
    loss: Callable[[Tensor, int], Tensor],
    seed: int,
    progress: Progress | None = None,
    after_epoch: Callable[[int], None] | None = None,
    after_step: Callable[[float], None] | None = None,
) -> None:
    """Change the parameters in place.

    Args:
        parameters: from `parameter`.
        schedule: how long and how fast.
        num_items: n.
        loss: (rows, epoch) to the mean loss of some of the n rows.
        seed: of the order of the items.
        progress: called with (done, total) epochs.
        after_epoch: called with the number of each epoch that is done.
        after_step: called with the learning rate of each step that is done.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(parameters, schedule)
    per_epoch = math.ceil(num_items / schedule.batch_size)
    warmup = min(schedule.warmup_epochs, schedule.epochs - 1) * per_epoch
    total = schedule.epochs * per_epoch - warmup
    step = -warmup
    with torch.inference_mode(False), torch.enable_grad():
        for epoch in range(schedule.epochs):
            for rows in torch.randperm(num_items, generator=random).split(schedule.batch_size):
                falling = schedule.lr * 0.5 * (1 + math.cos(math.pi * step / total))
                lr = WARMUP_LR if step < 0 else falling
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
                loss(rows, epoch).backward()
                optimizer.step()
                step += 1
                if after_step:
                    with torch.no_grad():
                        after_step(lr)
            if after_epoch:
                with torch.no_grad():
                    after_epoch(epoch)
            if progress:
                progress(epoch + 1, schedule.epochs)


def _optimizer(parameters: Sequence[Tensor], schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(parameters, schedule.lr, momentum=MOMENTUM, weight_decay=schedule.weight_decay)
    kind = torch.optim.AdamW if schedule.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, schedule.lr, eps=schedule.eps, weight_decay=schedule.weight_decay)


def fresh_bottleneck(dim: int, reduction: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights (dim/reduction, dim) and (dim, dim/reduction) of `bottleneck`, drawn as torch draws a linear layer."""
    random = torch.Generator().manual_seed(seed)
    inner = max(1, dim // reduction)
    down = (torch.rand(inner, dim, generator=random) * 2 - 1) / math.sqrt(dim)
    up = (torch.rand(dim, inner, generator=random) * 2 - 1) / math.sqrt(inner)
    return down, up


def bottleneck(features: Tensor, down: Tensor, up: Tensor, ratio: float) -> Tensor:
    """(n,D) of unit norm: ratio x a small network's output + (1 - ratio) x the features.

    The network has no biases and so scales with its input: unit features and the encoder's own give the same direction.

    Source: Gao et al. 2021 (CLIP-Adapter), arXiv:2110.04544.
    """
    changed = F.relu(F.relu(features @ down.T) @ up.T)
    return F.normalize(ratio * changed + (1 - ratio) * features, dim=-1)
