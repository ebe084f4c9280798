"""Pretraining from a run file: the run folder it fills, and how it continues one.

run = load_run("run.toml")
pretrain(run, every=[Every(Duration(1, "epochs"), my_evaluation)])       # OUT/model: load_embedder("run:OUT")

OUT/config.json     every setting            OUT/checkpoints/step_*/   see checkpoint.py
OUT/metrics.jsonl   one line a step          OUT/model/                the trained encoder
                                             OUT/model_ema/            with averaged weights, under optim.ema
OUT/loss.png        loss and evaluations     OUT/summary.html          numbers and curves, at the end
OUT/data.jsonl      what the data gave       OUT/quarantine.jsonl  samples that could not be read, if any
OUT/spikes.jsonl    steps whose loss jumped  OUT/nonfinite.json        only when the loss stopped being a number
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from vlkit.config import RunConfig, remarks
from vlkit.contracts import ImageTextBatch, Progress
from vlkit.data.quarantine import FILE as QUARANTINE
from vlkit.data.quarantine import Quarantine
from vlkit.data.randomness import raw
from vlkit.distributed import Launch, is_main, launch, rank, world_size
from vlkit.errors import ConfigError
from vlkit.losses import LossOutput
from vlkit.models.dual_encoder import DualEncoder
from vlkit.settings import Duration
from vlkit.training import assemble, training_data
from vlkit.training.cached import CachedStep, EncodeStep
from vlkit.training.data_log import DataLog
from vlkit.training.ema import Ema
from vlkit.training.loop import Action, Every, Moment, NonFiniteError, fit
from vlkit.training.observe import OFTEN, Accuracy, Costs
from vlkit.training.parallel import on_ranks
from vlkit.training.run_folder import RunFolder, Say, Start, continue_run, identity, require_no_run
from vlkit.training.stages import check_stages, plan_stages
from vlkit.training.stream import Stream
from vlkit.training.teacher import Teacher
from vlkit.training.view import View
from vlkit.training.watch import join

_log = logging.getLogger(__name__)

# Larger scales make training unstable. Source: Radford et al. 2021, arXiv:2103.00020, section 2.5.
MAX_LOGIT_SCALE = 100.0

_EACH_STEP = Duration(1, "steps")


def pretrain(
    run: RunConfig,
    every: Sequence[Every] = (),
    resume: bool = False,
    progress: Progress | None = None,
    say: Say = _log.warning,
    stop: Callable[[], bool] = lambda: False,
    save_now: Callable[[], bool] = lambda: False,
) -> Path:
    """Train as a run file says, together with the other processes that torchrun or srun has started.

    Args:
        run: the settings.
        every: what else happens and when, e.g. evaluations, with the encoder in eval mode; the metrics they return
            are written down. With several processes each does its own; those that read the encoder, and those that
            return metrics, are the same in all of them, as those of `eval.in_training` are.
        resume: continue from the last good checkpoint of the run folder; start afresh when there is none.
        progress: called with (steps done, steps).
        say: takes what a user should know, one remark at a time.
        stop: asked in each step; True in any process saves a checkpoint and ends.
        save_now: asked in each step; True in any process saves a checkpoint.

    Returns:
        The run folder. It holds `model/` unless the run was stopped.

    Raises:
        ConfigError: settings that do not fit the model or the device.
        ModelError: no such model.
        DataError: shards that are missing or too broken.
        CheckpointError: the folder holds a run and `resume` is false; or that run does not fit these settings.
        NonFiniteError: the loss is no number any more.
        PeerError: another of the processes has ended.
    """
    if not resume:
        require_no_run(Path(run.run.out))
    launched = launch()
    device = assemble.choose_device(run)
    say = say if launched.rank == 0 else _ignore
    for remark in remarks(run):
        say(remark)
    with _together(run, launched, device):
        _pretrain(run, device, every, resume, progress or _ignore_progress, say, _Asked(stop, save_now))
    return Path(run.run.out)


class _Asked(NamedTuple):
    stop: Callable[[], bool]
    save_now: Callable[[], bool]


def _together(run: RunConfig, launched: Launch, device: torch.device) -> AbstractContextManager[None]:
    """Exchange and watch with the other processes; nothing where there are none, or where the caller did it."""
    if launched.world_size == 1 or torch.distributed.is_initialized():
        return nullcontext()
    return join(launched, "nccl" if device.type == "cuda" else "gloo", run.run.peer_timeout)


def _pretrain(
    run: RunConfig,
    device: torch.device,
    every: Sequence[Every],
    resume: bool,
    progress: Progress,
    say: Say,
    asked: _Asked,
) -> None:
    data = training_data.open_data(run)
    shards = data.shards
    for note in shards.notes:
        say(note)
    learner = assemble.build_learner(run, device)
    with ExitStack() as stack:
        planned, captions = training_data.plan_data(run, data), training_data.choose_captions(run, data)
        quarantine = Quarantine(Path(run.run.out) / QUARANTINE)
        stored = training_data.stored_teacher(run, shards)
        replay = None if stored is None else stored.replay
        settled = (run, shards, learner.encoder, planned.plan, captions, quarantine.add)
        make_loader = partial(assemble.build_loader, *settled, replay=replay)
        loader = stack.enter_context(make_loader())
        course = assemble.plan_course(run, loader.num_batches)
        if course.warmup > course.steps:
            say(f"optim.warmup is {course.warmup} steps and the run has {course.steps}: optim.lr is never reached.")
        learner.module.objective.begin(
            num_samples=shards.num_samples, steps_per_epoch=loader.num_batches, steps=course.steps, device=device
        )
        stages = plan_stages(run, steps=course.steps, steps_per_epoch=loader.num_batches)
        check_stages(stages, learner.encoder, learner.twin)
        stream = Stream(
            run,
            learner.encoder,
            loader,
            lambda preprocess, tokenize: make_loader(preprocess=preprocess, tokenize=tokenize),
            stages,
            course.steps,
            None if stored is None else stored.teacher,
        )
        same = identity(run, learner.encoder, shards, training_data.more_identity(run, planned, stored))
        folder = stack.enter_context(closing(RunFolder(run, learner, same, say)))
        start = continue_run(run, learner, same, say) if resume else Start(0, 0.0)
        folder.open(start)
        view, accuracy = View(learner, run), Accuracy(learner.module.objective)
        costs = Costs(learner, device, run.run.peak_tflops)
        folder.extras.append(costs)
        data_log = DataLog(folder.path, planned, stream.loaders, quarantine, start.step, start.skipped)
        step = _make_step(run, learner.module, learner.teacher, before=accuracy.start)
        done = -1
        while done < 0:
            try:
                with closing(stream.batches(start.step, start.skipped)) as batches:
                    done = fit(
                        step,
                        costs.see(data_log.see(batches)),
                        learner.optimizer,
                        steps=course.steps,
                        schedule=course.schedule,
                        pace=course.pace,
                        encoder=learner.encoder,
                        every=[*_entries(run, every, progress, folder, view), data_log.every()],
                        start=start.step,
                        seconds=start.seconds,
                        clip_norm=run.optim.clip_norm,
                        watch=lambda: {**_shared_scalars(learner.encoder), **accuracy.watched()},
                        norms_every=OFTEN,
                        stop=asked.stop,
                        save_now=asked.save_now,
                    )
            except NonFiniteError as error:
                say(f"The whole batch is named in {folder.write_nonfinite(error.record)}.")
                start = folder.rewind(error, start)
        data_log.tell(say)
        if done < course.steps:
            folder.wait()
            say(f"Stopped after step {done} of {course.steps}, with a checkpoint. --resume continues.")
        else:
            if learner.ema is not None:
                with view.lend_averaged() as encoder:
                    folder.save_model(encoder, "model_ema")
            with view.lend() as encoder:
                folder.finish(encoder)


def _shared_scalars(encoder: DualEncoder) -> dict[str, torch.Tensor]:
    bias = encoder.logit_bias
    scale = {"logit_scale": encoder.logit_scale()}
    return scale if bias is None else {**scale, "logit_bias": bias}


def _make_step(
    run: RunConfig, module: assemble.PretrainStep, teacher: Teacher | None, before: Callable[[int], None]
) -> Callable[[ImageTextBatch, int], LossOutput]:
    """One training step up to and with backward; `before` is told its number first."""
    device = module.encoder.device
    chunk_size = assemble.rows_at_a_time(run)
    whole = chunk_size == run.data.global_batch_size // world_size()
    parallel = on_ranks(module if whole else EncodeStep(module.encoder, module.features), run.run.parallel, device)
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
        before(i)
        try:
            batch = batch if teacher is None else teacher(batch)
            output = plain(batch, i) if whole else cached(batch, i)
        except (MemoryError, RuntimeError) as error:  # CUDA's own kind is a RuntimeError
            if is_out_of_memory(error):
                raise ConfigError(_too_large(run, chunk_size)) from error
            raise
        parallel.finish(module.parameters())
        return output

    return step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is used up, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _too_large(run: RunConfig, rows: int) -> str:
    chunk = "is not set" if run.data.chunk_size is None else f"= {run.data.chunk_size}"
    tiles = ", ".join(f"loss.{name}.tile_size = {term.tile_size}" for name, term in run.loss.terms.items())
    return (
        f"The device ran out of memory with {rows} images at a time (data.chunk_size {chunk}), of a batch of "
        f"{run.data.global_batch_size} ({tiles}). Set data.chunk_size = {max(1, rows // 2)}, which changes no gradient "
        "and costs a second forward; lower the tile_size where the batch is large and the model small; or lower "
        "data.global_batch_size."
    )


def _entries(run: RunConfig, every: Sequence[Every], progress: Progress, folder: RunFolder, view: View) -> list[Every]:
    """What happens between the steps, in this order. Evaluations come before what writes their results down.

    All processes have the same list but for entries that do not read the encoder; only the main one writes.
    """
    return [
        Every(_EACH_STEP, clamp_temperature),
        *([] if view.ema is None else [Every(_EACH_STEP, _averaging(view.ema))]),
        *(replace(entry, action=_on_view(entry.action, view)) if entry.reads_encoder else entry for entry in every),
        Every(_EACH_STEP, lambda moment: progress(moment.step, moment.steps) if is_main() else None),
        Every(_EACH_STEP, folder.note),
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


def _on_view(action: Action, view: View) -> Action:
    def evaluate(moment: Moment) -> Mapping[str, float] | None:
        with view.lend() as encoder:
            found = action(replace(moment, encoder=encoder))
        if view.ema is None:
            return found
        with view.lend_averaged() as encoder:
            averaged = action(replace(moment, encoder=encoder))
        return {**(found or {}), **{f"ema/{name}": value for name, value in (averaged or {}).items()}}

    return evaluate


def _averaging(ema: Ema) -> Action:
    def average(moment: Moment) -> None:
        ema.update(moment.encoder)

    return average


def _ignore(remark: str) -> None:
    """Other processes than the main one say nothing."""


def _ignore_progress(done: int, total: int) -> None:
    """Nobody asked."""
