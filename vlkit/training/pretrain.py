"""Pretraining from a run file: the run folder it fills, and how it continues one.

run = load_run("run.toml")
pretrain(run, every=[Every(Duration(1, "epochs"), my_evaluation)])       # OUT/model: load_embedder("run:OUT")

OUT/config.json     every setting            OUT/checkpoints/step_*/   see checkpoint.py
OUT/metrics.jsonl   one line a step          OUT/model/                the trained encoder
OUT/loss.png        loss and evaluations     OUT/nonfinite.json        only when the loss stopped being a number
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from vlkit.config import RunConfig, remarks
from vlkit.contracts import ImageTextBatch, Progress
from vlkit.data.loader import Loader
from vlkit.data.randomness import raw
from vlkit.data.shard_index import ShardSet
from vlkit.distributed import is_main, rank, world_size
from vlkit.errors import ConfigError
from vlkit.losses import LossOutput
from vlkit.settings import Duration
from vlkit.training import assemble
from vlkit.training.cached import CachedStep, EncodeStep
from vlkit.training.loop import Action, Every, Moment, NonFiniteError, fit
from vlkit.training.parallel import on_ranks
from vlkit.training.run_folder import RunFolder, Say, Start, continue_run, identity, require_no_run

_log = logging.getLogger(__name__)

# Larger scales make training unstable. Source: Radford et al. 2021, arXiv:2103.00020, section 2.5.
MAX_LOGIT_SCALE = 100.0

_EACH_STEP = Duration(1, "steps")

# Texts that fill the whole context are mostly texts that were cut.
_MANY_FULL_TEXTS = 0.05


def pretrain(
    run: RunConfig,
    every: Sequence[Every] = (),
    resume: bool = False,
    progress: Progress | None = None,
    say: Say = _log.warning,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train as a run file says.

    Args:
        run: the settings.
        every: what else happens and when, e.g. evaluations, with the encoder in eval mode; the metrics they return
            are written down.
        resume: continue from the last good checkpoint of the run folder; start afresh when there is none.
        progress: called with (steps done, steps).
        say: takes what a user should know, one remark at a time.
        stop: asked after each step; True saves a checkpoint and ends.

    Returns:
        The run folder. It holds `model/` unless the run was stopped.

    Raises:
        ConfigError: settings that do not fit the model or the device.
        ModelError: no such model.
        DataError: shards that are missing or too broken.
        CheckpointError: the folder holds a run and `resume` is false; or that run does not fit these settings.
        NonFiniteError: the loss is no number any more.
    """
    if not resume:
        require_no_run(Path(run.run.out))
    device = assemble.choose_device(run)
    joined = assemble.join_processes(device)
    say = say if is_main() else _ignore
    for remark in remarks(run):
        say(remark)
    try:
        _pretrain(run, device, every, resume, progress or _ignore_progress, say, stop)
    finally:
        if joined:
            torch.distributed.destroy_process_group()
    return Path(run.run.out)


def _pretrain(
    run: RunConfig,
    device: torch.device,
    every: Sequence[Every],
    resume: bool,
    progress: Progress,
    say: Say,
    stop: Callable[[], bool],
) -> None:
    shards = ShardSet.open(run.data.train)
    for note in shards.notes:
        say(note)
    learner = assemble.build_learner(run, device)
    with ExitStack() as stack:
        loader = stack.enter_context(assemble.build_loader(run, shards, learner.encoder))
        course = assemble.plan_course(run, loader.num_batches)
        if course.warmup > course.steps:
            say(f"optim.warmup is {course.warmup} steps and the run has {course.steps}: optim.lr is never reached.")
        same = identity(run, learner.encoder, shards)
        start = continue_run(run, learner, same, say) if resume else Start(0, 0.0)
        batches = stack.enter_context(closing(assemble.batches_from(loader, start.step)))
        folder = stack.enter_context(closing(RunFolder(run, learner, same, start, say))) if is_main() else None
        try:
            done = fit(
                _make_step(run, learner.module),
                batches,
                learner.optimizer,
                steps=course.steps,
                schedule=course.schedule,
                pace=course.pace,
                encoder=learner.encoder,
                every=_entries(run, every, progress, folder),
                start=start.step,
                seconds=start.seconds,
                clip_norm=run.optim.clip_norm,
                watch=lambda: {"logit_scale": learner.encoder.logit_scale()},
                stop=_on_any_rank(stop, device),
            )
        except NonFiniteError as error:
            if folder is not None:
                say(f"The whole batch is named in {folder.write_nonfinite(error.record)}.")
            raise
        _report_losses(loader, say)
        if done < course.steps:
            say(f"Stopped after step {done} of {course.steps}, with a checkpoint. --resume continues.")
        elif folder is not None:
            folder.finish()


