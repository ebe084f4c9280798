"""Folders as clip-retrieval 2.45 writes them: parts in .npy, rows of the parquet beside them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlkit.errors import DataError
from vlkit.features.clip_retrieval import is_clip_retrieval, read_clip_retrieval

SIZES = (3, 0, 4)


@pytest.fixture
def stored(tmp_path):
    """Value of image row i: i in all columns; of text row i: -i."""
    first = 0
    for part, size in enumerate(SIZES):
        values = np.arange(first, first + size, dtype=np.float16)[:, None].repeat(5, axis=1)
        for name, matrix in (("img_emb", values), ("text_emb", -values)):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{name}_{part:03d}.npy", matrix)
        (tmp_path / "metadata").mkdir(exist_ok=True)
        names = [f"{row}.jpg" for row in range(first, first + size)]
        columns = {"image_path": pa.array(names, pa.string()), "caption": pa.array(names, pa.string())}
        if part == 0:
            columns["similarity"] = [0.1] * size  # clip-retrieval flattens whatever the json files hold
        pq.write_table(pa.table(columns), tmp_path / "metadata" / f"metadata_{part:03d}.parquet")
        first += size
    return tmp_path


def test_rows_across_parts(stored):
    assert is_clip_retrieval(stored) and not is_clip_retrieval(stored / "img_emb")
    opened = read_clip_retrieval(stored)
    assert (len(opened), opened.dim, opened.kinds, opened.sizes) == (7, 5, ("image", "text"), SIZES)
    assert isinstance(opened.parts["image"][0], np.memmap)
    for start in range(8):
        for stop in range(start, 8):
            rows = opened.rows("image", start, stop)
            assert (rows.dtype, rows.shape) == (np.float32, (stop - start, 5))
            assert rows[:, 0].tolist() == list(range(start, stop))
    assert opened.rows("text", 2, 4)[:, 4].tolist() == [-2, -3]


def test_metadata(stored):
    opened = read_clip_retrieval(stored)
    assert opened.metadata().column_names == ["image_path", "caption"]
    assert opened.metadata(["caption"]).column("caption").to_pylist() == [f"{row}.jpg" for row in range(7)]
    with pytest.raises(DataError, match=r"no column 'similarity' .*They have: image_path, caption"):
        opened.metadata(["similarity"])


def test_images_alone_and_unpadded_numbers(tmp_path):
    (tmp_path / "img_emb").mkdir()
    for part in range(11):
        np.save(tmp_path / "img_emb" / f"img_emb_{part}.npy", np.full((1, 2), part, np.float32))
    opened = read_clip_retrieval(tmp_path)
    assert opened.rows("image", 0, 11)[:, 0].tolist() == list(range(11))
    with pytest.raises(DataError, match=r"has no text embeddings"):
        opened.rows("text", 0, 1)
    with pytest.raises(DataError, match=r"has no metadata"):
        opened.metadata()


def test_broken_folders(stored, tmp_path_factory):
    with pytest.raises(DataError, match=r"holds no embeddings.*Expected: img_emb"):
        read_clip_retrieval(tmp_path_factory.mktemp("empty"))
    last = stored / "img_emb" / "img_emb_002.npy"
    whole = last.read_bytes()
    last.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"img_emb_002\.npy is no readable \.npy file"):
        read_clip_retrieval(stored)
    np.save(last, np.zeros((4, 5), np.int64))
    with pytest.raises(DataError, match=r"holds int64 \(4, 5\), expected a matrix"):
        read_clip_retrieval(stored)
    np.save(last, np.zeros((4, 6), np.float16))
    with pytest.raises(DataError, match=r"mixes embeddings of \[5, 6\] columns"):
        read_clip_retrieval(stored)
    np.save(last, np.zeros((2, 5), np.float16))
    with pytest.raises(DataError, match=r"text_emb has parts of \[3, 0, 4\] rows, img_emb of \[3, 0, 2\]"):
        read_clip_retrieval(stored)
    last.unlink()
    with pytest.raises(DataError, match=r"text_emb has parts of"):
        read_clip_retrieval(stored)
    (stored / "img_emb" / "img_emb_001.npy").rename(last)
    with pytest.raises(DataError, match=r"part 1 is missing of 3"):
        read_clip_retrieval(stored)
