"""The shipped runs: `vlkit train NAME` with NAME the stem of a file here."""

from pathlib import Path


def shipped_runs() -> dict[str, Path]:
    """Path of each shipped run file by its name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}
