"""Which images of a labelled set are the few shots, which are held out for validation, which are left for the test.

    split = sample_few_shot(labels, num_classes=100, shots=16, seed=1)
    split.train, split.val, split.rest        # rows

Everything that learns from few labels takes its images from here, so that equal (shots, seed) mean equal images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlkit.errors import ConfigError, DataError

MAX_VAL_SHOTS = 4


class FewShotSplit(NamedTuple):
    """Rows of a labelled set, each in at most one of the three; in the order of classes, then as drawn."""

    train: list[int]
    val: list[int]
    rest: list[int]  # neither; in their order

    def describe(self, shots: int, seed: int) -> str:
        """In words for a result."""
        return f"{len(self.train)} images ({shots} a class), {len(self.val)} for validation, seed {seed}"


def sample_few_shot(
    labels: Tensor | Sequence[int],
    num_classes: int,
    shots: int,
    seed: int,
    val_shots: int | None = None,
    class_names: Sequence[str] = (),
    *,
    fewer: bool = False,
) -> FewShotSplit:
    """Draw `shots` images of each class, and others for validation.

    Images are put into one random order a class, from which the first are taken: the 4 shots of a seed are among its
    16. Validation images are the last of that order, so they are the same for every number of shots with one
    `val_shots`. `eval.labelled.draw_shots`, which `vlkit eval few-shot` draws by, is lenient towards small classes and
    has another order; numbers that were published with either could not be made again if the two were one.

    Args:
        labels: (n,) classes.
        num_classes: C.
        shots: images a class to learn from.
        seed: of the order.
        val_shots: images a class to choose on; None: min(shots, 4), as CoOp does.
        class_names: (C,) for messages.
        fewer: of a class with too few images take all, those for validation first; one must be left to learn from.

    Raises:
        ConfigError: shots below 1.
        DataError: a class with too few images; the message names it.
    """
    if shots < 1:
        raise ConfigError(f"shots is {shots}; expected at least 1 image a class.")
    of_val = min(shots, MAX_VAL_SHOTS) if val_shots is None else val_shots
    label = torch.as_tensor(labels)
    train, val = [], []
    for one in range(num_classes):
        rows = (label == one).nonzero().flatten()
        held_out = min(of_val, max(len(rows) - 1, 0)) if fewer else of_val
        if len(rows) < (1 if fewer else shots) + held_out:
            name = repr(class_names[one]) if class_names else f"number {one}"
            what = f"{shots} shots" + (f" and {of_val} for validation" if of_val else "")
            raise DataError(f"Class {name} has {len(rows)} images, too few for {what}. Lower --shots or add images.")
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 100_003 + one))].tolist()
        train += order[: min(shots, len(order) - held_out)]
        val += order[len(order) - held_out :]
    taken = set(train) | set(val)
    return FewShotSplit(train, val, [row for row in range(len(label)) if row not in taken])
