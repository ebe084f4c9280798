"""The `vlkit` command. One module per command; heavy imports happen inside the commands.

`vlkit --help` must import neither torch nor open_clip (importing open_clip alone takes seconds).
"""

import errno
import sys
import warnings
from importlib import import_module
from typing import Annotated, TextIO

import typer

from vlkit import __version__
from vlkit.cli.console import say
from vlkit.cli.own_eval import is_about_eval, require_own_eval
from vlkit.errors import VlkitError

app = typer.Typer(
    name="vlkit",
    help="Pretrain image-text models, classify and retrieve zero-shot, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The modules of this folder that hold commands, in the order of `vlkit --help`. A module with `app` is a group
# under the name GROUP, else its function of the same name is the command.
COMMANDS = (
    "demo", "train", "classify", "embed", "index", "retrieve", "evaluate", "adapt", "methods", "interpret", "shards",
    "models", "export", "protocols", "info", "cache",
)  # fmt: skip

# What the operating system refuses is the user's to put right, and the file says where; no traceback helps.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit code 0, 1 for a VlkitError (shown as one message), 2 for usage, 130 after Ctrl-C."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _run(arguments)
        except VlkitError as error:
            say(f"vlkit: {error}")
            raise SystemExit(1) from error
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            where = "" if error.filename is None else f": {error.filename}"
            say(f"vlkit: {error.strerror}{where}.")
            raise SystemExit(1) from error
        except SystemExit as leaving:
            if leaving.code == 130:  # typer's answer to Ctrl-C, which it gives without a word
                say("vlkit: interrupted.")
            raise


def _run(arguments: list[str] | None) -> None:
    try:
        app(args=arguments, prog_name="vlkit")
    except ImportError as error:
        if is_about_eval(error):
            require_own_eval()
        raise


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"vlkit: warning: {message}")


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"vlkit {__version__}\n")
        raise typer.Exit


# The version is printed by the option's own callback: that of the app is called only when a command follows.
@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command; the help text stands in `app`."""


def _register() -> None:
    for name in COMMANDS:
        module = import_module(f"vlkit.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=module.GROUP)
        else:
            app.command(name)(getattr(module, name))


_register()
