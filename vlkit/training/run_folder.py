"""The folder of a run: what is written while it trains, and how it is continued."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vlkit.config import RunConfig
from vlkit.data.shard_index import ShardSet
from vlkit.errors import CheckpointError, did_you_mean
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.saved import read_json, save_encoder, write_json
from vlkit.training import checkpoint
from vlkit.training.assemble import Learner
from vlkit.training.loop import Moment
from vlkit.training.metrics import MetricsLog, plot_curves, read_metrics

Say = Callable[[str], None]

# Settings that do not change what is computed: a resumed run may have others, and nothing is said.
_FREE = ("run.out:", "run.device:", "data.train:", "data.val:", "data.workers:", "data.max_bad", "checkpoint.", "eval:")


class Start(NamedTuple):
    """Where training begins."""

    step: int
    seconds: float  # that earlier parts of the run took


def require_no_run(out: Path) -> None:
    """Refuse a folder that holds a run already.

    Raises:
        CheckpointError: it does.
    """
    found = [path.name for path in checkpoint.checkpoints(out)] + (["model"] if (out / "model").exists() else [])
    if found:
        raise CheckpointError(
            f"{out} holds a run already ({', '.join(found[-3:])}). Continue it with --resume (in Python resume=True), "
            "or give another folder as run.out."
        )


def identity(run: RunConfig, encoder: DualEncoder, shards: ShardSet) -> dict[str, Any]:
    """What must be the same for a run to be continued, as JSON types."""
    same = {
        "data": {"fingerprint": shards.fingerprint, "num_samples": shards.num_samples},
        "model": encoder.record(),
        "seed": run.run.seed,
        "global_batch_size": run.data.global_batch_size,
        "captions_per_image": run.data.captions_per_image,
    }
    plain: dict[str, Any] = json.loads(json.dumps(same))
    return plain


def continue_run(run: RunConfig, learner: Learner, same: dict[str, Any], say: Say) -> Start:
    """Put the last good checkpoint of the run folder into `learner`; what is remarkable about it is said.

    Raises:
        CheckpointError: the checkpoint belongs to other data, another model, seed or batch size; all are listed.
    """
    out = Path(run.run.out)
    found = checkpoint.latest_good(out)
    for note in found.notes:
        say(note)
    if found.path is None:
        say(f"There is no checkpoint to continue from in {out}: starting afresh.")
        return Start(0, 0.0)
    state = read_json(found.path / checkpoint.STATE)
    differing = checkpoint.differences(state["identity"], same)
    if differing:
        raise CheckpointError(
            f"{found.path} cannot be continued, because it belongs to another run (there -> now):\n  "
            + "\n  ".join(differing)
            + "\nRestore what changed, or start a new run in another run.out."
        )
    changed = [
        line
        for line in checkpoint.differences(state["config"], run.model_dump(mode="json"))
        if not line.startswith(_FREE)
    ]
    if changed:
        say(f"Continuing with other settings than {found.path.name} was saved with: {'; '.join(changed)}.")
    checkpoint.load_checkpoint(found.path, learner.encoder, learner.optimizer, learner.module.objective)
    return Start(state["step"], state["seconds"])


class RunFolder:
    """Writes a run folder. Only the main process makes one.

    Args:
        run: the settings; kept as config.json.
        learner: what checkpoints hold.
        same: the run's `identity`.
        start: what is there of later steps is removed.
        say: takes remarks.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(self, run: RunConfig, learner: Learner, same: dict[str, Any], start: Start, say: Say) -> None:
        self.path = Path(run.run.out)
        self._run, self._learner, self._same, self._say = run, learner, same, say
        self._saved = start.step
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.json").write_text(run.to_json(), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"Cannot write the run folder {self.path}: {error.strerror or error}.") from error
        checkpoint.set_aside(self.path, start.step)
        self.log = MetricsLog(self.path / "metrics.jsonl", start.step)
        self._best = self._best_so_far()

    def save(self, moment: Moment) -> None:
        """Save a checkpoint, and delete those that need not be kept."""
        if self._saved == moment.step:
            return
        self.log.secure()
        state = {
            "samples": moment.samples,
            "epoch": moment.epoch,
            "seconds": moment.seconds,
            "config": self._run.model_dump(mode="json"),
            "identity": self._same,
        }
        encoder, module, optimizer = self._learner
        checkpoint.save_checkpoint(self.path, moment.step, encoder, optimizer, module.objective, state)
        self._saved = moment.step
        checkpoint.prune(self.path, self._run.checkpoint.keep_last, keep=[self._best.step] if self._best else [])

    def save_if_best(self, moment: Moment) -> None:
        """Save a checkpoint when this step's evaluation is the best so far, if the run asks for that."""
        metric = self._run.checkpoint.keep_best
        if metric is None or not moment.metrics:
            return
        if metric not in moment.metrics:
            hint = did_you_mean(metric, moment.metrics)
            self._say(f"checkpoint.keep_best = {metric!r}: step {moment.step} was evaluated without it. {hint}")
        elif self._best is None or moment.metrics[metric] > self._best.value:
            self._best = _Best(moment.step, moment.metrics[metric])
            self.save(moment)

    def plot(self, moment: Moment) -> None:
        """Draw loss.png."""
        plot_curves(self.log.path, self.path / "loss.png")

    def write_nonfinite(self, record: dict[str, Any]) -> Path:
        """Keep what is known of a step whose loss was no number."""
        path = self.path / "nonfinite.json"
        write_json(path, record)
        return path

    def finish(self) -> None:
        """Save the trained encoder as `model/`."""
        save_encoder(self._learner.encoder, self.path / "model")

    def close(self) -> None:
        """Let go of the files."""
        self.log.close()

    def _best_so_far(self) -> "_Best | None":
        metric = self._run.checkpoint.keep_best
        seen = [
            _Best(line["step"], line["eval"][metric])
            for line in read_metrics(self.log.path)
            if metric in line.get("eval", {})
        ]
        return max(seen, key=lambda best: best.value, default=None)


class _Best(NamedTuple):
    step: int
    value: float
