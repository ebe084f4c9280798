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
        module: with "fsdp" its parameters are replaced by sharded ones, so optimisers are made afterwards; then
            only its `forward` may be called, not methods of its children.
        how: "ddp": every process keeps all parameters; "fsdp": each keeps a share of them.
    """
    if world_size() == 1:
        return Parallel(module, lambda last: nullcontext(), lambda parameters: None)
    if how == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(module, device_ids=ids)
        known = {id(parameter) for parameter in module.parameters()}
        return Parallel(
            wrapped,
            lambda last: nullcontext() if last else wrapped.no_sync(),
            lambda parameters: average_gradients(p for p in parameters if id(p) not in known),
        )
    shard(module)
    # Gradients are exchanged after each chunk: to add them up first would need all of them on every process.
    return Parallel(module, lambda last: nullcontext(), _average_unsharded)


def shard(module: nn.Module) -> None:
    """FSDP2 on each block of its towers and on what remains; parameters without dimensions stay whole."""
    from torch.distributed.fsdp import fully_shard  # half a second that only this needs

    whole = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for child in list(module.modules()):
        if isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(block, ignored_params=whole)
    fully_shard(module, ignored_params=whole)


def _average_unsharded(parameters: Iterable[nn.Parameter]) -> None:
    from torch.distributed.tensor import DTensor

    average_gradients(parameter for parameter in parameters if not isinstance(parameter, DTensor))
