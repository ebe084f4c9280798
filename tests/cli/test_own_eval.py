"""A user's own eval.py or eval/ that hides the package: the command says which file does."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlkit.cli.own_eval import hiding_file, own_eval_file, require_own_eval

# What a command does that needs the package, in a process that has the user's folder first on its path.
COMMAND = """
import sys
from vlkit.cli import app, main
{first}
@app.command()
def needs_eval() -> None:
    {guard}
    from eval.metrics import retrieval_recall

main(["needs-eval"])
"""


def run(folder: Path, *, guard: str = "pass", first: str = "") -> subprocess.CompletedProcess[str]:
    script = COMMAND.format(guard=guard, first=first)
    # Python puts the current folder first for `-c`, as it does for `python -m` and in a notebook.
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)


def test_here_it_is_ours() -> None:
    assert hiding_file() is None
    assert own_eval_file().is_file()
    require_own_eval()


def test_a_script_called_eval_is_named(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("accuracy = 1\n")
    done = run(tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"Python finds {tmp_path / 'eval.py'} first" in done.stderr
    assert "Rename that file" in done.stderr


def test_a_package_called_eval_is_named(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("")
    done = run(tmp_path)
    assert done.returncode == 1
    assert str(tmp_path / "eval" / "__init__.py") in done.stderr


def test_one_that_was_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("accuracy = 1\n")
    done = run(tmp_path, first="import eval")
    assert done.returncode == 1
    assert str(tmp_path / "eval.py") in done.stderr


def test_the_guard_runs_none_of_the_users_code(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("raise SystemExit('the script ran')\n")
    done = run(tmp_path, guard="from vlkit.cli.own_eval import require_own_eval; require_own_eval()")
    assert done.returncode == 1
    assert "the script ran" not in done.stderr
    assert str(tmp_path / "eval.py") in done.stderr


def test_a_folder_without_init_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("ending", ["json", "table"])
def test_info_names_it(tmp_path: Path, ending: str) -> None:
    (tmp_path / "eval.py").write_text("raise SystemExit('the script ran')\n")
    arguments = ["info", "--json"] if ending == "json" else ["info"]
    script = f"from vlkit.cli import main; main({arguments!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / "eval.py") in done.stdout
