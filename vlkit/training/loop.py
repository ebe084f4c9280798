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

from vlkit.contracts import ImageTextBatch
from vlkit.distributed import agreed, gather_objects, world_size
from vlkit.errors import DataError, VlkitError
from vlkit.losses.objective import LossOutput
from vlkit.models.dual_encoder import DualEncoder
from vlkit.settings import Duration
from vlkit.training.sharded import own_part, scale_gradients, spread_as, total_norm


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
    asked: bool  # a signal asked for a checkpoint after this step
    metrics: Mapping[str, float]  # what earlier entries of `every` returned after this step
    keys: Sequence[str] = field(repr=False)  # of this process's samples
    encoder: DualEncoder = field(repr=False)

    @property
    def last(self) -> bool:
        """Whether the run is complete."""
        return self.step == self.steps


# May return metrics, which later entries see in `moment.metrics`.
Action = Callable[[Moment], Mapping[str, float] | None]


@dataclass(frozen=True)
class Every:
    """Something to do every so often, and always after the last step; or when a signal asks for it."""

    when: Duration | Literal["signal"]
    action: Action
    reads_encoder: bool = True  # False spares the preparations that an evaluation needs

    def due(self, before: float, now: float, moment: Moment) -> bool:
        """Whether a multiple of `when` lies between two counts of its unit, the later one included."""
        if isinstance(self.when, str):
            return (moment.stopping or moment.asked) and not moment.last
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
    norms_every: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    save_now: Callable[[], bool] = lambda: False,
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
        norms_every: after so many steps record the norm of the parameters and of what the step changed in them.
        stop: asked in each step; True in any process ends training after it, and after the entries that wait for a
            signal.
        save_now: asked in each step; True in any process has those entries done.

    With several processes all call this alike. Loss, time and the wish to stop are agreed on in each step, so that
    all do the same afterwards; values are those of the main process.

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
        values = {"loss": output.total, "grad_norm": norm, **watch()}
        here = _agree(values, output.parts, time.perf_counter() - began, (stop(), save_now()))
        if here.broken:
            raise NonFiniteError(_place(i, {**here.values, **here.parts, "lr": lr}, batch))
        norms = norms_every is not None and (i + 1) % norms_every == 0
        changed = _step_and_measure(optimizer, parameters) if norms else _step(optimizer)

        done = time.perf_counter()
        loss, grad_norm = here.values.pop("loss"), here.values.pop("grad_norm")
        moment = Moment(
            step=i + 1,
            steps=steps,
            samples=(i + 1) * pace.batch_size,
            epoch=(i + 1) / pace.steps_per_epoch,
            seconds=here.seconds,
            lr=lr,
            loss=loss,
            parts=here.parts,
            watched={**here.values, **changed},
            grad_norm=grad_norm,
            samples_per_second=pace.batch_size / (done - asked),
            data_wait=(received - asked) / (done - asked),
            stopping=here.stopping,
            asked=here.asked,
            metrics={},
            keys=batch.keys,
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
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def _clip_gradients(parameters: Sequence[Tensor], clip_norm: float | None) -> Tensor:
    """Shorten the gradients together to `clip_norm` where they are longer; their norm () before that."""
    norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if clip_norm is not None:
        scale_gradients(parameters, norm, clip_norm)
    return norm


def _step(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    optimizer.step()
    return {}


@torch.no_grad()
def _step_and_measure(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, float]:
    """Take the step and say how long the parameters are, and how far they went."""
    # The copy costs no memory at the peak: activations are gone by now.
    before = [own_part(parameter).detach().clone() for parameter in parameters]
    length = total_norm([parameter.detach() for parameter in parameters])
    optimizer.step()
    for old, parameter in zip(before, parameters, strict=True):
        old.sub_(own_part(parameter))
    moved = [spread_as(old, parameter) for old, parameter in zip(before, parameters, strict=True)]
    return dict(zip(("param_norm", "update_norm"), torch.stack([length, total_norm(moved)]).tolist(), strict=True))


class _Agreed(NamedTuple):
    """What all processes go on with after forward and backward."""

    values: dict[str, float]
    parts: dict[str, float]
    seconds: float
    stopping: bool
    asked: bool
    broken: bool  # loss or gradient is no finite number in some process


def _agree(
    values: Mapping[str, Tensor], parts: Mapping[str, Tensor], seconds: float, asked: tuple[bool, bool]
) -> _Agreed:
    """The main process's values, in one copy to the host, because each copy waits for the device."""
    measured = torch.stack([value.detach().float().reshape(()) for value in [*values.values(), *parts.values()]])
    broken = ~measured[:2].isfinite().all()
    own = measured.new_tensor([seconds, *map(float, asked)], dtype=torch.float64 if world_size() > 1 else None)
    shared, flags = agreed(torch.cat([measured, own[:1]]), torch.cat([own[1:], broken.to(own)[None]]))
    *numbers, of_main, stopping, saving, any_broken = torch.cat([shared, flags]).tolist()
    split = len(values)
    return _Agreed(
        dict(zip(values, numbers[:split], strict=True)),
        dict(zip(parts, numbers[split:], strict=True)),
        of_main if world_size() > 1 else seconds,
        stopping > 0,
        saving > 0,
        any_broken > 0,
    )


def _place(step: int, numbers: Mapping[str, float], batch: ImageTextBatch) -> dict[str, Any]:
    # As text where JSON has no such number.
    record = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
    # Of all processes: which of them has the broken sample is not known.
    shares = gather_objects((list(batch.keys), batch.ids.tolist()))
    keys, ids = ([item for share in shares for item in share[part]] for part in (0, 1))
    return {"step": step + 1, **record, "keys": keys, "ids": ids}
