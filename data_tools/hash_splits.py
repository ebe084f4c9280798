"""Splits by hash: which split a record falls into depends on its key and the seed alone.

Records that are added, removed or read in another order move no other record to another split.
"""

import hashlib
import math
from dataclasses import replace

from vlkit.data.records import Source
from vlkit.errors import ConfigError, DataError


def parse_fractions(text: str) -> dict[str, float]:
    """`train=0.9,val=0.1` as a dict; the fractions add up to 1.

    Raises:
        ConfigError: another form, a name twice, a name that is no folder name, or another sum.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not equals or not name.isidentifier() or not 0 < value <= 1 or name in fractions:
            raise ConfigError(f"--split-by-hash: '{part.strip()}' is not NAME=FRACTION, as in train=0.9,val=0.1.")
        fractions[name] = value
    if not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise ConfigError(f"--split-by-hash: the fractions add up to {sum(fractions.values()):g}, expected 1.")
    return fractions


def split_by_hash(source: Source, fractions: dict[str, float], seed: int = 0) -> dict[str, Source]:
    """The records of each split, in their order, with `split` set.

    Args:
        source: what is divided; an image with all its captions is one record and stays together.
        fractions: name -> share, adding up to 1; realised shares differ as chance has it.
        seed: another seed, another division.

    Raises:
        DataError: a split got no record.
    """
    names = list(fractions)
    bounds = [sum(list(fractions.values())[: place + 1]) for place in range(len(names) - 1)]
    of_split: dict[str, list[int]] = {name: [] for name in names}
    for row, record in enumerate(source.records):
        value = _unit_interval(record.key, seed)
        of_split[names[sum(value >= bound for bound in bounds)]].append(row)
    empty = [name for name, rows in of_split.items() if not rows]
    if empty:
        raise DataError(f"Split '{empty[0]}' got none of the {len(source)} records. Give it more, or leave it out.")
    return {
        name: replace(source, records=tuple(replace(source.records[row], split=name) for row in rows))
        for name, rows in of_split.items()
    }


def _unit_interval(key: str, seed: int) -> float:
    """A number in [0, 1) that is the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