def _on_any_rank(stop: Callable[[], bool], device: torch.device) -> Callable[[], bool]:
    """Whether any process was asked to stop: a signal may reach them in different steps."""
    if world_size() == 1:
        return stop

    def asked() -> bool:
        flag = torch.tensor(float(stop()), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    return asked


def _make_step(run: RunConfig, module: assemble.PretrainStep) -> Callable[[ImageTextBatch, int], LossOutput]:
    """One training step up to and with backward."""
    device = module.encoder.device
    chunk_size = assemble.rows_at_a_time(run)
    whole = chunk_size == run.data.global_batch_size // world_size()
    parallel = on_ranks(module if whole else EncodeStep(module.encoder, module.features), "ddp", device)
    cached = CachedStep(
        parallel.model, module.objective, chunk_size, device, to_device=assemble.to_device, sync=parallel.sync
    )

    def plain(batch: ImageTextBatch, i: int) -> LossOutput:
        output: LossOutput = parallel.model(assemble.to_device(batch, device), i)
        torch.autograd.backward(output.total)
        return output

    def step(batch: ImageTextBatch, i: int) -> LossOutput:
        # Dropout and the like draw from the step's own numbers: a resumed run needs no state for them, on any rank.
        torch.manual_seed(int(raw(run.run.seed, i, rank(), "training step", 1)[0]))
        try:
            output = plain(batch, i) if whole else cached(batch, i)
        except torch.OutOfMemoryError as error:
            raise ConfigError(_too_large(run, chunk_size)) from error
        parallel.finish(module.parameters())
        return output

    return step


def _too_large(run: RunConfig, rows: int) -> str:
    chunk = "" if run.data.chunk_size is None else f" (data.chunk_size = {run.data.chunk_size})"
    return (
        f"The device ran out of memory with {rows} images at a time{chunk}, of a batch of "
        f"{run.data.global_batch_size}. Set data.chunk_size = {max(1, rows // 2)}, which changes no gradient and costs "
        "a second forward, or lower data.global_batch_size."
    )


def _entries(run: RunConfig, every: Sequence[Every], progress: Progress, folder: RunFolder | None) -> list[Every]:
    """What happens between the steps, in this order. Evaluations come before what writes their results down."""
    clamp = Every(_EACH_STEP, clamp_temperature)
    if folder is None:
        return [clamp]
    return [
        clamp,
        *(Every(entry.when, _in_eval_mode(entry.action, run)) for entry in every),
        Every(_EACH_STEP, lambda moment: progress(moment.step, moment.steps)),
        Every(_EACH_STEP, folder.log.write),
        Every(_EACH_STEP, folder.save_if_best),
        Every(run.checkpoint.every, folder.save),
        Every("signal", folder.save),
        Every(run.checkpoint.every, folder.plot),
    ]


def clamp_temperature(moment: Moment) -> None:
    """Keep the logit scale between 1 and 100; the parameter is its logarithm."""
    for name, parameter in moment.encoder.named_parameters():
        if name.rpartition(".")[2] == "logit_scale":
            parameter.data.clamp_(0.0, math.log(MAX_LOGIT_SCALE))


def _in_eval_mode(action: Action, run: RunConfig) -> Action:
    def evaluate(moment: Moment) -> Mapping[str, float] | None:
        moment.encoder.eval()
        try:
            return action(moment)
        finally:
            assemble.train_mode(moment.encoder, run)

    return evaluate


def _report_losses(loader: Loader, say: Say) -> None:
    """Say which samples could not be read, and whether texts were cut."""
    report = loader.report()
    if report.num_broken:
        say(f"{report.num_broken} of {report.num_samples} samples could not be read and were left out:")
        for line in report.lines():
            say(f"  {line}")
    if report.num_full_texts > _MANY_FULL_TEXTS * report.num_texts:
        share = report.num_full_texts / report.num_texts
        say(f"{share:.0%} of the texts fill the whole context of the model and may have been cut.")


def _ignore(remark: str) -> None:
    """Other processes than the main one say nothing."""


def _ignore_progress(done: int, total: int) -> None:
    """Nobody asked."""
