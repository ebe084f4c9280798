"""The folder of a run: what is written while it trains, and how it is continued."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlkit.config import RunConfig
from vlkit.data.shard_index import ShardSet
from vlkit.distributed import from_main, is_main
from vlkit.errors import CheckpointError, did_you_mean
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.saved import read_json, save_encoder, write_json
from vlkit.training import checkpoint
from vlkit.training.assemble import Learner
from vlkit.training.folder_lock import FolderLock
from vlkit.training.heads import save_heads
from vlkit.training.loop import Moment, NonFiniteError
from vlkit.training.metrics import MetricsLog, cut_back, read_metrics
from vlkit.training.observe import SpikeLog
from vlkit.training.saving import BackgroundWriter, Uploader
from vlkit.training.summary import plot_curves, write_summary
from vlkit.training.tracking import Trackers

Say = Callable[[str], None]

# Settings that do not change what is computed: a resumed run may have others, and nothing is said.
_FREE = (
    *("run.out:", "run.device:", "run.parallel:", "run.peer_timeout:", "run.trackers:", "run.peak_tflops:"),
    *("run.rewinds:", "data.train:", "data.val:", "data.workers:", "data.max_bad", "checkpoint.", "eval:"),
)


class Start(NamedTuple):
    """Where training begins."""

    step: int
    seconds: float  # that earlier parts of the run took
    skipped: int = 0  # batches that were left out, because the loss was no number with or after them
    rewinds: int = 0  # how often that happened


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


def identity(
    run: RunConfig, encoder: DualEncoder, shards: ShardSet, order: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What must be the same for a run to be continued, as JSON types; `order` is about the order of the samples."""
    same = {
        "data": {"fingerprint": shards.fingerprint, "num_samples": shards.num_samples},
        "model": encoder.record(),
        "seed": run.run.seed,
        "global_batch_size": run.data.global_batch_size,
        "captions_per_image": run.data.captions_per_image,
        "loss": run.loss.model_dump(mode="json"),
        "freeze": sorted(run.model.freeze),
        # Only what is there, so that older runs can be continued.
        **({"unfreeze": run.model.unfreeze} if run.model.unfreeze else {}),
        **({"lora": run.model.lora.model_dump(mode="json")} if run.model.lora is not None else {}),
        **({"ema": True} if run.optim.ema is not None else {}),
        **(order or {}),
    }
    plain: dict[str, Any] = json.loads(json.dumps(same))
    return plain


def continue_run(run: RunConfig, learner: Learner, same: dict[str, Any], say: Say) -> Start:
    """Put the last good checkpoint of the run folder into `learner`; what is remarkable about it is said.

    Raises:
        CheckpointError: the checkpoint belongs to other data, another model, seed or batch size; all are listed.
    """
    out = Path(run.run.out)
    found = from_main(checkpoint.latest_good(out) if is_main() else None)  # reading all of it once is enough
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
    return _load(found.path, learner)


def _load(path: Path, learner: Learner) -> Start:
    state = checkpoint.load_checkpoint(path, learner.encoder, learner.optimizer, learner.kept)
    return Start(state["step"], state["seconds"], state["skipped"], state["rewinds"])


