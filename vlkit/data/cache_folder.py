"""Where vlkit keeps what it can make again."""

import os
import sys
from pathlib import Path

VARIABLE = "VLKIT_CACHE"


def cache_folder() -> Path:
    """`VLKIT_CACHE`, or `vlkit` in the user's cache folder of this system."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vlkit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "vlkit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlkit"
