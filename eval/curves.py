"""Curves out of per-sample tables, as PNG: calibration of a classifier, recall over the number of results."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics import expected_calibration_error, reliability
from vlkit.escape import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (6.0, 3.6)
_MAX_K = 100
_MAX_NAMES = 40


def curves_of(table: pa.Table) -> dict[str, bytes]:
    """The curves a table of items allows: title and PNG.

    Args:
        table: `per_item` of an evaluation: with `probability` and `hit@1`, or with `direction` and `rank`.
    """
    names = set(table.column_names)
    found = {}
    if {"probability", "hit@1"} <= names:
        found["Calibration"] = calibration_curve(_column(table, "probability"), _column(table, "hit@1"))
    if {"direction", "rank"} <= names:
        found["Recall over the number of results"] = recall_curve(table)
    return found


def calibration_curve(probability: NDArray[np.float64], right: NDArray[np.float64]) -> bytes:
    """Accuracy of the answers given with like probability, beside the diagonal of a calibrated classifier."""
    bins = reliability(torch.from_numpy(probability).clamp(0, 1), torch.from_numpy(right))
    error = expected_calibration_error(bins)
    figure, axes = _figure()
    filled = (bins.size > 0).numpy()
    shares = bins.size.numpy()[filled] / bins.size.sum().item()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
    axes.plot(bins.confidence.numpy()[filled], bins.accuracy.numpy()[filled], marker="o", label="measured")
    axes.bar(bins.confidence.numpy()[filled], shares, width=0.03, alpha=0.3, label="share of images")
    axes.set(xlabel="probability of the answer", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"expected calibration error {error:.1%}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def recall_curve(table: pa.Table) -> bytes:
    """Recall@K for K up to 100 in both directions; ties count with their expected rank."""
    figure, axes = _figure()
    direction = table["direction"].to_numpy(zero_copy_only=False)
    rank = _column(table, "rank")
    ks = np.arange(1, min(_MAX_K, max(2, len(rank))) + 1)
    for name, label in (("text_to_image", "images for a text"), ("image_to_text", "texts for an image")):
        ranks = np.sort(rank[direction == name])
        if len(ranks):
            axes.plot(ks, np.searchsorted(ranks, ks, side="right") / len(ranks), label=label)
    axes.set(xlabel="K results", ylabel="recall@K", xlim=(1, ks[-1]), ylim=(0, 1))
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)
    return _png(figure)


def confusion_picture(counts: Tensor, class_names: Sequence[str]) -> bytes:
    """A confusion matrix (C,C), each row scaled to its sum; names are written for up to 40 classes."""
    figure, axes = _figure((7.0, 6.4))
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(class_names) <= _MAX_NAMES:
        # Dollars would be read as formulas.
        names = [one_line(name, 24).replace("$", r"\$") for name in class_names]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    return _png(figure)


def _column(table: pa.Table, name: str) -> NDArray[np.float64]:
    return np.array(table[name].to_numpy(zero_copy_only=False), dtype=np.float64)


def _figure(size: tuple[float, float] = _SIZE) -> "tuple[Figure, Axes]":
    # Not pyplot: it keeps every figure and asks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # Without metadata the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
