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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlkit.config import RunConfig, remarks
from vlkit.contracts import ImageTextBatch, Progress
from vlkit.data.loader import Loader
from vlkit.data.randomness import raw
from vlkit.data.shard_index import ShardSet
from vlkit.distributed import is_main, rank, world_size
from vlkit.errors import CheckpointError, ConfigError, did_you_mean
from vlkit.losses import LossOutput
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.saved import read_json, save_encoder, write_json
from vlkit.settings import Duration
from vlkit.training import assemble, checkpoint
from vlkit.training.loop import Every, Moment, NonFiniteError, Pace, fit
from vlkit.training.metrics import MetricsLog, plot_curves, read_metrics
from vlkit.training.optim import make_optimizer, make_schedule

_log = logging.getLogger(__name__)

# Beyond a hundredfold the softmax saturates. Source: Radford et al. 2021, arXiv:2103.00020, section 2.5.
MAX_LOGIT_SCALE = 100.0

Say = Callable[[str], None]


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
        every: what else happens and when, e.g. evaluations; metrics they return are written down.
        resume: continue from the last good checkpoint of the run folder; start afresh when there is none.
        progress: called with (steps done, steps).
        say: takes remarks worth a user's attention, one sentence each.
        stop: asked after each step; True saves a checkpoint and ends.

    Returns:
        The run folder. `model/` is in it unless the run was stopped.

    Raises:
        ConfigError, ModelError, DataError: settings, model or data are unusable.
        CheckpointError: the folder holds a run and `resume` is false, or its run does not fit these settings.
        NonFiniteError: the loss is no number any more.
    """
    out = Path(run.run.out)
    say = say if is_main() else _silent
    for remark in remarks(run):
        say(remark)
    if not resume:
        _require_no_run(out)
    device = assemble.choose_device(run)
    joined = assemble.join_processes(device)
    try:
        _pretrain(run, out, device, list(every), resume, progress, say, stop)
    finally:
        if joined:
            torch.distributed.destroy_process_group()
    return out
