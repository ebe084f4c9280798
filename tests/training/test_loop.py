"""The loop alone, on a model of one number: what happens when, and how it stops."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlkit.contracts import ImageTextBatch
from vlkit.errors import DataError
from vlkit.losses import LossOutput
from vlkit.settings import Duration
from vlkit.training.loop import Every, Moment, NonFiniteError, Pace, fit


def batches(values: Iterator[float]) -> Iterator[ImageTextBatch]:
    """Batches whose first pixel is the value."""
    for number, value in enumerate(values):
        nothing = torch.empty(0)
        images, ids = torch.tensor([[value]]), torch.tensor([number, number + 100])
        yield ImageTextBatch(images, nothing, nothing, ids, nothing, nothing, {}, [f"s/{number}", f"s/{number + 100}"])


class Number(nn.Module):
    """Loss = weight * value of the batch, so the gradient is that value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))
        self.seen: list[int] = []

    def step(self, batch: ImageTextBatch, i: int) -> LossOutput:
        self.seen.append(i)
        loss = self.weight * batch.images[0, 0]
        loss.backward()
        return LossOutput(loss, {"product": loss.detach()})


def run(every: list[Every] | None = None, values: Iterator[float] | None = None, **changes: Any) -> tuple[Number, int]:
    model = Number()
    settings: dict[str, Any] = {"steps": 6, "schedule": lambda i: 0.5, "pace": Pace(4, 3), **changes}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    source = batches(values or itertools.repeat(1.0))
    done = fit(model.step, source, optimizer, encoder=model, every=every or [], **settings)  # type: ignore[arg-type]
    return model, done


def note_steps(into: list[int]) -> Callable[[Moment], None]:
    return lambda moment: into.append(moment.step)


def test_every_step_moves_by_learning_rate_times_gradient() -> None:
    model, done = run(schedule=lambda i: float(i))
    assert done == 6
    assert model.seen == [0, 1, 2, 3, 4, 5]
    assert model.weight.item() == 10 - (0 + 1 + 2 + 3 + 4 + 5)


def test_what_a_moment_says() -> None:
    seen: list[Moment] = []
    model, _ = run([Every(Duration(1, "steps"), seen.append)], seconds=100.0, watch=lambda: {"w": torch.tensor(3.0)})
    moment = seen[3]
    assert (moment.step, moment.steps, moment.samples, moment.epoch, moment.last) == (4, 6, 16, 4 / 3, False)
    assert seen[5].last
    assert moment.loss == 10 - 3 * 0.5 and moment.parts == {"product": moment.loss} and moment.watched == {"w": 3.0}
    assert (moment.lr, moment.grad_norm) == (0.5, 1.0)
    assert 100 < moment.seconds < 200
    assert 0 <= moment.data_wait <= 1 and moment.samples_per_second > 0
    assert moment.encoder is model


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        (Duration(2, "steps"), [2, 4, 6, 7]),
        (Duration(1, "epochs"), [3, 6, 7]),
        (Duration(0.5, "epochs"), [2, 3, 5, 6, 7]),
        (Duration(10, "samples"), [3, 5, 7]),
        (Duration(1000, "seconds"), [7]),
        ("signal", []),
    ],
)
def test_when_entries_are_due_always_after_the_last_step(when: Any, steps: list[int]) -> None:
    seen: list[int] = []
    run([Every(when, note_steps(seen))], steps=7)
    assert seen == steps


def test_a_resumed_run_does_what_is_due_at_the_same_steps() -> None:
    seen: list[int] = []
    model, _ = run(
        [Every(Duration(2, "steps"), note_steps(seen)), Every(Duration(1, "epochs"), note_steps(seen))], start=2
    )
    assert model.seen == [2, 3, 4, 5]
    assert seen == [3, 4, 6, 6]


def test_seconds_pass_while_entries_run() -> None:
    seen: list[int] = []
    ticks = iter(float(tick) for tick in range(1000))

    def slow(moment: Moment) -> None:
        torch.zeros(400, 400) @ torch.zeros(400, 400)

    run([Every(Duration(1, "steps"), slow), Every(Duration(1e-9, "seconds"), note_steps(seen))], values=ticks)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_metrics_reach_later_entries_of_the_same_step() -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    run(
        [
            Every(Duration(3, "steps"), lambda moment: {"a": float(moment.step)}),
            Every(Duration(1, "steps"), lambda moment: {"b": 1.0} if moment.step == 3 else None),
            Every(Duration(1, "steps"), lambda moment: seen.append((moment.step, dict(moment.metrics)))),
        ]
    )
    assert seen == [(1, {}), (2, {}), (3, {"a": 3.0, "b": 1.0}), (4, {}), (5, {}), (6, {"a": 6.0})]


def test_stop_runs_the_signal_entries_and_ends() -> None:
    saved: list[int] = []
    evaluated: list[int] = []
    answers = iter([False, False, True])
    _, done = run(
        [Every("signal", note_steps(saved)), Every(Duration(5, "steps"), note_steps(evaluated))],
        stop=lambda: next(answers),
    )
    assert (done, saved, evaluated) == (3, [3], [])


def test_long_gradients_are_shortened_and_reported_as_they_were() -> None:
    norms: list[float] = []
    model, _ = run(
        [Every(Duration(1, "steps"), lambda moment: norms.append(moment.grad_norm))],
        values=iter([4.0, 0.5]), steps=2, clip_norm=1.0,
    )  # fmt: skip
    assert norms == [4.0, 0.5]
    assert model.weight.item() == pytest.approx(10 - 0.5 * (1 + 0.5), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(bad: float) -> None:
    model = Number()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(NonFiniteError, match=r"step 3, with the samples s/2, s/102\.") as raised:
        fit(
            model.step, batches(iter([1.0, 1.0, bad])), optimizer, steps=9, schedule=lambda i: 1.0, pace=Pace(2, 9),
            encoder=model,  # type: ignore[arg-type]
        )  # fmt: skip
    assert model.weight.item() == 8
    record = raised.value.record
    assert record["keys"] == ["s/2", "s/102"] and record["ids"] == [2, 102] and record["step"] == 3
    assert record["loss"] == str(bad)


def test_a_gradient_that_is_no_number_stops_too() -> None:
    def step(batch: ImageTextBatch, i: int) -> LossOutput:
        loss = (weight - 1).sqrt()  # 0, and its slope there is infinite
        loss.backward()
        return LossOutput(loss, {})

    weight: Tensor = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match=r"loss is 0\.0 and the gradient norm inf"):
        fit(
            step, batches(itertools.repeat(1.0)), torch.optim.SGD([weight]), steps=1, schedule=lambda i: 1.0,
            pace=Pace(2, 9), encoder=nn.Linear(1, 1),  # type: ignore[arg-type]
        )  # fmt: skip
    assert weight.item() == 1


def test_batches_that_run_out() -> None:
    with pytest.raises(DataError, match="ended after step 2; 6 steps were asked for"):
        run(values=iter([1.0, 1.0]))
