"""What a run writes down: one line of JSON a step in metrics.jsonl, and the curves in loss.png.

{"step": 12, "samples": 3072, "epoch": 0.5, "seconds": 4.1, "loss": 5.2, "parts": {"clip": 5.2}, "lr": 0.001,
 "grad_norm": 1.9, "logit_scale": 14.3, "samples_per_second": 750.1, "data_wait": 0.02,
 "eval": {"image_to_text/recall@1": 0.01, ...}}                  # "eval" only after steps that were evaluated
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlkit.errors import CheckpointError
from vlkit.training.loop import Moment


class MetricsLog:
    """Appends to metrics.jsonl. After a resume the file is cut back, so that it holds each step once.

    Args:
        path: the file; what it holds of later steps than `step` is removed.
        step: the steps that are done already.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        cut_back(path, step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, moment: Moment) -> None:
        """One line for one step. Make it an entry of `every` after the evaluations whose results it should hold."""
        self._file.write(json.dumps(_line(moment), allow_nan=False) + "\n")
        self._file.flush()

    def secure(self) -> None:
        """Have everything on the disk, so that a checkpoint saved next is never ahead of this file."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a crash cut short ends it."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


def cut_back(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and what a crash cut short."""
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from error


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draw the loss over steps, and the evaluations below it where there are any."""
    # Figure instead of pyplot: no window system is asked, no global state is touched.
    from matplotlib.figure import Figure

    lines = list(read_metrics(metrics))
    curves = _evaluations(lines)
    figure = Figure(figsize=(8, 7 if curves else 4), layout="constrained")
    axes = figure.subplots(2 if curves else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1)
    axes[0].set_ylabel("loss (nats)")
    for name, points in curves.items():
        axes[-1].plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
    if curves:
        axes[-1].set_ylabel("fraction")
        axes[-1].legend(fontsize="small")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


def _line(moment: Moment) -> dict[str, Any]:
    line = {
        "step": moment.step,
        "samples": moment.samples,
        "epoch": moment.epoch,
        "seconds": moment.seconds,
        "loss": moment.loss,
        "parts": dict(moment.parts),
        "lr": moment.lr,
        "grad_norm": moment.grad_norm,
        **moment.watched,
        "samples_per_second": moment.samples_per_second,
        "data_wait": moment.data_wait,
    }
    return {**line, "eval": dict(moment.metrics)} if moment.metrics else line


def _evaluations(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.get("eval", {}).items():
            curves.setdefault(name, []).append((line["step"], value))
    return curves
