"""Rank and world size, and the exchange of features over ranks with exact gradients.

Correct on one process without initialising anything. Whoever computes a loss over all ranks gives each of them the
gradient of its own rows times the world size, because gradients of parameters are averaged over ranks afterwards
(by DDP, FSDP or `average_gradients`).
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlkit.errors import ConfigError

# Named so since torch 2.14, where the old names warn.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def rank() -> int:
    """This process's number, 0 when torch.distributed is not running."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 when torch.distributed is not running."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


class Launch(NamedTuple):
    """Which of several processes this one was started as."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1
    address: str = "127.0.0.1"  # where rank 0 listens
    port: int = 29500

    def environment(self) -> dict[str, str]:
        """As torchrun would say it."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def launch(environment: Mapping[str, str] | None = None) -> Launch:
    """How this process was started: by `torchrun`, by SLURM's `srun` (one task a process), or alone.

    torchrun's variables win, so torchrun under srun works. A batch script that was not started by `srun` is one
    process, however many tasks its job has.

    Args:
        environment: default os.environ.

    Raises:
        ConfigError: variables that make no sense.

    Source: https://slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES".
    """
    given = os.environ if environment is None else environment
    try:
        if "WORLD_SIZE" in given:
            return _of_torchrun(given)
        if int(given.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return _of_srun(given)
    except (KeyError, ValueError, IndexError) as error:
        found = {key: given[key] for key in sorted(given) if key.startswith(("SLURM_", "RANK", "WORLD", "LOCAL_"))}
        raise ConfigError(
            f"The variables of the launcher do not say which process this is ({error!r}): {found}. "
            "Start with torchrun or srun."
        ) from error
    return Launch()


def _of_torchrun(given: Mapping[str, str]) -> Launch:
    world = int(given["WORLD_SIZE"])
    return Launch(
        int(given["RANK"]) if world > 1 else int(given.get("RANK", "0")),
        world,
        int(given.get("LOCAL_RANK", "0")),
        int(given.get("LOCAL_WORLD_SIZE", "1")),
        given.get("MASTER_ADDR", Launch().address),
        int(given.get("MASTER_PORT", str(Launch().port))),
    )


def _of_srun(given: Mapping[str, str]) -> Launch:
    # "4(x2),3": four tasks on each of two nodes and three on the third.
    tasks = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", given["SLURM_STEP_TASKS_PER_NODE"])
        for _ in range(int(times or "1"))
    ]
    # "node[003-006,9],other1": the first name, with the first number of its bracket.
    first = re.sub(r"\[(\d+).*", r"\1", given["SLURM_STEP_NODELIST"]).split(",")[0]
    # Of the job and the step, so that two jobs on one machine do not meet at one port.
    port = 10000 + (31 * int(given["SLURM_JOB_ID"]) + int(given.get("SLURM_STEP_ID", "0"))) % 50000
    return Launch(
        int(given["SLURM_PROCID"]),
        int(given["SLURM_STEP_NUM_TASKS"]),
        int(given["SLURM_LOCALID"]),
        tasks[int(given["SLURM_NODEID"])],
        given.get("MASTER_ADDR", first),
        int(given.get("MASTER_PORT", str(port))),
    )


@dataclass(frozen=True)
class Spread:
    """Rows that are spread over processes, in rank order. With one count nothing is communicated."""

    counts: tuple[int, ...]  # rows on each process
    rank: int = 0  # whose rows are our own

    @property
    def num_ranks(self) -> int:
        """How many processes hold rows."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """Rows over all processes."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Where our own rows are among all."""
        first = sum(self.counts[: self.rank])
        return slice(first, first + self.counts[self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """Our own rows (R, ...) -> the rows of all processes (G, ...). Not differentiable."""
        if self.num_ranks == 1:
            return rows
        longest = max(self.counts)
        padded = _padded(rows, longest)
        out = rows.new_empty((longest * self.num_ranks, *rows.shape[1:]))
        _all_gather(out, padded.contiguous())
        return self._without_padding(out)

    def sum_own(self, rows: Tensor) -> Tensor:
        """Something for the rows of all processes (G, ...) -> its sum over processes, for our own rows (R, ...)."""
        if self.num_ranks == 1:
            return rows
        longest = max(self.counts)
        if min(self.counts) < longest:
            rows = torch.cat([_padded(part, longest) for part in rows.split(list(self.counts))])
        out = rows.new_empty((longest, *rows.shape[1:]))
        _reduce_scatter(out, rows.contiguous())
        return out[: self.counts[self.rank]]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes; `values` is overwritten."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The maximum over processes; `values` is overwritten."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.num_ranks > 1:
            dist.all_reduce(values, how)
        return values

    def _without_padding(self, rows: Tensor) -> Tensor:
        longest = max(self.counts)
        if min(self.counts) == longest:
            return rows
        parts = rows.unflatten(0, (self.num_ranks, longest))
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])


def gather_counts(counts: Tensor) -> list[list[int]]:
    """Whole numbers (K,) of each process -> one list of K per process, in rank order."""
    if world_size() == 1:
        return [counts.tolist()]
    out = counts.new_empty(world_size() * len(counts))
    _all_gather(out, counts)
    split: list[list[int]] = out.unflatten(0, (world_size(), len(counts))).tolist()
    return split


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


def agreed(values: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers that every process goes on with, so that all decide alike.

    Args:
        values: (K,) on every process.
        flags: (F,) 0 or 1.

    Returns:
        Rank 0's values (K,); and for each flag (F,) how many processes raised it.
    """
    if world_size() == 1:
        return values, flags
    # A sum in which the others take no part: one exchange for both, and NaN stays NaN only where rank 0 has it.
    shared = torch.cat([values if is_main() else torch.zeros_like(values), flags.to(values)])
    dist.all_reduce(shared)
    return shared[: len(values)], shared[len(values) :]


def gather_objects(item: Any) -> list[Any]:
    """Something picklable of each process, in rank order, on every process."""
    if world_size() == 1:
        return [item]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, item)
    return found


def from_main(item: Any) -> Any:
    """Rank 0's `item`, which must be picklable, on every process."""
    if world_size() == 1:
        return item
    held = [item]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over ranks the gradients of parameters that no wrapper (DDP, FSDP) takes care of."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        return _equal_rows(rows).gather(rows)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return Spread((len(grad) // world_size(),) * world_size(), rank()).sum_own(grad)


def _equal_rows(rows: Tensor) -> Spread:
    return Spread((len(rows),) * world_size(), rank())


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows
