"""The `vlkit` command. One module per command; heavy imports happen inside the commands.

`vlkit --help` must import neither torch nor open_clip (importing open_clip alone takes seconds).
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from vlkit import __version__
from vlkit.cli.console import say
from vlkit.errors import VlkitError

app = typer.Typer(
    name="vlkit",
    help="Pretrain image-text models, classify and retrieve zero-shot, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Module, the name its commands are found under. A module with `app` is a group, else its function is the command.
COMMANDS = ("demo", "train", "classify", "evaluate", "shards", "models", "info")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit code 0, 1 for a VlkitError (shown as one message), 2 for usage."""
    try:
        app(args=arguments, prog_name="vlkit")
    except VlkitError as error:
        say(f"vlkit: {error}")
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        say("vlkit: interrupted.")
        raise SystemExit(130) from None


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        sys.stdout.write(f"vlkit {__version__}\n")
        raise typer.Exit


def _register() -> None:
    for name in COMMANDS:
        if find_spec(f"vlkit.cli.{name}") is None:
            continue
        module = import_module(f"vlkit.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=module.GROUP)
        else:
            app.command(name)(getattr(module, name))


_register()
