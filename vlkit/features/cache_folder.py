"""The cache of features lies where vlkit keeps what it can make again; what to say when that refuses."""

from pathlib import Path

from vlkit.data.cache_folder import VARIABLE as VARIABLE
from vlkit.data.cache_folder import cache_folder as cache_folder


def cannot_write(folder: Path, error: OSError) -> str:
    """What to say when the cache refuses, and what can be done."""
    return (
        f"Cannot write the cache {folder}: {error.strerror or error}. Free space (`vlkit cache clear`), name another "
        f"folder in {VARIABLE}, or go without: --no-cache."
    )
