"""Which layers a method runs through when it is asked for the last few."""

from collections.abc import Sequence

from vlkit.errors import ConfigError
from vlkit.models.tower import Block


def first_of_last(last_layers: int, blocks: Sequence[Block]) -> int:
    """The position of the first of the last `last_layers` blocks.

    Raises:
        ConfigError: none, or more than there are.
    """
    if not 1 <= last_layers <= len(blocks):
        raise ConfigError(f"last_layers is {last_layers}; this tower has {len(blocks)} layers: expected 1 to that.")
    return len(blocks) - last_layers
