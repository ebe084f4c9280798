"""One number a sample, by which to select: from a table, or the similarity of image and captions under a model.

Scores are a float32 array in the order of the shards; NaN stands for no score.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.sample_facts import hash64
from data_tools.uid_lists import as_text
from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.records import Record
from vlkit.data.shard_index import ShardSet
from vlkit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from vlkit.models.embedder import Embedder

Scores = NDArray[np.float32]

_SAMPLES_AT_ONCE = 1024
_ROWS_AT_ONCE = 1 << 16


def clip_scores(shards: ShardSet, embedder: "Embedder", progress: Progress | None = None) -> Scores:
    """The cosine of each image with its captions, on average over these; NaN for samples without either.

    Args:
        shards: N samples.
        embedder: of `vlkit.load_embedder`.
        progress: called with (samples done, N).
    """
    scores = np.full(shards.num_samples, np.nan, np.float32)
    for start in range(0, shards.num_samples, _SAMPLES_AT_ONCE):
        stop = min(start + _SAMPLES_AT_ONCE, shards.num_samples)
        records = [_record(shards, sample) for sample in range(start, stop)]
        images = embedder.embed_images_where_readable(records)
        owners = [place for place, row in enumerate(images.kept) for _ in records[row].captions]
        texts = embedder.embed_texts([text for row in images.kept for text in records[row].captions])
        cosines = (images.embeddings[owners] * texts).sum(1).numpy()
        counts = np.bincount(owners, minlength=len(images.kept))
        sums = np.bincount(owners, cosines, minlength=len(images.kept))
        rows = np.array(images.kept, np.int64)[counts > 0]
        scores[start + rows] = sums[counts > 0] / counts[counts > 0]
        if progress:
            progress(stop, shards.num_samples)
    return scores


def read_scores(
    path: str | Path, column: str, uids: NDArray[np.void], keys: NDArray[np.uint64], names: NDArray[np.uint64]
) -> tuple[Scores, int]:
    """Scores out of a parquet or CSV file (or a folder of them), in the order of the samples.

    A row belongs to the sample of its `uid`; where there is no such column, to that of its `key`, which is
    `SHARD/KEY`, or `KEY` alone where no two shards share one.

    Args:
        path: the table, read in portions.
        column: the numbers.
        uids: (N,) of the samples.
        keys: (N,) `hash64` of their `KEY`.
        names: (N,) `hash64` of their `SHARD/KEY`.

    Returns:
        The scores (N,), and how many rows belong to no sample.

    Raises:
        DataError: the table cannot be read, or lacks the columns.
    """
    scores = np.full(len(names), np.nan, np.float32)
    by_uid = _Places(_uid_hashes(as_text(uids)))
    by_name, by_key = _Places(names), _Places(keys)
    unmatched = 0
    for file in _files(Path(path)):
        for ids, values, is_uid in _portions(file, column):
            hashes = _uid_hashes(ids) if is_uid else np.array([hash64(text.encode()) for text in ids], np.uint64)
            place = by_uid.of(hashes) if is_uid else by_name.of(hashes)
            if not is_uid:
                place = np.where(place < 0, by_key.of(hashes), place)
            scores[place[place >= 0]] = values[place >= 0]
            unmatched += int((place < 0).sum())
    return scores, unmatched


def write_scores(shards: ShardSet, uids: NDArray[np.void], scores: Scores, path: str | Path) -> None:
    """Write `key` (`SHARD/KEY`), `uid` and `score` of every sample as parquet, as `read_scores` takes them.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema({"key": pa.string(), "uid": pa.string(), "score": pa.float32()})
    with atomic_file(path) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, shards.num_samples, _ROWS_AT_ONCE):
            rows = range(start, min(start + _ROWS_AT_ONCE, shards.num_samples))
            part = scores[rows.start : rows.stop]
            columns = [
                pa.array([shards.key(row) for row in rows], pa.string()),
                pa.array(as_text(uids[rows.start : rows.stop]), pa.string()),
                pa.array(part, pa.float32(), mask=np.isnan(part)),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def threshold_of_fraction(scores: Scores, fraction: float) -> float:
    """The score that the best `fraction` of the scored samples reach; NaN when there are none.

    Exact without sorting: floats are ordered as integers, so counting their upper and then, in one bin, their lower
    16 bits finds the one wanted in two passes and half a megabyte.
    """
    number = int((~np.isnan(scores)).sum())
    wanted = round(fraction * number)
    if wanted == 0:
        return float("nan") if number == 0 else float("inf")
    upper, above = _bin_of(_counts(scores, None), wanted)
    lower, _ = _bin_of(_counts(scores, upper), wanted - above)
    return _as_float(upper << 16 | lower)


def _counts(scores: Scores, upper: int | None) -> NDArray[np.int64]:
    """How many scores have each value of the upper 16 bits, or of the lower ones of those with these upper ones."""
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, len(scores), 1 << 20):
        part = scores[start : start + (1 << 20)]
        ordered = _as_integers(part[~np.isnan(part)])
        high = (ordered >> np.uint32(16)).astype(np.int64)
        chosen = high if upper is None else (ordered[high == upper] & np.uint32(0xFFFF)).astype(np.int64)
        counts += np.bincount(chosen, minlength=1 << 16)
    return counts


