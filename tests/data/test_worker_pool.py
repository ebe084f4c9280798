"""A worker that never answers must not keep the main process from ending."""

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
