"""Workers that fail say how, and one that never answers must not keep the main process from ending."""

import operator
import time
from typing import Any

import pytest
from torch import Tensor

from vlkit.data.worker_pool import WorkerPool


def never_ends(task: Any, memory: Tensor) -> None:
    time.sleep(600)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_stuck_worker_is_given_up_and_killed() -> None:
    pool = WorkerPool(never_ends, 1, 16, "fork")
    assert pool.submit("tag", "task")
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"still at work after 0\.2 s"):
        pool.drain(0.2)
    pool.close()
    assert time.monotonic() - began < 10


def test_an_exception_in_a_worker_comes_with_its_traceback() -> None:
    pool = WorkerPool(operator.truediv, 1, 8)  # (task, memory) -> task / memory
    try:
        pool.submit("mine", 0)
        ((tag, result),) = pool.wait()
        assert tag == "mine" and result.shape == (8,)
        pool.submit("mine", "text")
        with pytest.raises(RuntimeError, match=r"Data worker 0 failed:(.|\n)*TypeError: unsupported operand"):
            pool.wait()
    finally:
        pool.close()
