"""Two and four processes give the loss and all gradients of one: DDP and FSDP2, both losses, with and without chunks.

All cases of a world size run inside one launch of torchrun; see ranks.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_equal_one(world: int, tmp_path: Path) -> None:
    out = tmp_path / "differences.json"
    script = [str(HERE / "ranks.py"), str(out)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if world == 2 else []), *script, *([] if world == 2 else [str(world)])],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert len(found) >= (12 if world == 4 else 24)
    assert {case: value for case, value in found.items() if not value < 1e-12} == {}
