"""Training of prompts around a frozen encoder: CoOp's protocol on the one training loop.

steps = fit_prompts([context], Plan(epochs=50), len(labels), loss, encoder, seed=0)     # loss(rows) -> ()

The learning rate is that of CoOp: a first epoch at 1e-5, then half a cosine to zero. With `max_seconds` the cosine
runs by the clock where the clock is ahead of the steps, so that a run that is cut short has still come to rest.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlkit.addons.feature_training import MOMENTUM, WARMUP_LR
from vlkit.contracts import ImageTextBatch, Progress
from vlkit.errors import ConfigError
from vlkit.losses.objective import LossOutput
from vlkit.models.dual_encoder import DualEncoder
from vlkit.training.loop import NonFiniteError, Pace, fit

# Standard deviation of vectors that start at random.
RANDOM_STD = 0.02


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Attributes:
        epochs: passes over the items.
        lr: at the start of the cosine.
        batch_size: items a step.
        max_seconds: training ends after so long at the latest; None sets no limit.
        optimizer: which one.
        momentum: of sgd.
        weight_decay: of the optimizer.
        nesterov: of sgd.
        warmup_epochs: first epochs, at 1e-5; none where there is only one epoch.
    """

    epochs: int
    lr: float = 0.002
    batch_size: int = 32
    max_seconds: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = MOMENTUM
    weight_decay: float = 5e-4
    nesterov: bool = False
    warmup_epochs: int = 1

    def rate(self, step: int, steps: int, per_epoch: int, share_of_time: float) -> float:
        """The learning rate of a step, where `share_of_time` of `max_seconds` is gone."""
        warmup = min(self.warmup_epochs, self.epochs - 1) * per_epoch
        if step < warmup:
            return min(WARMUP_LR, self.lr)
        done = max((step - warmup) / max(steps - warmup, 1), share_of_time)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def epochs_of(shots: int) -> int:
    """CoOp's: 50 for one image a class, 100 for two to four, 200 for more."""
    return 50 if shots <= 1 else 100 if shots <= 4 else 200


def fit_prompts(
    parameters: Sequence[Tensor],
    plan: Plan,
    num_items: int,
    loss: Callable[[Tensor], Tensor],
    encoder: DualEncoder,
    seed: int,
    progress: Progress | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> int:
    """Change the parameters in place.

    Args:
        parameters: leaf tensors that require gradients.
        plan: how long and how fast.
        num_items: n.
        loss: some of the n rows (b,) to their mean loss ().
        encoder: held frozen meanwhile, but for parameters of its own among these.
        seed: of the order of the items.
        progress: called with (done, total) steps.
        after_epoch: called with the number of each whole epoch that is done, from 0, without gradients.

    Returns:
        Steps taken.

    Raises:
        ConfigError: training diverged, or the plan has no epoch.
    """
    if plan.epochs < 1 or plan.batch_size < 1 or plan.lr < 0:
        raise ConfigError(f"{plan.epochs} epochs, batches of {plan.batch_size}, lr {plan.lr}: nothing can be trained.")
    if plan.max_seconds is not None and plan.max_seconds <= 0:
        raise ConfigError(f"max_seconds is {plan.max_seconds}; expected a positive time, or none.")
    per_epoch = math.ceil(num_items / plan.batch_size)
    steps = plan.epochs * per_epoch
    began = time.perf_counter()

    def gone() -> float:
        return 0.0 if plan.max_seconds is None else (time.perf_counter() - began) / plan.max_seconds

    def step(batch: ImageTextBatch, number: int) -> LossOutput:
        total = loss(batch.ids)
        total.backward()
        if progress:
            progress(number + 1, steps)
        if after_epoch and number and number % per_epoch == 0:
            with torch.no_grad():
                after_epoch(number // per_epoch - 1)
        return LossOutput(total.detach(), {})

    with torch.inference_mode(False), torch.enable_grad(), frozen(encoder, but=parameters):
        try:
            done = fit(
                step,
                _batches(num_items, plan, seed),
                _optimizer(parameters, plan),
                steps=steps,
                schedule=lambda number: plan.rate(number, steps, per_epoch, gone()),
                pace=Pace(plan.batch_size, per_epoch),
                encoder=encoder,
                stop=lambda: gone() >= 1,
            )
        except NonFiniteError as error:
            raise ConfigError(
                f"Training of the prompts diverged in step {error.record['step']} of {steps}: loss "
                f"{error.record['loss']} at learning rate {error.record['lr']:.2g}. Lower lr (it was {plan.lr:g})."
            ) from error
        if after_epoch and done % per_epoch == 0:
            with torch.no_grad():
                after_epoch(done // per_epoch - 1)
    return done


@contextmanager
def frozen(encoder: nn.Module, but: Sequence[Tensor] = ()) -> Iterator[None]:
    """The encoder in evaluation mode without gradients of its own, `but` some; afterwards as it was."""
    kept = {id(one) for one in but}
    training = encoder.training
    wanted = [one for one in encoder.parameters() if one.requires_grad and id(one) not in kept]
    for one in wanted:
        one.requires_grad_(False)
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(training)
        for one in wanted:
            one.requires_grad_(True)


def parameter(start: Tensor) -> Tensor:
    """A copy that can be trained, in float32."""
    with torch.inference_mode(False):
        return start.detach().float().clone().requires_grad_()


def _optimizer(parameters: Sequence[Tensor], plan: Plan) -> torch.optim.Optimizer:
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(parameters, plan.lr, weight_decay=plan.weight_decay)
    return torch.optim.SGD(
        parameters, plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, nesterov=plan.nesterov
    )


def _batches(num_items: int, plan: Plan, seed: int) -> Iterator[ImageTextBatch]:
    """Rows of the items, `ids`, in a fresh order each epoch; their features are the caller's."""
    random = torch.Generator().manual_seed(seed)
    nothing = torch.empty(0, dtype=torch.int64)
    for _ in range(plan.epochs):
        for rows in torch.randperm(num_items, generator=random).split(plan.batch_size):
            yield ImageTextBatch(
                images=torch.empty(0),
                tokens=nothing,
                text_to_image=nothing,
                ids=rows,
                caption_hash=nothing,
                valid=torch.ones(len(rows), dtype=torch.bool),
                extra={},
                keys=[],
            )
