"""The only training loop.

    fit(step, batches, optimizer, steps=1000, schedule=lambda i: 1e-3, pace=Pace(batch_size=256, steps_per_epoch=40),
        encoder=encoder, every=[Every(Duration(100, "steps"), evaluate), Every(Duration(1, "epochs"), save)])

    def evaluate(moment):
        return {"text_to_image/recall@1": recall(moment.encoder)}     # later entries see it in moment.metrics

`step(batch, i)` computes the losses of batch `i` and has already called backward. Methods of training differ in
their `step`; evaluation, checkpoints and progress are entries of `every`, which run in the order of that list.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vlkit.contracts import ImageTextBatch
from vlkit.errors import DataError, VlkitError
from vlkit.losses.objective import LossOutput
from vlkit.models.dual_encoder import DualEncoder
from vlkit.settings import Duration


class Pace(NamedTuple):
    """What turns steps into samples and epochs."""

    batch_size: int  # over all processes
    steps_per_epoch: int


@dataclass(frozen=True)
class Moment:
    """What an entry of `every` is told after a step."""

    step: int  # steps done
    steps: int  # of so many
    samples: int
    epoch: float
    seconds: float  # spent in training so far, over all resumes
    lr: float
    loss: float
    parts: Mapping[str, float]
    watched: Mapping[str, float]  # e.g. logit_scale
    grad_norm: float  # before it was clipped
    samples_per_second: float  # of this step
    data_wait: float  # fraction of this step spent waiting for its batch
    stopping: bool  # a signal asked to stop after this step
    metrics: Mapping[str, float]  # what earlier entries of `every` returned after this step
    encoder: DualEncoder = field(repr=False)

    @property
    def last(self) -> bool:
        """Whether the run is complete."""
        return self.step == self.steps


# May return metrics, which later entries see in `moment.metrics`.
Action = Callable[[Moment], Mapping[str, float] | None]


@dataclass(frozen=True)
class Every:
    """Something to do every so often, and always after the last step; or when a signal asks the run to stop."""

    when: Duration | Literal["signal"]
    action: Action

    def due(self, before: float, now: float, moment: Moment) -> bool:
        """Whether a multiple of `when` lies between two counts of its unit, the later one included."""
        if isinstance(self.when, str):
            return moment.stopping and not moment.last
        # A hair above, because a count of epochs may fall short of a whole number by a rounding error.
        periods = [math.floor(count / self.when.amount + 1e-9) for count in (before, now)]
        return moment.last or periods[0] < periods[1]


class NonFiniteError(VlkitError):
    """The loss or its gradient is not a finite number. `record` says where, in JSON types."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        keys = record["keys"]
        named = ", ".join(keys[:4]) + (f", ... ({len(keys)} in all)" if len(keys) > 4 else "")
        super().__init__(
            f"The loss is {record['loss']} and the gradient norm {record['grad_norm']} in step {record['step']}, "
            f"with the samples {named}. The weights were not changed by this step. Lower optim.lr, set "
            "optim.clip_norm, or look at these samples; --resume continues from the last checkpoint."
        )


def fit(
    step: Callable[[ImageTextBatch, int], LossOutput],
    batches: Iterable[ImageTextBatch],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    schedule: Callable[[int], float],
    pace: Pace,
    encoder: DualEncoder,
    every: Sequence[Every] = (),
    start: int = 0,
    seconds: float = 0.0,
    clip_norm: float | None = None,
    watch: Callable[[], Mapping[str, Tensor]] = dict,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train from step `start` up to `steps`.

    Args:
        step: computes the losses of a batch and calls backward.
        batches: the batches from step `start` on.
        optimizer: over the parameters to train.
        schedule: step -> learning rate.
        pace: what turns steps into samples and epochs.
        encoder: handed to the entries of `every`.
        every: what else happens, and when.
        seconds: what earlier parts of the run took.
        clip_norm: longer gradients are shortened to this.
        watch: () values to record beside the loss.
        stop: asked after each step; True ends training after the entries that wait for a signal.

    Returns:
        Steps done; fewer than `steps` when stopped.

    Raises:
        NonFiniteError: loss or gradient is not finite; the weights are those before the step.
        DataError: the batches ran out.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stream = iter(batches)
    began = time.perf_counter() - seconds
    counts = [_count(entry, start, seconds, pace) for entry in every]
    for i in range(start, steps):
        asked = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            raise DataError(f"The batches ended after step {i}; {steps} steps were asked for.")
        received = time.perf_counter()

        lr = _set_learning_rate(optimizer, schedule(i))
        optimizer.zero_grad(set_to_none=True)
        output = step(batch, i)
        norm = _clip_gradients(parameters, clip_norm)
        loss, grad_norm, parts, watched = _to_host(output.total, norm, output.parts, watch())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            numbers = {"loss": loss, "grad_norm": grad_norm, "lr": lr, **parts, **watched}
            raise NonFiniteError(_place(i, numbers, batch))
        optimizer.step()

        done = time.perf_counter()
        moment = Moment(
            step=i + 1,
            steps=steps,
            samples=(i + 1) * pace.batch_size,
            epoch=(i + 1) / pace.steps_per_epoch,
            seconds=done - began,
            lr=lr,
            loss=loss,
            parts=parts,
            watched=watched,
            grad_norm=grad_norm,
            samples_per_second=pace.batch_size / (done - asked),
            data_wait=(received - asked) / (done - asked),
            stopping=stop(),
            metrics={},
            encoder=encoder,
        )
        for position, entry in enumerate(every):
            before, counts[position] = counts[position], _count(entry, i + 1, moment.seconds, pace)
            if entry.due(before, counts[position], moment):
                moment = replace(moment, metrics={**moment.metrics, **(entry.action(moment) or {})})
        if moment.stopping:
            return i + 1
    return steps


def _count(entry: Every, step: int, seconds: float, pace: Pace) -> float:
    """How much has passed, in the unit an entry counts in."""
    if isinstance(entry.when, str):
        return 0.0
    passed = {
        "steps": step,
        "samples": step * pace.batch_size,
        "epochs": step / pace.steps_per_epoch,
        "seconds": seconds,
    }
    return passed[entry.when.unit]


def _set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _clip_gradients(parameters: Sequence[Tensor], clip_norm: float | None) -> Tensor:
    """Shorten the gradients together to `clip_norm` where they are longer; their norm () before that."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients)
    if clip_norm is not None:
        clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def _to_host(
    loss: Tensor, grad_norm: Tensor, parts: Mapping[str, Tensor], watched: Mapping[str, Tensor]
) -> tuple[float, float, dict[str, float], dict[str, float]]:
    """All values of a step in one copy, because each copy waits for the device."""
    values = [loss, grad_norm, *parts.values(), *watched.values()]
    numbers = torch.stack([value.detach().float().reshape(()) for value in values]).tolist()
    split = 2 + len(parts)
    return (
        numbers[0],
        numbers[1],
        dict(zip(parts, numbers[2:split], strict=True)),
        dict(zip(watched, numbers[split:], strict=True)),
    )


def _place(step: int, numbers: Mapping[str, float], batch: ImageTextBatch) -> dict[str, Any]:
    # As text where JSON has no such number.
    record = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
    return {"step": step + 1, **record, "keys": list(batch.keys), "ids": batch.ids.tolist()}
