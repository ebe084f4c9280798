"""What a training run shows: a bar on a terminal, else a line every ten seconds. And how signals stop it."""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vlkit.cli.console import log, say

if TYPE_CHECKING:
    from vlkit.training.loop import Moment

_SECONDS_BETWEEN_LINES = 10.0
_STEPS_AVERAGED = 100


class LiveLine:
    """Shows loss, temperature, speed, waiting for data and time left. `update` is an entry of `every`."""

    def __init__(self, bar: Progress) -> None:
        self.moment: Moment | None = None  # the last one shown
        self._bar = bar
        self._task = bar.add_task("training", total=None, line="starting")
        self._recent: deque[tuple[float, float]] = deque(maxlen=_STEPS_AVERAGED)  # seconds of a step, of its waiting
        self._next_line = 0.0

    def update(self, moment: "Moment") -> None:
        """Show a step."""
        batch_size = moment.samples / moment.step
        if self.moment is not None:  # the first step waits for workers to start and says nothing about the others
            seconds = batch_size / moment.samples_per_second
            self._recent.append((seconds, seconds * moment.data_wait))
        self.moment = moment
        line = self._line(moment, batch_size)
        self._bar.update(self._task, completed=moment.step, total=moment.steps, line=escape_markup(line))
        quiet = self._bar.disable
        if quiet and (time.monotonic() >= self._next_line or moment.last):
            say(f"step {moment.step}/{moment.steps}  {line}")
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        if moment.metrics:
            values = "  ".join(f"{name} {value:.4f}" for name, value in moment.metrics.items())
            text = f"step {moment.step}: {values}"
            say(text) if quiet else self._bar.console.print(text)

    def _line(self, moment: "Moment", batch_size: float) -> str:
        state = f"loss {moment.loss:.3f}  temperature {1 / moment.watched['logit_scale']:.4f}"
        if not self._recent:
            return state
        seconds, waiting = (sum(column) for column in zip(*self._recent, strict=True))
        per_step = seconds / len(self._recent)
        left = _clock(per_step * (moment.steps - moment.step))
        return f"{state}  {batch_size / per_step:.0f} samples/s  data wait {waiting / seconds:.0%}  left {left}"


@contextmanager
def live_line() -> Iterator[LiveLine]:
    """A line that is there until the block ends."""
    console = log()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[line]}"), console=console, disable=not console.is_terminal) as bar:
        yield LiveLine(bar)


class StopRequest:
    """Called by the training loop after each step: True once a signal asked to stop."""

    def __init__(self) -> None:
        self.signal = 0  # the number of the signal
        self.save = False  # whether a checkpoint was asked for
        self.training = False  # whether a step was done

    def __call__(self) -> bool:
        """Whether to stop."""
        self.training = True
        return self.signal != 0

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since this was last called."""
        asked, self.save = self.save, False
        return asked


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGTERM or Ctrl-C end training after the current step, with a checkpoint; SIGUSR1 only has one saved.

    Before the first step, or when it comes a second time, a signal that ends training ends the command at once.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if not request.training or request.signal:
            raise SystemExit(128 + number)
        request.signal = number

    def note(number: int, frame: FrameType | None) -> None:
        request.save = True

    if threading.current_thread() is not threading.main_thread():  # where Python takes no handlers
        yield request
        return
    handlers = {signal.SIGTERM: handle, signal.SIGINT: handle}
    if sys.platform != "win32":
        handlers[signal.SIGUSR1] = note
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
