"""What a run's data gave, written down once an epoch and at the end: `data.jsonl` and `quarantine.jsonl`.

{"step": 400, "epoch": 1.0, "remainder": "drop: each epoch leaves out 12 samples ...", "texts": 102400,
 "cut_texts": 310, "broken": 3, "causes": {"truncated": 3}, "shards": {"00007.tar": {"truncated": 3}},
 "sources": [{"name": "shards/a", "num_samples": 60000, "share": 0.67, "expected": 68266.7, "realised": 68267}, ...]}

Counts are of all processes. Samples and broken ones are of the whole run, what was given out before a run was
continued is known from the plan; texts and cut texts are of the part since then.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlkit.contracts import ImageTextBatch
from vlkit.data.loader import Loader
from vlkit.data.quarantine import Quarantine
from vlkit.data.sampling import PlannedData
from vlkit.distributed import gather_objects, is_main
from vlkit.settings import Duration
from vlkit.training.loop import Every, Moment
from vlkit.training.metrics import cut_back

FILE = "data.jsonl"
_MANY_CUT = 0.05
_MOST_GROUPS_SAID = 20


class DataLog:
    """Counts what the loader of this process gives out; `note` is an entry of `every`, the same on all processes.

    Args:
        folder: the run folder.
        planned: the batches' plan.
        loaders: of this process; further ones may join the list.
        quarantine: where its broken samples are listed.
        step: steps done before; what data.jsonl says of later ones is removed.
        skipped: batches of the plan that no step was done with.
    """

    def __init__(
        self,
        folder: Path,
        planned: PlannedData,
        loaders: Sequence[Loader],
        quarantine: Quarantine,
        step: int,
        skipped: int = 0,
    ):
        self._path, self._planned, self._loaders, self._quarantine = folder / FILE, planned, loaders, quarantine
        self._given = np.zeros(len(planned.groups), np.int64)
        self._before = planned.counts(step + skipped)
        self.last: dict[str, Any] | None = None
        if is_main():
            cut_back(self._path, step)

    def see(self, batches: Iterator[ImageTextBatch]) -> Iterator[ImageTextBatch]:
        """The same batches, counted."""
        for batch in batches:
            ids = batch.ids.numpy()
            self._given += np.bincount(self._planned.group_of(ids[ids >= 0]), minlength=len(self._given))
            yield batch

    def every(self) -> Every:
        """`note` once an epoch."""
        return Every(Duration(1, "epochs"), self.note, reads_encoder=False)

    def note(self, moment: Moment) -> None:
        """Add up over the processes, and append a line to data.jsonl on the main one."""
        reports = [loader.report() for loader in self._loaders]
        mine = (self._given, sum(r.num_texts for r in reports), sum(r.num_cut_texts for r in reports))
        given, texts, cut_texts = (sum(part) for part in zip(*gather_objects(mine), strict=True))
        if not is_main():
            return
        self._quarantine.refresh()
        self.last = {
            "step": moment.step,
            "epoch": moment.epoch,
            "remainder": self._planned.remainder,
            "texts": texts,
            "cut_texts": cut_texts,
            **self._quarantine.record(),
            self._planned.kind: self._groups((self._before + given).tolist()),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.last) + "\n")

    def tell(self, say: Callable[[str], None]) -> None:
        """Say at the end what a user should know of the data."""
        last = self.last
        if last is None:
            return
        if last["broken"]:
            causes = ", ".join(f"{count} x {cause}" for cause, count in last["causes"].items())
            say(f"{_samples(last['broken'])} could not be read and left out ({causes}): {self._quarantine.path}.")
            worst = sorted(last["shards"].items(), key=lambda item: -sum(item[1].values()))
            for shard, found in worst[:_MOST_GROUPS_SAID]:
                say(f"  {shard}: " + ", ".join(f"{count} x {cause}" for cause, count in found.items()))
        if last["cut_texts"] > _MANY_CUT * last["texts"]:
            share = last["cut_texts"] / last["texts"]
            say(f"{share:.0%} of the texts are longer than the model's context and were cut.")
        groups = last[self._planned.kind]
        for group in groups[:_MOST_GROUPS_SAID] if len(groups) > 1 else []:
            say(f"  {group['name']}: {group['realised']:,} samples given, {group['expected']:,.1f} expected")

    def _groups(self, counts: list[int]) -> list[dict[str, Any]]:
        total = sum(counts)
        return [
            {**group._asdict(), "expected": group.share * total, "realised": count}
            for group, count in zip(self._planned.groups, counts, strict=True)
        ]


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"
