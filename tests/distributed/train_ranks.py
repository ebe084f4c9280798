"""Runs under torchrun with two processes: trains several runs one after the other. See test_train.py.

    torchrun --nproc-per-node=2 tests/distributed/train_ranks.py RUNS.json

RUNS.json holds a list of {"settings": ..., "resume": bool, "stop": step or 0}.
"""

import json
import sys
from pathlib import Path

from eval.in_training import make_every
from vlkit.config import load_run
from vlkit.distributed import launch
from vlkit.errors import VlkitError
from vlkit.training.pretrain import pretrain


def train(settings: dict, resume: bool, stop: int) -> str:
    """What went wrong, else nothing."""
    run = load_run(settings)
    # Only one of the processes is asked to stop; the other follows.
    steps = iter(range(1, 1000))
    asked = (lambda: next(steps) == stop) if launch().rank == 1 else (lambda: False)
    try:
        pretrain(run, every=make_every(run), resume=resume, stop=asked)
    except VlkitError as error:
        return str(error)
    return ""


def main() -> None:
    path = Path(sys.argv[1])
    said = [train(**run) for run in json.loads(path.read_text())]
    if launch().rank == 0:
        path.with_name("said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