class RunFolder:
    """Writes a run folder. All processes make one and call it alike; only the main one writes.

    Args:
        run: the settings; kept as config.json.
        learner: what checkpoints hold.
        same: the run's `identity`.
        say: takes remarks.

    Raises:
        CheckpointError: another process writes the folder, or it cannot be written.
        ConfigError: a tracker or an upload that is not there.
    """

    def __init__(self, run: RunConfig, learner: Learner, same: dict[str, Any], say: Say) -> None:
        self.path = Path(run.run.out)
        self.extras: list[Callable[[Moment], Mapping[str, float]]] = []  # what metrics.jsonl holds beside the moment
        self._run, self._learner, self._same, self._say = run, learner, same, say
        self._start = Start(0, 0.0)
        self._saved = 0
        self._best: _Best | None = None
        self._log: MetricsLog | None = None
        self._writer = BackgroundWriter(run.checkpoint.in_background)
        self._uploader: Uploader | None = None
        self._trackers: Trackers | None = None
        self._lock = FolderLock(self.path) if is_main() else None
        if self._lock is not None and self._lock.ended_badly:
            say(f"The run before in {self.path}, of {self._lock.ended_badly}, ended without finishing.")

    def open(self, start: Start) -> None:
        """Get ready to go on from a step; what is there of later steps is removed."""
        self._spikes = SpikeLog(self.path / "spikes.jsonl")
        if is_main():
            config = self._run.model_dump(mode="json")
            try:
                (self.path / "config.json").write_text(self._run.to_json(), encoding="utf-8")
            except OSError as error:
                message = f"Cannot write the run folder {self.path}: {error.strerror or error}."
                raise CheckpointError(message) from error
            self._trackers = Trackers(self._run.run.trackers, self.path, config, self._say)
            if self._run.checkpoint.upload:
                self._uploader = Uploader(self._run.checkpoint.upload, self._say)
        self._go_on_from(start)

    def _go_on_from(self, start: Start) -> None:
        self._start, self._saved = start, start.step
        if is_main():
            checkpoint.set_aside(self.path, start.step)
            if (self.path / "spikes.jsonl").exists():
                cut_back(self.path / "spikes.jsonl", start.step)
            if self._log is not None:
                self._log.close()
            self._log = MetricsLog(self.path / "metrics.jsonl", start.step)
        self._best = from_main(self._best_so_far() if is_main() else None)

    def note(self, moment: Moment) -> None:
        """Write down a step, and raise what went wrong in writing a checkpoint meanwhile."""
        self._spikes(moment)
        if self._log is not None:
            extra = {name: value for give in self.extras for name, value in give(moment).items()}
            line = self._log.write(moment, extra)
            if self._trackers is not None:
                self._trackers.log(line, moment.step)
        self._writer.check()

    def save(self, moment: Moment) -> None:
        """Save a checkpoint, and delete those that need not be kept."""
        if self._saved == moment.step:
            return
        self._saved = moment.step
        state = {
            "samples": moment.samples,
            "epoch": moment.epoch,
            "seconds": moment.seconds,
            "skipped": self._start.skipped,
            "rewinds": self._start.rewinds,
            "config": self._run.model_dump(mode="json"),
            "identity": self._same,
        }
        learner = self._learner
        snapshot = checkpoint.take_snapshot(moment.step, learner.encoder, learner.optimizer, learner.kept, state)
        if snapshot is not None and self._log is not None:
            self._log.secure()
            keep = [self._best.step] if self._best else []
            self._writer.submit(lambda: self._write(snapshot, keep))

    def _write(self, snapshot: checkpoint.Snapshot, keep: list[int]) -> None:
        written = checkpoint.write_snapshot(self.path, snapshot, self._learner.encoder)
        checkpoint.prune(self.path, self._run.checkpoint.keep_last, keep)
        if self._uploader is not None:
            self._uploader.submit(written, f"checkpoints/{written.name}")

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
        if self._log is not None:
            plot_curves(self._log.path, self.path / "loss.png")

    def write_nonfinite(self, record: dict[str, Any]) -> Path:
        """Keep what is known of a step whose loss was no number."""
        path = self.path / "nonfinite.json"
        if is_main():
            write_json(path, record)
        return path

    def rewind(self, error: NonFiniteError, start: Start) -> Start:
        """Back to the last checkpoint, with the data after those that led to the error.

        Args:
            error: names the step.
            start: where this part of the run began.

        Raises:
            NonFiniteError: the run does not ask for that (again), or there is no checkpoint.
            CheckpointError: the last checkpoint could not be written.
        """
        self.wait()
        found = from_main(checkpoint.latest_good(self.path) if is_main() else None)
        if start.rewinds >= self._run.run.rewinds or found.path is None:
            raise error
        loaded = _load(found.path, self._learner)
        failed = error.record["step"] - 1 + start.skipped  # its batch, counted from 0
        again = loaded._replace(skipped=failed + 1 - loaded.step, rewinds=start.rewinds + 1)
        self._say(
            f"The loss was no number in step {error.record['step']}. Back to step {loaded.step} of {found.path.name}; "
            f"{again.skipped - loaded.skipped} batches from there on are left out "
            f"({again.rewinds} of {self._run.run.rewinds} times)."
        )
        self._go_on_from(again)
        return again

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises what went wrong in it."""
        self._writer.wait()

    def save_model(self, encoder: DualEncoder, name: str) -> None:
        """Save an encoder beside the checkpoints, as a plain model: LoRA's updates are merged."""
        if self._log is not None:
            save_encoder(encoder, self.path / name)
            if self._uploader is not None:
                self._uploader.submit(self.path / name, name)

    def finish(self, encoder: DualEncoder) -> None:
        """Save the trained encoder as `model/`, and the summary."""
        self.wait()
        if self._log is not None:
            save_encoder(encoder, self.path / "model")
            save_heads(self._learner.module.objective, encoder, self.path)
            write_summary(self.path)
            if self._uploader is not None:
                for name in ("model", "metrics.jsonl", "config.json", "summary.html"):
                    self._uploader.submit(self.path / name, name)

    def close(self) -> None:
        """Wait for what is being written, and let go of the files."""
        try:
            self._writer.close()
        finally:
            for part in (self._uploader, self._trackers, self._log):
                if part is not None:
                    part.close()
            if self._lock is not None:
                self._lock.release()

    def _best_so_far(self) -> "_Best | None":
        metric = self._run.checkpoint.keep_best
        seen = [
            _Best(line["step"], line["eval"][metric])
            for line in read_metrics(self.path / "metrics.jsonl")
            if metric in line.get("eval", {})
        ]
        return max(seen, key=lambda best: best.value, default=None)


class _Best(NamedTuple):
    step: int
    value: float
