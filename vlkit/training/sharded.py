"""FSDP2 and whole tensors: how parameters are spread over processes, and how they come together again.

    shard(encoder)                                # each process keeps a share of every parameter
    weights = {name: whole(value) for name, value in encoder.weights().items()}     # on all processes at once
    parameter.copy_(placed_like(weights[name], parameter))

Functions that bring shares together are called by all processes in the same order.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import ParametrizationList

from vlkit.distributed import world_size


def shard(module: nn.Module) -> None:
    """FSDP2 on each block of its towers and on what remains; parameters of a single number stay whole.

    FSDP takes no parameters without dimensions (logit scale and bias), and in some models these have one; their
    gradients are averaged by `Parallel.finish`. Afterwards only the module's `forward` may be called, not methods of
    its children, and optimisers are made of the new parameters.
    """
    from torch.distributed.fsdp import fully_shard  # half a second that only this needs

    whole_ones = {parameter for parameter in module.parameters() if parameter.numel() == 1}
    for child in list(module.modules()):
        # LoRA's updates are lists of modules too; they belong to the block they change.
        if isinstance(child, nn.ModuleList) and not isinstance(child, ParametrizationList):
            for block in child:
                fully_shard(block, ignored_params=whole_ones)
    fully_shard(module, ignored_params=whole_ones)


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter is spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(value: Tensor) -> Tensor:
    """The full tensor, on every process; one that is not spread as it is."""
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full


def own_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    part: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return part


def spread_as(part: Tensor, target: Tensor) -> Tensor:
    """This process's part of something, as a tensor spread like `target`; the opposite of `own_part`."""
    if not isinstance(target, DTensor):
        return part
    return DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def placed_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, which every process has, spread as `target` is and in its memory layout and device."""
    if not isinstance(target, DTensor):
        return torch.empty_like(target, dtype=value.dtype).copy_(value)
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def load_whole(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, spread or not."""
    for name, target in targets.items():
        target.copy_(placed_like(values[name], target))


def without_mixture(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimiser groups of which each holds whole parameters or spread ones: fused kernels take no mixture.

    Args:
        groups: as for torch's optimisers, each with the names of its parameters under "names".
    """
    found = []
    for group in groups:
        named = list(zip(group["params"], group["names"], strict=True))
        for spread in (False, True):
            chosen = [pair for pair in named if isinstance(pair[0], DTensor) is spread]
            if chosen:
                params, names = map(list, zip(*chosen, strict=True))
                found.append({**group, "params": params, "names": names})
    return found


def apart(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(whole ones, spread ones): operations over lists take no mixture."""
    given = list(tensors)
    return (
        [one for one in given if not isinstance(one, DTensor)],
        [one for one in given if isinstance(one, DTensor)],
    )


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """() the Euclidean norm of all of them together; of spread ones over all processes."""
    from torch.nn.utils import get_total_norm

    plain, spread = apart(tensors)
    norm = get_total_norm(plain)
    if not spread:
        return norm
    squares = get_total_norm([own_part(one) for one in spread]).square()
    if world_size() > 1:
        dist.all_reduce(squares)
    return (squares + norm.to(squares) ** 2).sqrt()


@torch.no_grad()
def scale_gradients(parameters: Sequence[Tensor], norm: Tensor, most: float) -> None:
    """Shorten the gradients together from `norm` to `most` where they are longer."""
    from torch.nn.utils import clip_grads_with_norm_

    plain, spread = apart(parameters)
    clip_grads_with_norm_(plain, most, norm)
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for parameter in spread:
        if parameter.grad is not None:
            own_part(parameter.grad).mul_(factor)
