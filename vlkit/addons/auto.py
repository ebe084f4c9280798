"""Which method suits some labelled images: several are fitted and compared on images that none of them has seen.

    choice = choose(reference, source)
    choice.adapted.addon, choice.why

Half of the validation images of each class serve the methods themselves, to choose their constants on; the other half
compares them. The winner is then fitted again with all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlkit.addons.adapt import Adapted, as_used
from vlkit.addons.base import AddOn
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, VlkitError
from vlkit.features.source import FeatureSource

# In the order in which equals are preferred: what is fitted faster comes first.
CANDIDATES = ("lp_plus_plus", "clap", "tip_adapter_f", "kgcoop")
ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Compared:
    """One method.

    Attributes:
        name: of the method.
        accuracy: on the images that compare; None where it could not be fitted.
        seconds: to fit and measure it.
        other_classes: whether it can name further classes afterwards.
        reason: why it could not be fitted.
    """

    name: str
    accuracy: float | None
    seconds: float
    other_classes: bool
    reason: str = ""


class Choice(NamedTuple):
    """The outcome."""

    compared: tuple[Compared, ...]  # zero-shot first
    adapted: Adapted  # the winner, with the two values of the comparison
    why: str


def choose(
    reference: Reference,
    source: FeatureSource,
    templates: str | Sequence[str] = DEFAULT_TEMPLATES,
    candidates: Sequence[str] = CANDIDATES,
    progress: Progress | None = None,
) -> Choice:
    """Fit the candidates, compare them, fit the best again.

    Args:
        reference: with few-shot and validation images.
        source: the model.
        templates: of the zero-shot weights.
        candidates: names of methods, earlier ones preferred among equals.
        progress: called with (done, total) fits.

    Raises:
        ConfigError: no validation images, or no candidate can be fitted.
    """
    if reference.val is None or reference.val.labels is None or not len(reference.val):
        raise ConfigError(
            "auto compares methods on validation images, and there are none: give more images, fewer --shots, or "
            "others with --val DIR. Or name a method; clap needs no validation."
        )
    tuning, comparing = halves(reference.val.labels)
    inner = replace(reference, val=reference.val.rows(tuning) if tuning else None)
    judged = reference.val.rows(comparing)
    rows, right = [], {}
    for number, name in enumerate((ZERO_SHOT, *candidates)):
        began = time.perf_counter()
        addon = None if name == ZERO_SHOT else make_addon(name)
        try:
            right[name] = _right(addon, inner, judged, source, templates)
        except VlkitError as error:
            rows.append(Compared(name, None, time.perf_counter() - began, False, str(error)))
            continue
        finally:
            if progress:
                progress(number + 1, len(candidates) + 2)
        can = addon is None or addon.any_classes
        rows.append(Compared(name, right[name].double().mean().item(), time.perf_counter() - began, can))
    fitted = [name for name in candidates if name in right]
    if not fitted:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in rows if row.reason)
        raise ConfigError(f"None of the candidates can be fitted. {reasons}")
    best = max(fitted, key=lambda name: int(right[name].sum()))  # of equals the first
    pipeline = Pipeline([make_addon(best)]).fit(reference, source, templates)
    if progress:
        progress(len(candidates) + 2, len(candidates) + 2)
    values = [right[name].double().mean().item() for name in (ZERO_SHOT, best)]
    return Choice(tuple(rows), Adapted(pipeline.addons[0], values[0], values[1]), _why(best, fitted, right))


def halves(labels: Tensor) -> tuple[list[int], list[int]]:
    """Rows for the methods themselves, and rows to compare them on; a class's only image compares."""
    tuning: list[int] = []
    comparing: list[int] = []
    for one in labels.unique().tolist():
        rows = (labels == one).nonzero().flatten().tolist()
        tuning += rows[: len(rows) // 2]
        comparing += rows[len(rows) // 2 :]
    return tuning, comparing


def _right(
    addon: AddOn | None, reference: Reference, judged: Part, source: FeatureSource, templates: str | Sequence[str]
) -> Tensor:
    """(n,) bool: the judged images that are named rightly."""
    pipeline = PLAIN if addon is None else Pipeline([addon]).fit(reference, source, templates)
    classifier = pipeline.classifier(reference.class_names, source, templates)
    logits = classifier.logits(as_used(pipeline, judged, reference.passes))
    assert judged.labels is not None
    return logits.argmax(1) == judged.labels


def _why(best: str, fitted: Sequence[str], right: dict[str, Tensor]) -> str:
    count = len(right[best])
    words = f"{best} is chosen: {int(right[best].sum())} of {count} images right that no method had seen"
    others = [name for name in fitted if name != best]
    if others:
        second = max(others, key=lambda name: int(right[name].sum()))
        words += f", {second} {int(right[second].sum())}"
        words += _doubt(right[best], right[second])
    plain = int(right[ZERO_SHOT].sum())
    if plain >= int(right[best].sum()):
        words += f". Without any method it is {plain}: consider leaving it at that"
    return words + "."


def _doubt(one: Tensor, other: Tensor) -> str:
    """Words where the two differ by less than chance may do (a sign test at about 5%)."""
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    if gained == lost:
        return " (as many; the one that is fitted faster is taken)"
    if abs(gained - lost) < 2 * torch.tensor(float(gained + lost)).sqrt().item():
        return " (the difference may be chance)"
    return ""
