"""What makes two results comparable: the protocol they were measured under, and the items they were measured on.

A named protocol brings its fingerprint (`eval.protocols`); the result of a single command gets one here, so that
every line of results has one.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from eval.features import IMAGES
from eval.protocols import fingerprint

# What may differ between two results that are compared: add-ons with what follows from them, what is done to masks
# afterwards, and the softmax over a model's own scale.
FREE = frozenset({"probability", "addons", "pipeline", "needs", "transductive", "stream", "edits", "post_processing"})
# Columns that say which item a row is about.
_NAMING = ("direction", "class", "caption", "key")


def fingerprinted(line: Mapping[str, Any], precision: str, decoder: str, items: pa.Table | None) -> dict[str, Any]:
    """The line of a single evaluation, its protocol with precision, decoder, fingerprint and the hash of its items.

    Args:
        line: of `eval.results.result_line`.
        precision: of the model's weights.
        decoder: how the model reads images, in words; an evaluator that reads them another way says so itself.
        items: one row an item, where the evaluator gives them.
    """
    protocol = {**line["protocol"], "precision": precision}
    if protocol.get("images") == IMAGES:
        protocol["decoder"] = decoder
    protocol["fingerprint"] = fingerprint(comparable({**line, "protocol": protocol}))
    if items is not None:
        named = hashlib.sha256(repr(naming_of(items)).encode("utf-8", "backslashreplace"))
        protocol["data_hash"] = named.hexdigest()[:12]
    return {**line, "protocol": protocol}


def comparable(line: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in which two results that are compared must agree, but for the items."""
    fixed = {key: value for key, value in line["protocol"].items() if key not in FREE}
    given = {"task": line["task"], "split": line["split"], **fixed}
    return {key: value for key, value in given.items() if key not in ("fingerprint", "data_hash")}


def naming_of(items: pa.Table) -> list[tuple[str, ...]]:
    """Which item each row is about, by the columns that name it, else by all its texts."""
    texts = [field.name for field in items.schema if pa.types.is_string(field.type)]
    columns = [name for name in _NAMING if name in items.column_names] or texts
    return list(zip(*([str(cell) for cell in items[name].to_pylist()] for name in columns), strict=True))
