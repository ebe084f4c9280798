"""Rank and world size, and the gather of features over ranks with the exact gradient.

Correct on one process without initialising anything.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, 0 when torch.distributed is not running."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 when torch.distributed is not running."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, with the gradient flowing back to the rank each row came from.

    Args:
        rows: (B, D) on every rank, the same B everywhere.

    Returns:
        (B * world_size, D). Each rank's backward receives the sum over ranks of the gradients of its rows,
        so a loss that every rank computes in full must be divided by the world size.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        out = rows.new_empty((rows.shape[0] * world_size(), *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        per_rank = grad.shape[0] // world_size()
        return grad[rank() * per_rank : (rank() + 1) * per_rank]
