"""What goes wrong because of the user's input, as few exception types as callers can act on.

A message says what was found, what was expected and what to do, and names the place
(`shard 00012.tar, sample 000120034`). What only a bug of ours can cause is an `assert`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class VlkitError(Exception):
    """Base of all errors the user can cause; the command line shows it as one message and exits with 1."""


class ConfigError(VlkitError):
    """A run file, option or argument is not usable."""


class ModelError(VlkitError):
    """A model, its weights or its tokenizer cannot be had, or cannot give what is asked of it."""


class DataError(VlkitError):
    """Images, captions, tables or shards are missing or broken."""


class RemoteError(VlkitError):
    """Shards at a URL are out of reach for now; the same run can be continued later."""


class CheckpointError(VlkitError):
    """A run folder or checkpoint cannot be read, or does not fit."""


class GalleryError(VlkitError):
    """A feature set or index does not fit what is asked of it."""


def did_you_mean(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """A sentence that names the candidates nearest to a mistyped name, or lists all when there are few.

    Args:
        name: what the user wrote.
        candidates: the valid names.
        limit: at most so many near names.

    Returns:
        "Did you mean ...?" or "Valid: ...", empty when there are no candidates at all.
    """
    valid = list(candidates)
    lowered = {candidate.lower(): candidate for candidate in valid}
    near = [lowered[match] for match in get_close_matches(name.lower(), lowered, n=limit, cutoff=0.5)]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    if not valid:
        return ""
    if len(valid) <= 20:
        return f"Valid: {', '.join(valid)}."
    return f"Nothing similar among the {len(valid)} valid names."
