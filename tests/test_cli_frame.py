"""What every command shares: exit codes, one-message errors, warnings, tables, hostile text, the progress bar."""

import errno
import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vlkit
from vlkit.cli import COMMANDS, app
from vlkit.cli.console import MAX_UNREADABLE_SHOWN, print_json, print_table, progress_bar, say, say_unreadable
from vlkit.errors import DataError

Call = Callable[..., Any]


@pytest.fixture
def trial() -> Iterator[list[BaseException | Callable[[], None]]]:
    """A command `trial` that raises, or calls, what the test puts in the list; taken out again afterwards."""
    actions: list[BaseException | Callable[[], None]] = []

    def trial() -> None:
        action = actions.pop()
        if isinstance(action, BaseException):
            raise action
        action()

    app.command("trial")(trial)
    yield actions
    app.registered_commands.pop()


def test_an_unreadable_image_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    images = [("a/1.jpg", "a/1.jpg is truncated"), ("1", "x.tar: 1.jpg is truncated")]
    say_unreadable("unreadable images", images)
    assert capsys.readouterr().err.splitlines() == [
        "unreadable images: 2",
        "  a/1.jpg is truncated",
        "  1: x.tar: 1.jpg is truncated",
    ]
    say_unreadable("unreadable images", images[:1] * (MAX_UNREADABLE_SHOWN + 3), " (--json lists all).")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MAX_UNREADABLE_SHOWN + 2 and lines[-1] == "  ... and 3 more (--json lists all)."


def test_help_lists_the_commands(call_vlkit: Call) -> None:
    called = call_vlkit("--help")
    assert called.code == 0
    assert re.search(r"^  info +Show versions", called.out, re.MULTILINE)
    assert call_vlkit("-h").out == called.out


def test_every_command_answers_help(call_vlkit: Call) -> None:
    listed = re.findall(r"^  (\w+)  ", call_vlkit("--help").out.partition("Commands:")[2], re.MULTILINE)
    assert len(listed) == len(COMMANDS)
    for name in listed:
        assert call_vlkit(name, "--help").code == 0


def test_version(call_vlkit: Call) -> None:
    assert call_vlkit("--version").out == f"vlkit {vlkit.__version__}\n"


@pytest.mark.parametrize(("arguments", "hint"), [(["inof"], "info"), (["info", "--jsn"], "--json")])
def test_a_mistyped_word_is_a_usage_error_that_names_the_nearest(
    call_vlkit: Call, arguments: list[str], hint: str
) -> None:
    called = call_vlkit(*arguments)
    assert called.code == 2
    assert called.out == ""
    assert hint in called.err.splitlines()[-1]


def test_a_vlkit_error_is_one_message_and_exit_1(call_vlkit: Call, trial: list[Any]) -> None:
    trial.append(DataError("Found no images in 'x'. Expected .jpg or .png files."))
    called = call_vlkit("trial")
    assert (called.code, called.out) == (1, "")
    assert called.err == "vlkit: Found no images in 'x'. Expected .jpg or .png files.\n"


def test_a_message_is_shown_as_text(call_vlkit: Call, trial: list[Any]) -> None:
    trial.append(DataError("\x1b[31m [red]x[/red] [/] :dog: <img src=x onerror=alert(1)> C:\\"))
    assert call_vlkit("trial").err == "vlkit: \\x1b[31m [red]x[/red] [/] :dog: <img src=x onerror=alert(1)> C:\\\n"


def test_a_long_message_is_not_folded(call_vlkit: Call, trial: list[Any]) -> None:
    trial.append(DataError("word " * 100 + "end"))
    assert call_vlkit("trial").err.count("\n") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_what_the_system_refuses_is_one_message(call_vlkit: Call, trial: list[Any], code: int) -> None:
    error = OSError(code, "Refused", "shards/00000.tar")
    trial.append(error)
    called = call_vlkit("trial")
    assert (called.code, called.err) == (1, "vlkit: Refused: shards/00000.tar.\n")


def test_a_bug_of_ours_keeps_its_traceback(call_vlkit: Call, trial: list[Any]) -> None:
    trial.append(AssertionError("shape (2, 3)"))
    with pytest.raises(AssertionError, match="shape"):
        call_vlkit("trial")


def test_an_import_that_fails_for_another_reason_is_passed_on(call_vlkit: Call, trial: list[Any]) -> None:
    trial.append(ImportError("No module named 'wandb'", name="wandb"))
    with pytest.raises(ImportError, match="wandb"):
        call_vlkit("trial")


def test_interrupted(call_vlkit: Call, trial: list[Any]) -> None:
    trial.append(KeyboardInterrupt())
    called = call_vlkit("trial")
    assert (called.code, called.err) == (130, "vlkit: interrupted.\n")


def test_a_warning_is_one_line(call_vlkit: Call, trial: list[Any]) -> None:
    def warn() -> None:
        warnings.simplefilter("default")
        warnings.warn("optim.warmup has no effect with a constant schedule", stacklevel=1)

    trial.append(warn)
    called = call_vlkit("trial")
    assert called.code == 0
    assert called.err == "vlkit: warning: optim.warmup has no effect with a constant schedule\n"


def test_a_table_in_a_pipe_keeps_each_row_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Scores", ("class", "accuracy"), [("x" * 300, 0.123456), ("y", 1)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Scores"
    (row,) = [line for line in lines if "xxx" in line]
    assert "x" * 300 in row
    assert "0.1235" in row
    assert [line.split()[-2] for line in lines if "│" in line] == ["0.1235", "1"]


def test_a_table_shows_hostile_cells_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[b]t[/b]", ("[red]n",), [("\x1b[2J[bold]a[/bold] :dog:\nb",), (None,)])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b[2J[bold]a[/bold] :dog: b" in printed
    assert "[red]n" in printed
    assert "[b]t[/b]" in printed


def test_an_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(None, ("name",), [])
    assert "name" in capsys.readouterr().out


def test_json_is_one_line_of_ascii_and_refuses_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "Zürich\n\x1b[31m"})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.count("\n") == 1
    assert json.loads(printed) == {"text": "Zürich\n\x1b[31m"}
    with pytest.raises(ValueError, match="JSON"):
        print_json({"loss": float("nan")})


def test_remarks_and_progress_leave_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("reading [red]") as report:
        report(1, 2)
        report(2, 2)
    say("done")
    assert capsys.readouterr() == ("", "done\n")


def test_progress_on_a_terminal_shows_label_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("reading [red]", unit="images") as report:
        report(3, 7)
    assert "reading [red]" in terminal.getvalue()
    assert "3/7" in terminal.getvalue()
    assert "images/s" in terminal.getvalue()
    with progress_bar("suite", unit="%") as report:
        report(250, 1000)
    assert "25%" in terminal.getvalue() and "250/1000" not in terminal.getvalue() and "%/s" not in terminal.getvalue()
