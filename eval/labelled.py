"""Labelled images: which are for training and which for testing, their features, and classes without any."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eval.features import EmbeddingSource, embed_records
from vlkit.contracts import Progress
from vlkit.data.randomness import permutation
from vlkit.data.records import Record
from vlkit.errors import DataError

# Shares of a class without official splits that train and validate; the rest tests.
TRAIN_SHARE, VAL_SHARE = 0.5, 0.2


class Parts(NamedTuple):
    """Disjoint parts of a data set."""

    train: tuple[Record, ...]
    val: tuple[Record, ...]
    test: tuple[Record, ...]
    how: str  # for the record


class Labelled(NamedTuple):
    """Labelled images with their features; images without a label and unreadable ones are gone."""

    records: tuple[Record, ...]  # (N,)
    features: Tensor  # (N,D) unit norm
    labels: Tensor  # (N,) int64
    unreadable: tuple[tuple[str, str], ...]

    def at(self, rows: Tensor) -> "Labelled":
        """Some of the rows."""
        records = tuple(self.records[row] for row in rows.tolist())
        return Labelled(records, self.features[rows], self.labels[rows], ())


def divide(records: Sequence[Record], seed: int = 0) -> Parts:
    """The splits that the records name, or a seeded division class by class where they name none.

    Raises:
        DataError: no image has a label, or splits are named but train or test is not among them.

    Source: Zhou et al. 2022 (CoOp), arXiv:2109.01134: half of each class trains, a fifth validates, the rest tests.
    """
    labelled = [record for record in records if record.label is not None]
    if not labelled:
        raise DataError(f"None of the {len(records)} images has a class; expected class folders, or a column `class`.")
    named = {record.split for record in labelled if record.split is not None}
    if named:
        if not {"train", "test"} <= named:
            raise DataError(
                f"The images are of split {', '.join(sorted(named))}; both train and test are needed. "
                "Put them into folders train/ and test/, or leave splits out to have each class divided."
            )
        own = {split: tuple(r for r in labelled if r.split == split) for split in ("train", "val", "test")}
        return Parts(**own, how="the data's own splits")
    of_class: dict[int, list[Record]] = {}
    for record in labelled:
        of_class.setdefault(record.label or 0, []).append(record)
    train: list[Record] = []
    val: list[Record] = []
    test: list[Record] = []
    for label in sorted(of_class):
        order = _permutation(len(of_class[label]), seed, label)
        one = [of_class[label][row] for row in order]
        # At least one for training and one for testing wherever there are two.
        num_train = min(max(1, round(TRAIN_SHARE * len(one))), max(1, len(one) - 1))
        num_val = min(round(VAL_SHARE * len(one)), len(one) - num_train - 1) if len(one) > 2 else 0
        train += one[:num_train]
        val += one[num_train : num_train + num_val]
        test += one[num_train + num_val :]
    if not test:
        raise DataError("Every class has a single image; nothing is left to test on. Give at least two a class.")
    how = f"no splits in the data: each class divided {TRAIN_SHARE:g} train, {VAL_SHARE:g} val, rest test; seed {seed}"
    return Parts(tuple(train), tuple(val), tuple(test), how)


def draw_shots(labels: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of `shots` items a class, and rows of up to min(shots, 4) further ones for validation.

    A class with too few items gives what it has, training first: an evaluation should say how far few images bring,
    and count a small class in. `vlkit.addons.few_shot.sample_few_shot` is for what is adapted and kept: it refuses
    such a class, and draws otherwise, so that what was adapted before can be made again. The published numbers of
    either depend on its draw, which is why there are two.

    Args:
        labels: (N,) int64.
        shots: items a class.
        seed: of the draw; each seed is a prefix order, so that 2 shots hold the 1 shot of the same seed.

    Source: Zhou et al. 2022 (CoOp), code commit ff61507: validation of min(shots, 4) a class.
    Differs: draws with more shots contain those with fewer, so curves over shots vary less.
    """
    train, val = [], []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        # Validation items stand at the end, so that they are the same for all numbers of shots that leave them.
        order = rows[torch.tensor(_permutation(len(rows), seed, label))]
        num_train = min(shots, len(rows))
        num_val = min(shots, 4, len(rows) - num_train)
        train.append(order[:num_train])
        val.append(order[len(rows) - num_val :])
    return torch.cat(train), torch.cat(val)


def embed_labelled(
    source: EmbeddingSource, records: Sequence[Record], batch_size: int, workers: int | None, progress: Progress | None
) -> Labelled:
    """Features and labels of the labelled images.

    Raises:
        DataError: none has a label, or none could be read.
        GalleryError: features that are not finite.
    """
    labelled = [record for record in records if record.label is not None]
    if not labelled:
        raise DataError(f"None of the {len(records)} images has a class.")
    read = embed_records(source, labelled, batch_size, workers, progress)
    return Labelled(read.records, read.features, torch.tensor([r.label for r in read.records]), read.unreadable)


def check_parts(parts: Parts, num_classes: int) -> None:
    """Refuse parts that nothing can be learned from or tested on.

    Raises:
        DataError: a part without images, or a label without a name.
    """
    if not parts.train or not parts.test:
        raise DataError(f"{len(parts.train)} train and {len(parts.test)} test images; at least one of each is needed.")
    check_labels([*parts.train, *parts.val, *parts.test], num_classes)


def check_labels(records: Sequence[Record], num_classes: int) -> None:
    """Refuse labels beyond the class names.

    Raises:
        DataError: a label has no name.
    """
    labelled = [record for record in records if record.label is not None]
    highest = max(labelled, key=lambda record: record.label or 0, default=None)
    if highest is not None and (highest.label or 0) >= num_classes:
        raise DataError(
            f"{highest.key} has label {highest.label}, but there are {num_classes} class names; expected one for each."
        )


def require_classes(labels: Tensor, class_names: Sequence[str], what: str) -> None:
    """Refuse a part from which a class cannot be learned.

    Raises:
        DataError: a class has no image.
    """
    absent = sorted(set(range(len(class_names))) - set(labels.tolist()))
    if absent:
        raise DataError(
            f"{len(absent)} of {len(class_names)} classes have no image for {what} (first: "
            f"{class_names[absent[0]]!r}). Add images, or leave these classes out with --exclude."
        )


def _permutation(size: int, seed: int, label: int) -> list[int]:
    order: list[int] = permutation(seed, 0, label, "division of a class", size).tolist()
    return order
