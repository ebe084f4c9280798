"""Worst-group accuracy: zero-shot classification counted group by group, groups from a column of a table.

groups = read_groups("metadata.csv", key_column="file", group_column="group")
WorstGroupEvaluator(source.records, class_names, groups).run(embedder).metrics["worst_group/accuracy@1"]
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch

from eval.classification import ClassificationEvaluator
from eval.features import ClassifyingSource
from eval.metrics import bootstrap_interval
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.contracts import Evaluation, Evaluator
from vlkit.data.records import Record
from vlkit.data.sources.delimited import read_table
from vlkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class WorstGroupEvaluator(Evaluator):
    """Accuracy of every group, of the worst one, and how far it is from the average.

    Attributes:
        classification: what is measured; its records are grouped by their key.
        groups: group of each record's key; images without one are left out and counted.
        by_class: groups are pairs of class and group, as in Waterbirds.
        min_images: smaller groups are shown but cannot be the worst.
    """

    classification: ClassificationEvaluator
    groups: Mapping[str, str]
    by_class: bool = False
    min_images: int = 1

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no image has a group.
            ConfigError: min_images below 1.
        """
        if self.min_images < 1:
            raise ConfigError(f"min_images is {self.min_images}; it must be at least 1.")
        if not any(_group(record, self.groups) is not None for record in self.classification.records):
            raise DataError(
                f"None of the {len(self.classification.records)} images is among the {len(self.groups)} keys of the "
                f"groups (an image: {self.classification.records[0].key!r}, a key: {next(iter(self.groups), '')!r})."
            )

    def run(self, source: ClassifyingSource, pipeline: Pipeline = PLAIN) -> Evaluation:
        """Classify, then count by group.

        Args:
            source: the model.
            pipeline: as for `ClassificationEvaluator`; head_ablation takes heads out that follow a spurious cue.

        Returns:
            Metrics `worst_group/accuracy@1`, `mean_group/accuracy@1`, `accuracy@1` (over images), `gap` (average minus
            worst) and `group/{name}/accuracy@1`; `per_item` has a column `group`.

        Raises:
            DataError, ConfigError, GalleryError: as `ClassificationEvaluator`; or no group is large enough.

        Source: Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts", arXiv:1911.08731.
        """
        known = [r for r in self.classification.records if _group(r, self.groups) is not None]
        inner = replace(self.classification, records=known).run(source, pipeline)
        assert inner.per_item is not None
        of_key = {record.key: _group(record, self.groups) for record in known}
        keys, classes = (inner.per_item.column(name).to_pylist() for name in ("key", "class"))
        names = [
            f"{label} / {of_key[key]}" if self.by_class else str(of_key[key])
            for key, label in zip(keys, classes, strict=True)
        ]
        hits = torch.from_numpy(inner.per_item.column("hit@1").to_numpy().copy())
        distinct = sorted(set(names))
        group = torch.tensor([distinct.index(name) for name in names])
        size = torch.bincount(group)
        accuracy = torch.bincount(group, weights=hits.double()) / size
        large = size >= self.min_images
        if not large.any():
            raise DataError(f"No group has {self.min_images} images; the largest has {int(size.max())}.")
        worst = int(torch.where(large, accuracy, 2.0).argmin())
        average = hits.mean().item()
        low, high = bootstrap_interval(hits[group == worst], seed=self.classification.seed).tolist()
        return Evaluation(
            metrics={
                "worst_group/accuracy@1": accuracy[worst].item(),
                "mean_group/accuracy@1": accuracy[large].mean().item(),
                "accuracy@1": average,
                "gap": average - accuracy[worst].item(),
                **{f"group/{name}/accuracy@1": accuracy[row].item() for row, name in enumerate(distinct)},
            },
            intervals={"worst_group/accuracy@1": (low, high), "accuracy@1": inner.intervals["accuracy@1"]},
            protocol={
                **inner.protocol,
                "groups": "class and group" if self.by_class else "group",
                "min_images": self.min_images,
                "worst_group": distinct[worst],
            },
            counts={
                **inner.counts,
                "groups": len(distinct),
                "groups_too_small": int((~large).sum()),
                "images_without_group": len(self.classification.records) - len(known),
            },
            per_item=inner.per_item.append_column("group", pa.array(names)),
            figures=inner.figures,
        )


def read_groups(file: str | Path, key_column: str, group_column: str) -> dict[str, str]:
    """The group of each image out of a CSV or TSV table with a header.

    Args:
        file: `.csv` or `.tsv`.
        key_column: holds image names as the data set's keys say them, or their file names.
        group_column: holds the group.

    Raises:
        DataError: unreadable, no such column, or two groups of one image.
    """
    groups: dict[str, str] = {}
    for where, row in read_table(file, key_column, group_column):
        key, group = str(row.get(key_column) or "").strip(), str(row.get(group_column) or "").strip()
        if key and group and groups.setdefault(key, group) != group:
            raise DataError(f"{where}: {key!r} is in group {group!r} and in {groups[key]!r}.")
    if not groups:
        raise DataError(f"{Path(file)} gives no image a group.")
    return groups


def _group(record: Record, groups: Mapping[str, str]) -> str | None:
    """By key, else by the file's name: tables rarely say the folder."""
    found = groups.get(record.key)
    return groups.get(record.key.rpartition("/")[2]) if found is None else found