def _bin_of(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin, from the top, in which the `wanted`-th is, and how many are above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place] - counts[::-1][place])


def _as_integers(values: Scores) -> NDArray[np.uint32]:
    """Integers in the order of the floats: negative ones turned round, positive ones above them."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def _as_float(ordered: int) -> float:
    bits = ordered & 0x7FFFFFFF if ordered >> 31 else ~ordered & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def _record(shards: ShardSet, sample: int) -> Record:
    shard, row = shards.locate(sample)
    try:
        captions = shard.captions(row)
    except DataError:
        captions = ()
    return Record(f"{shard.name}/{shard.key(row)}", shard.image(row), captions)


class _Places:
    """From hashes to the one sample that has each; -1 for none, or several."""

    def __init__(self, hashes: NDArray[np.uint64]):
        self._values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        self._place = np.where(counts == 1, first, -1)

    def of(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        place = np.minimum(np.searchsorted(self._values, hashes), len(self._values) - 1)
        return np.where(self._values[place] == hashes, self._place[place], -1)


def _uid_hashes(uids: list[str]) -> NDArray[np.uint64]:
    return np.array([hash64(uid.lower().encode()) for uid in uids], np.uint64)


def _files(path: Path) -> list[Path]:
    files = (
        sorted(file for ending in ("parquet", "csv") for file in path.glob(f"*.{ending}")) if path.is_dir() else [path]
    )
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"No table of scores at {path}; expected a .parquet or .csv file, or a folder of them.")
    return files


def _portions(path: Path, column: str) -> Iterator[tuple[list[str], NDArray[np.float32], bool]]:
    """Ids, values, and whether the ids are uids."""
    try:
        if path.suffix == ".csv":
            reader = pa_csv.open_csv(path)
            names, batches = reader.schema.names, iter(reader)
        else:
            parquet = pq.ParquetFile(path)
            names = parquet.schema_arrow.names
            wanted = [name for name in ("uid", "key", column) if name in names]
            batches = parquet.iter_batches(_ROWS_AT_ONCE, columns=wanted)
        _check_columns(path, column, names)
        name = "uid" if "uid" in names else "key"
        for batch in batches:
            ids = [str(value) for value in batch.column(name).to_pylist()]
            values = batch.column(column).cast(pa.float32()).to_numpy(zero_copy_only=False)
            yield ids, np.asarray(values, np.float32), name == "uid"
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"Cannot read the scores in {path}: {error}.") from error


def _check_columns(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise DataError(f"{path} has no column '{column}'. {did_you_mean(column, names)}")
    if not {"uid", "key"} & set(names):
        raise DataError(f"{path} has neither a column `uid` nor `key`, so its rows belong to no sample.")
