"""One module on several processes: DDP and FSDP2 behind one way of calling them.

    parallel = on_ranks(module, "ddp", device)
    with parallel.sync(last=True):
        parallel.model(batch, step).total.backward()
    parallel.finish(module.parameters())

Gradients are averaged over processes afterwards, also those of parameters without dimensions (logit scale and bias),
which FSDP does not take.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlkit.distributed import average_gradients, world_size
from vlkit.training.sharded import is_sharded

How = Literal["ddp", "fsdp"]


class Parallel(NamedTuple):
    """A module as one of several processes calls it."""

    model: nn.Module  # call this
    # Around forward and backward. With last=False DDP leaves out the exchange of gradients, for more to be added.
    sync: Callable[[bool], AbstractContextManager[None]]
    # After the last backward, with all parameters: averages those gradients that the wrapper leaves alone.
    finish: Callable[[Iterable[nn.Parameter]], None]


def on_ranks(module: nn.Module, how: How, device: torch.device) -> Parallel:
    """Wrap a module for the processes that train together; on one process it stays as it is.

    Args:
        module: with "fsdp" its encoder was given to `sharded.shard` before the optimiser was made.
        how: "ddp": every process keeps all parameters; "fsdp": each keeps a share of them.
    """
    if world_size() == 1:
        return Parallel(module, lambda last: nullcontext(), lambda parameters: None)
    if how == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        # State of the losses, which keep it equal themselves: two numbers a sample are too many for each step.
        own = [name for name, _ in module.named_buffers() if name.startswith("objective.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, own)
        wrapped = DistributedDataParallel(module, device_ids=ids)
        known = {id(parameter) for parameter in module.parameters()}
        return Parallel(
            wrapped,
            lambda last: nullcontext() if last else wrapped.no_sync(),
            lambda parameters: average_gradients(p for p in parameters if id(p) not in known),
        )
    assert is_sharded(module), "shard(encoder) comes before the optimiser, and that before on_ranks"
    # Gradients are exchanged after each chunk: to add them up first would need all of them on every process.
    return Parallel(module, lambda last: nullcontext(), _average_unsharded)


def _average_unsharded(parameters: Iterable[nn.Parameter]) -> None:
    from torch.distributed.tensor import DTensor

    average_gradients(parameter for parameter in parameters if not isinstance(parameter, DTensor))
