"""Processes that read for a loader: they end with it, with the main process, and when they are killed."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Augment
from vlkit.errors import ConfigError, DataError

AUGMENT = Augment(crop_scale=(0.3, 1.0), hflip=0.5)


def test_a_killed_worker_is_an_error_and_not_a_hang(
    shards: ShardSet, make_loader: Callable[..., Loader], worker_pids: Callable[[], set[int]]
) -> None:
    before = worker_pids()
    with make_loader(shards, workers=2, batch_size=4, prefetch=1) as loader:
        batches = loader.epoch(0)
        next(batches)
        victim = min(worker_pids() - before)
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(DataError, match=rf"Data worker \d \(process {victim}\) was killed by signal 9.*memory"):
            list(batches)
        assert time.monotonic() - started < 20
        assert worker_pids() == before  # the other one was ended
        assert len(list(loader.epoch(0))) == 20  # and the loader can be used again


def test_leaving_an_epoch_early_and_closing_twice(
    shards: ShardSet, make_loader: Callable[..., Loader], worker_pids: Callable[[], set[int]]
) -> None:
    before = worker_pids()
    loader = make_loader(shards, workers=1)
    for _ in range(3):
        for batch in loader.epoch(0):
            assert batch.valid.all()
            break
        gc.collect()
    suspended = loader.epoch(1)
    next(suspended)
    time.sleep(0.3)  # further batches are ready by now; they must not be given out after `close`
    with pytest.raises(ConfigError, match="Two epochs of one loader"):
        next(loader.epoch(2))
    loader.close()
    loader.close()
    assert worker_pids() == before
    with pytest.raises(ConfigError, match="was closed before the epoch"):
        list(suspended)


SCRIPT = """
    import json, multiprocessing, signal, sys, time
    from vlkit.data.loader import Loader
    from vlkit.data.shard_index import ShardSet
    from vlkit.data.transforms import Preprocess
    from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

    if __name__ == "__main__":
        # A job that a shell started in the background inherits a Ctrl-C that is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        loader = Loader(ShardSet.open(sys.argv[1]), TextTokenizer(CLIP_BPE, 16), batch_size=4,
                        preprocess=Preprocess(size=16), workers=2, start_method=sys.argv[2])
        batches = loader.epoch(0)
        next(batches)
        try:
            print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("how", "method"),
    [
        (signal.SIGINT, "fork"),
        pytest.param(signal.SIGINT, "forkserver", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "fork", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_leave_with_the_main_process(
    shards: ShardSet, tmp_path: Path, how: signal.Signals, method: str
) -> None:
    """After Ctrl-C (sent to the whole group, as a terminal does) and after a kill of the main process alone."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script), str(shards.shards[0].path.parent), method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert len(pids) == 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    out, errors = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 3 and "interrupted" in out and "Traceback" not in errors, errors
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().split()[2] == "Z")  # a zombie has ended


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_other_start_methods(
    shards: ShardSet, method: Any, make_loader: Callable[..., Loader], assert_equal: Callable[..., None]
) -> None:
    with make_loader(shards, augment=AUGMENT, workers=2, start_method=method) as loader:
        assert_equal(list(loader.epoch(0)), list(make_loader(shards, augment=AUGMENT).epoch(0)))


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(
    shards: ShardSet, make_loader: Callable[..., Loader], worker_pids: Callable[[], set[int]]
) -> None:
    def kilobytes() -> int:
        pids = [os.getpid(), *worker_pids()]
        return sum(
            int(line.split()[1])
            for pid in pids
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc on this system")
    with make_loader(shards, augment=AUGMENT, workers=2) as loader:
        used = []
        for epoch in range(50):
            for _ in loader.epoch(epoch):
                pass
            used.append(kilobytes())
    assert used[-1] - used[9] < 5_000, used


@pytest.mark.gpu
def test_images_are_pinned_where_there_is_a_gpu(shards: ShardSet, make_loader: Callable[..., Loader]) -> None:
    with make_loader(shards, workers=1) as loader:
        assert all(batch.images.is_pinned() for batch in loader.epoch(0))
    assert next(iter(make_loader(shards).epoch(0))).images.is_pinned()
