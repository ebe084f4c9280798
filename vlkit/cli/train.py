"""`vlkit train`: pretrain from a run file, continue a run, or see what a run would be."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table, say
from vlkit.cli.live_line import live_line, stop_on_signals
from vlkit.cli.own_eval import require_own_eval

if TYPE_CHECKING:
    from vlkit.config import RunConfig
    from vlkit.training.plan import Plan


_MOST_GROUPS = 20


def train(
    run: Annotated[str, typer.Argument(help="A run file (TOML), or the name of a shipped run.", metavar="RUN")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set optim.lr=3e-4")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run folder's last good checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Try one batch and print the plan.")] = False,
    json: Json = False,
) -> None:
    """Pretrain an image-text model on shards.

    The folder `run.out` gets checkpoints, metrics.jsonl, loss.png and the trained `model`, which every other
    command loads as run:FOLDER. Ctrl-C and SIGTERM save a checkpoint and stop; --resume continues. SIGUSR1 saves one.

    Several GPUs: torchrun --nproc-per-node=N --no-python vlkit train RUN, or srun with one task a GPU.
    """
    from vlkit.config import load_run

    settings = load_run(run, overrides or [])
    if not dry_run:
        _train(settings, resume, json)
        return
    if resume:
        say("--resume has no effect with --dry-run.")
    _show_plan(settings, json)


def _train(run: "RunConfig", resume: bool, json: bool) -> None:
    require_own_eval()
    from eval.in_training import make_every
    from vlkit.distributed import launch
    from vlkit.settings import Duration
    from vlkit.training.loop import Every
    from vlkit.training.pretrain import pretrain

    is_main = launch().rank == 0
    with live_line() as live, stop_on_signals() as stop:
        shown = [Every(Duration(1, "steps"), live.update, reads_encoder=False)] if is_main else []
        every = [*make_every(run), *shown]
        out = pretrain(run, every=every, resume=resume, say=say, stop=stop, save_now=stop.take_save)
    if stop.signal and not (live.moment is not None and live.moment.last):
        raise SystemExit(128 + stop.signal)
    if is_main:
        _show_result(out, json)


def _show_result(out: Path, json: bool) -> None:
    from vlkit.training.metrics import read_metrics

    lines = list(read_metrics(out / "metrics.jsonl"))
    evaluated = [line for line in lines if "eval" in line]
    last = lines[-1]
    result: dict[str, Any] = {
        "out": str(out),
        "model": f"run:{out}",
        "summary": str(out / "summary.html"),
        **{name: last[name] for name in ("step", "samples", "epoch", "seconds", "loss", "logit_scale")},
        "eval": evaluated[-1]["eval"] if evaluated else {},
    }
    if json:
        print_json(result)
        return
    rows = [(name, value) for name, value in result.items() if name != "eval"]
    print_table("Training is complete", ("result", "value"), [*rows, *result["eval"].items()])


def _show_plan(run: "RunConfig", json: bool) -> None:
    from vlkit.config import remarks
    from vlkit.training.plan import dry_run

    for remark in remarks(run):
        say(remark)
    plan = dry_run(run)
    evaluations = _check_evaluations(run)
    if json:
        print_json({"out": run.run.out, **plan.to_dict(), "evaluations": evaluations})
        return
    print_table(f"Plan of the run {run.run.out}", ("what", "value"), _plan_rows(run, plan))
    _show_groups(plan)
    columns = ("evaluation", "data", "every", "problem")
    if evaluations:
        print_table(None, columns, [[entry[column] for column in columns] for entry in evaluations])
    if plan.data.problem:
        say(f"The training data was not found, so the batch was made up: {plan.data.problem}")


def _show_groups(plan: "Plan") -> None:
    """What each source or class gives in an epoch, where there are several; of many the first."""
    groups = plan.data.groups
    if len(groups) < 2:
        return
    rows = [
        (group.name, f"{group.num_samples:,}", f"{group.share:.4%}", f"{group.expected:,.1f}", f"{group.planned:,}",
         f"{group.passes:.3g}")
        for group in groups[:_MOST_GROUPS]
    ]  # fmt: skip
    left_out = f" (the first {_MOST_GROUPS} of {len(groups):,})" if len(groups) > _MOST_GROUPS else ""
    columns = (plan.data.kind, "samples", "share", "expected", "realised", "passes")
    print_table(f"An epoch by {plan.data.kind}{left_out}", columns, rows)


def _check_evaluations(run: "RunConfig") -> list[dict[str, str | None]]:
    """Each [[eval]] of the run, and why it could not be done, if it could not."""
    require_own_eval()
    from eval.in_training import make_every
    from vlkit.errors import DataError

    rows = []
    for entry in run.eval:
        problem = None
        try:
            make_every(run.model_copy(update={"eval": (entry,)}))
        except DataError as error:
            problem = str(error)
        data = entry.data if isinstance(entry.data, str) else "::".join(entry.data)
        name = entry.protocol or entry.name
        rows.append({"evaluation": name, "data": data, "every": str(entry.every), "problem": problem})
    return rows


def _plan_rows(run: "RunConfig", plan: "Plan") -> list[tuple[str, str]]:
    memory, data = plan.memory, plan.data
    measured = f"measured on {memory.rows_measured} images" if memory.rows_measured < memory.rows else "measured"
    found = f"{data.num_samples:,} samples in {data.num_shards:,} shards" if data.problem is None else "not found"
    towers = [
        (f"parameters, {tower}", f"{count['total']:,} ({count['trainable']:,} trained)")
        for tower, count in plan.parameters.items()
    ]
    return [
        ("device", f"{plan.device}, {plan.precision}, {plan.num_processes} process(es), {plan.num_workers} worker(s)"),
        *towers,
        ("training data", found),
        ("remainder of an epoch", data.remainder or "unknown without data"),
        ("batch", f"{plan.batch_size:,} images over all processes"),
        ("steps", _count(plan.steps)),
        ("steps per epoch", _count(plan.steps_per_epoch)),
        ("epochs", "unknown without data" if plan.epochs is None else f"{plan.epochs:.4g}"),
        ("samples seen", _count(plan.samples)),
        ("learning rate", f"{run.optim.schedule}, {plan.lr:g} after {_count(plan.warmup_steps)} steps of warmup"),
        ("checkpoints", f"every {run.checkpoint.every}, the last {run.checkpoint.keep_last} kept"),
        ("memory, weights", _bytes(memory.weights)),
        ("memory, gradients", _bytes(memory.gradients)),
        ("memory, optimizer", _bytes(memory.optimizer)),
        ("memory, activations", f"{_bytes(memory.activations)} for {memory.rows:,} images ({measured})"),
        ("memory, together", _bytes(memory.total)),
        ("loss of one batch", f"{plan.loss:.4f}"),
    ]


def _count(number: int | None) -> str:
    return "unknown without data" if number is None else f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
