"""Vectors under keys: what goes in comes out, whoever writes and whatever breaks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlkit.errors import DataError
from vlkit.features.stamps import digest
from vlkit.features.vectors import MAX_PENDING, MAX_SEGMENTS, VectorStore


def keys_of(*numbers: int) -> list[bytes]:
    return [digest(number) for number in numbers]


def vectors_of(*numbers: int) -> np.ndarray:
    return np.array([[number, number + 0.5, -number] for number in numbers], np.float32)


def stored(folder: Path, *numbers: int) -> None:
    with VectorStore(folder, 3) as store:
        store.add(keys_of(*numbers), vectors_of(*numbers))


def test_rows_come_back_by_key_and_unknown_keys_are_minus_one(tmp_path: Path) -> None:
    stored(tmp_path, 1, 2, 3)
    stored(tmp_path, 4)
    store = VectorStore(tmp_path, 3)
    places = store.find(keys_of(4, 9, 2, 1, 2))
    assert (places < 0).tolist() == [False, True, False, False, False]
    np.testing.assert_array_equal(store.rows(places[places >= 0]), vectors_of(4, 2, 1, 2))
    assert len(store) == 4
    assert VectorStore(tmp_path / "empty", 3).find(keys_of(1)).tolist() == [-1]


def test_places_stay_valid_while_rows_are_added(tmp_path: Path) -> None:
    stored(tmp_path, 1, 2)
    store = VectorStore(tmp_path, 3)
    places = store.find(keys_of(2, 1))
    store.add(keys_of(*range(10, 10 + MAX_PENDING)), vectors_of(*range(10, 10 + MAX_PENDING)))  # flushes by itself
    assert len(store) == 2 + MAX_PENDING
    np.testing.assert_array_equal(store.rows(places), vectors_of(2, 1))
    np.testing.assert_array_equal(store.rows(store.find(keys_of(17, 1))), vectors_of(17, 1))


def test_the_caller_may_write_into_its_array(tmp_path: Path) -> None:
    mine = vectors_of(1)
    with VectorStore(tmp_path, 3) as store:
        store.add(keys_of(1), mine)
        mine[:] = 0
    np.testing.assert_array_equal(store.rows(store.find(keys_of(1))), vectors_of(1))


def test_many_segments_become_one_without_a_loss(tmp_path: Path) -> None:
    for number in range(MAX_SEGMENTS + 3):
        stored(tmp_path, number, number + 1)  # each row twice
    assert len(list(tmp_path.iterdir())) < 5
    store = VectorStore(tmp_path, 3)
    numbers = range(MAX_SEGMENTS + 4)
    np.testing.assert_array_equal(store.rows(store.find(keys_of(*numbers))), vectors_of(*numbers))


def test_broken_and_foreign_files_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored(tmp_path, 1)
    stored(tmp_path, 2)
    cut = sorted(tmp_path.iterdir())[0]
    cut.write_bytes(cut.read_bytes()[:-5])
    np.save(tmp_path / "other.npy", np.zeros(3))
    store = VectorStore(tmp_path, 3)
    assert len(store) == 1 and store.find(keys_of(1)).tolist() == [-1]
    assert cut.name in caplog.text and "other.npy" in caplog.text


def test_a_folder_that_cannot_be_made_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = VectorStore(tmp_path / "file" / "store", 3)
    store.add(keys_of(1), vectors_of(1))
    with pytest.raises(DataError, match=r"Cannot write the cache .*--no-cache"):
        store.flush()


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from vlkit.features.vectors import VectorStore\n"
        "for number in range(int(sys.argv[2]), int(sys.argv[2]) + 60):\n"
        "    with VectorStore(Path(sys.argv[1]), 3) as store:\n"  # opening also merges
        "        store.add([number.to_bytes(8, 'big') * 2], np.full((1, 3), number, np.float32))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(begin)]) for begin in (0, 40)]
    assert [process.wait() for process in running] == [0, 0]
    store = VectorStore(tmp_path, 3)
    places = store.find([number.to_bytes(8, "big") * 2 for number in range(100)])
    assert (places >= 0).all()
    np.testing.assert_array_equal(store.rows(places)[:, 0], np.arange(100))
