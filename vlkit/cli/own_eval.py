"""Whether the package `eval` that Python finds is vlkit's, and if not, which file hides it.

`eval` is a name a user's own script may well bear. An `eval.py` or `eval/` that stands earlier on the import path
would be run in place of ours; a command that needs ours names the file instead.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import vlkit
from vlkit.errors import ConfigError


def own_eval_file() -> Path:
    """Where vlkit's package `eval` lies: beside the package `vlkit`, installed or in a checkout."""
    return Path(vlkit.__file__).resolve().parent.parent / "eval" / "__init__.py"


def hiding_file() -> Path | None:
    """The file that Python imports as `eval` in place of ours; None when it is ours. Runs none of its code."""
    loaded = sys.modules.get("eval")
    if loaded is not None:
        found = getattr(loaded, "__file__", None)
    else:
        spec = find_spec("eval")
        # Without an origin it is a folder without __init__.py, and there is no eval of ours anywhere.
        found = None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    if found is None or Path(found).resolve() == own_eval_file():
        return None
    return Path(found)


def require_own_eval() -> None:
    """Call it before importing from `eval` in a command.

    Raises:
        ConfigError: another module or package called `eval` comes first; the message names its file.
    """
    hiding = hiding_file()
    if hiding is not None:
        raise ConfigError(
            f"This command needs vlkit's package 'eval' ({own_eval_file().parent}), but Python finds {hiding} first. "
            "Rename that file, start vlkit from another folder, or take its folder out of PYTHONPATH; "
            "if another distribution installed it, use a virtual environment without it."
        )


def is_about_eval(error: ImportError) -> bool:
    """Whether an import failed on `eval` or a module in it."""
    return (error.name or "").partition(".")[0] == "eval"
