"""What a run writes down: one line of JSON a step in metrics.jsonl.

{"step": 20, "samples": 3072, "epoch": 0.5, "seconds": 4.1, "loss": 5.2, "parts": {"clip": 5.2}, "lr": 0.001,
 "grad_norm": 1.9, "logit_scale": 14.3, "samples_per_second": 750.1, "data_wait": 0.02,
 "tflops": 41.0, "mfu": 0.04, "peak_memory": 9123456789,         # of one device; "mfu" where its peak is known
 "contrastive_accuracy": 0.2, "param_norm": 90.1, "update_norm": 0.01,                          # each tenth step
 "eval": {"image_to_text/recall@1": 0.01, ...}}                  # "eval" only after steps that were evaluated
"""

import json
import os
from collections.abc import Iterator, Mapping
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

    def write(self, moment: Moment, extra: Mapping[str, float]) -> dict[str, Any]:
        """One line for one step, which is returned; after the evaluations whose results it should hold."""
        line = _line(moment, extra)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        return line

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


def _line(moment: Moment, extra: Mapping[str, float]) -> dict[str, Any]:
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
        **extra,
    }
    return {**line, "eval": dict(moment.metrics)} if moment.metrics else line
