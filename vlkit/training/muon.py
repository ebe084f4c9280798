"""Muon: the hidden matrices of the towers move by orthogonal steps, everything else by AdamW.

    optim.name = "muon"

AdamW scales each number of a step on its own. Muon takes the momentum of a whole matrix and sets all of its singular
values to about one, so that rare directions move as far as common ones. Source: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/ (momentum after Nesterov, five Newton-Schulz steps and their coefficients);
the length of a step is that of Liu et al. 2025, arXiv:2502.16982: as long as AdamW's in the mean, so one learning rate
and one weight decay serve both.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlkit.training.sharded import own_part, placed_like, spread_as, whole

# x -> a x + b x^3 + c x^5 drives every singular value of (0, 1] to between 0.7 and 1.2 within five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_STEPS = 5
# AdamW's steps are this long in the mean, number by number (Liu et al., section 2.2).
_ADAMW_RMS = 0.2
_MOMENTUM = 0.95
# Attention keeps three matrices in one parameter, one below the other: under these names in torch and open_clip, and in
# timm.
_STACKED = {"in_proj_weight": 3, "qkv": 3}


class Muon(torch.optim.AdamW):
    """Muon over the matrices of groups that have "muon", AdamW over the other groups.

    A group with "muon" has it True, and the names of its parameters under "names": of one that stacks queries, keys and
    values each third is a matrix of its own. Parameters that FSDP spreads are brought together for their step, on all
    processes in the same order.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            groups: each with its "weight_decay".
            lr: learning rate; weights decay by it times their group's weight decay.
            betas, eps, fused: of AdamW.
            dtype: of the matrix products that make a step orthogonal; torch.bfloat16 is what the authors take. Default:
                that of the parameter.
        """
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; parameters without a gradient stay."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group.get("muon")]
        try:
            loss: float | None = super().step(closure)
        finally:
            self.param_groups = everything
        for group in everything:
            if group.get("muon"):
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, matrices_in(name), group["lr"], group["weight_decay"])
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, matrices: int, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            # AdamW's loading of a state looks for "step" in every parameter's.
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
        state["step"] += 1
        momentum, gradient = own_part(state["momentum"]), own_part(gradient)
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        ahead = whole(spread_as(gradient.lerp(momentum, _MOMENTUM), parameter))
        steps = [
            orthogonalized(part, self._dtype) * (_ADAMW_RMS * max(part.shape) ** 0.5) for part in ahead.chunk(matrices)
        ]
        own = own_part(parameter)
        own.mul_(1 - lr * weight_decay)
        own.add_(own_part(placed_like(torch.cat(steps), parameter)), alpha=-lr)


def orthogonalized(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(rows, columns) with the same singular vectors and singular values of about one (0.7 to 1.2).

    Args:
        matrix: (rows, columns); directions below about a thousandth of its length stay short.
        dtype: of the products; default: that of the matrix.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = (wide / wide.norm().clamp(min=1e-7)).to(dtype or matrix.dtype)
    for _ in range(_NUM_STEPS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    upright: Tensor = found if matrix.shape[0] <= matrix.shape[1] else found.T
    return upright.to(matrix.dtype)


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the parameters that Muon is meant for: weights of linear layers inside numbered blocks of a tower.

    Embeddings and projections into the joint space are the first and last layers, which the authors leave to AdamW, as
    they do with vectors. So are kernels of convolutions here, and the factors of LoRA, of which only the product is a
    weight.
    """
    owners = {
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | nn.MultiheadAttention) and any(part.isdigit() for part in name.split("."))
    }
    named = ((name, *name.rpartition("."), parameter) for name, parameter in module.named_parameters())
    return {name for name, owner, _, own, parameter in named if owner in owners and parameter.ndim == 2}


def matrices_in(name: str) -> int:
    """How many matrices a parameter stacks: three where attention keeps queries, keys and values in one."""
    owner, _, own = name.rpartition(".")
    return _STACKED.get(own, _STACKED.get(owner.rpartition(".")[2], 1))
