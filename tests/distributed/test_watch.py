"""Started as srun starts processes, without srun: they find each other, and none waits for one that has ended."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlkit.distributed import Launch, launch
from vlkit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[003-004,7]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}

# Imports torch once, then forks two processes for every case. The second one ends in some way, the first one waits
# for it in an exchange.
SCRIPT = """
import json, logging, os, signal, socket, sys, time
import torch, torch.distributed as dist
from vlkit.distributed import launch
from vlkit.errors import DataError
from vlkit.training.watch import PeerError, join

def fail():
    raise DataError("shard 7 is gone")

ENDS = {
    "well": lambda: None,
    "error": fail,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stuck": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}

def main(case, rank, out):
    os.environ.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    logging.basicConfig(filename=f"{out}.log")
    began, said = time.monotonic(), "fine"
    try:
        with join(launch(), "gloo", timeout=4):
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == 2
            if rank == 1:
                ENDS[case]()
            dist.all_reduce(total)
    except PeerError as error:
        said = str(error)
    except DataError as error:
        said = "its own error"
    with open(f"{out}.{rank}", "w") as file:
        json.dump([said, time.monotonic() - began], file)
    os._exit(0)

for number, case in enumerate(ENDS):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            main(case, rank, f"{sys.argv[1]}/{case}")
        children.append(child)
    os.waitpid(children[0], 0)
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
"""


def test_srun_says_which_process_this_is() -> None:
    found = launch(SRUN)
    assert found == Launch(9, 11, 1, 3, "gpu003", found.port)
    assert found.port != launch({**SRUN, "SLURM_JOB_ID": "1235"}).port
    assert launch({**SRUN, "MASTER_ADDR": "here", "MASTER_PORT": "7"})[-2:] == ("here", 7)
    assert launch({**SRUN, "SLURM_STEP_NODELIST": "alpha,beta"}).address == "alpha"


def test_torchrun_wins_and_alone_is_alone() -> None:
    torchrun = Launch(1, 2, 1, 2, "x", 5).environment()
    assert launch({**SRUN, **torchrun}) == Launch(1, 2, 1, 2, "x", 5)
    assert launch({}) == Launch()
    # A batch script runs once, whatever its job has asked for.
    assert launch({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == Launch()


def test_variables_that_make_no_sense_are_shown() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_LOCALID.*'SLURM_JOB_ID': '1234'.*torchrun or srun"):
        launch({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"})
    with pytest.raises(ConfigError, match="RANK"):
        launch({"WORLD_SIZE": "2"})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_one_that_ends_is_named_and_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    srun = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    environment = {**os.environ, **srun, "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = {path.name: json.loads(path.read_text())[0] for path in tmp_path.glob("*.[01]")}
    assert (said["well.0"], said["error.1"]) == ("fine", "its own error")
    assert "Process 1 of 2 on host" in said["error.0"] and "DataError: shard 7 is gone" in said["error.0"]
    assert "Process 1 of 2 on host" in said["killed.0"] and "has said nothing for" in said["killed.0"]
    # One that hangs leaves the exchange open: the watch ends the process.
    log = (tmp_path / "stuck.log").read_text()
    assert "stuck.0" not in said and "Process 1 of 2 on host" in log and "--resume continues" in log
    assert time.monotonic() - began < 120
