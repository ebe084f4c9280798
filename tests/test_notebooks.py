"""Notebooks: each `notebooks/*.py` gives the committed `.ipynb`, and runs as a plain script on tiny data.

How a source is written:
    - percent format (`# %%` code, `# %% [markdown]` text); `make notebooks` writes the `.ipynb` without outputs.
    - no IPython magics and no `display`: plain Python, so that the source is checked by ruff and run here.
    - the sizes stand in one cell of plain assignments near the top, which also carries the tiny sizes for this test:

          # %% tags=["parameters"] tiny={"num_scenes": 200, "num_steps": 4}
          num_scenes = 4000
          num_steps = 600

      Only names that the cell assigns may be given there.
    - files are written below the current folder; the test runs the source in an empty one, without a network.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))


def read(source: str) -> Any:
    return jupytext.reads(source, fmt="py:percent")


def without_ids(notebook: Any) -> dict[str, Any]:
    """A notebook but for what jupytext draws at random or reads from its own version."""
    cells = [{name: value for name, value in cell.items() if name != "id"} for cell in notebook["cells"]]
    metadata = {name: value for name, value in notebook["metadata"].items() if name != "jupytext"}
    return {"cells": cells, "metadata": metadata}


def made_tiny(source: str) -> str:
    """The source with the `tiny` values of its parameters cell assigned right behind that cell."""
    cells = read(source).cells
    chosen = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(chosen) == 1, 'one cell must be headed: # %% tags=["parameters"] tiny={"name": value}'
    tiny = chosen[0].metadata["tiny"]
    nodes = ast.parse(chosen[0].source).body
    assigned = {target.id for node in nodes for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
    assert set(tiny) <= assigned, f"the cell assigns {sorted(assigned)}, but tiny gives {sorted(tiny)}"
    chosen[0].source += "".join(f"\n{name} = {value!r}" for name, value in tiny.items())
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")


def test_there_is_a_source_for_every_notebook() -> None:
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert all(re.fullmatch(r"\d\d_\w+", path.stem) for path in SOURCES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_committed_notebook_is_the_source(source: Path) -> None:
    committed = jupytext.read(source.with_suffix(".ipynb"))
    made = jupytext.reads(jupytext.writes(read(source.read_text(encoding="utf-8")), fmt="ipynb"), fmt="ipynb")
    assert without_ids(committed) == without_ids(made), "run `make notebooks`"
    assert all(cell.outputs == [] for cell in committed.cells if cell.cell_type == "code")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_source_runs_on_tiny_data(source: Path, tmp_path: Path) -> None:
    script = tmp_path / source.name
    script.write_text(made_tiny(source.read_text(encoding="utf-8")), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-W", "error", "-W", "default::DeprecationWarning", str(script)]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tiny_values_stand_behind_the_cells_own() -> None:
    source = '# %% tags=["parameters"] tiny={"n": 2}\nn = 100\n\n# %%\nresult = n\n'
    names: dict[str, Any] = {}
    exec(made_tiny(source), names)
    assert names["result"] == 2


def test_a_tiny_value_for_a_name_the_cell_lacks_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"assigns \['n'\], but tiny gives \['m'\]"):
        made_tiny('# %% tags=["parameters"] tiny={"m": 2}\nn = 100\n')
