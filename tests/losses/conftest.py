"""Batches that are hard to count, what autograd keeps, and two processes, for tests of losses.

Fixtures:
    texts_and_valid     texts of each image, and which images are valid: one case after the other.
    numbers_kept        `numbers_kept(compute)`: how many numbers autograd keeps of what `compute()` does.
    on_two_processes    `on_two_processes(script)`: runs it with its rank and the file where both meet as arguments.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "plain": ([1, 1, 1, 1, 1], [True] * 5),
    "ragged": ([2, 1, 3, 1, 2], [True] * 5),
    "an image without text": ([1, 0, 2, 1, 1], [True] * 5),
    "broken": ([1, 1, 1, 1, 1], [True, False, True, True, False]),
    "ragged and broken": ([3, 2, 0, 1, 2], [True, False, True, True, True]),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def texts_and_valid(request: pytest.FixtureRequest) -> tuple[list[int], list[bool]]:
    case: tuple[list[int], list[bool]] = request.param
    return case


@pytest.fixture
def numbers_kept() -> Callable[[Callable[[], Any]], int]:
    def measure(compute: Callable[[], Any]) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made = compute()
        del made
        return sum(kept.values())

    return measure


@pytest.fixture
def on_two_processes(tmp_path: Path) -> Callable[[str], None]:
    def run(script: str) -> None:
        commands = [[sys.executable, "-c", script, str(rank), str(tmp_path / "meeting")] for rank in range(2)]
        ranks = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
        errors = [process.communicate()[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)

    return run
