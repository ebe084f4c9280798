"""Records: bytes of an image from a file, from a range of a tar, from memory; and what is said when that fails."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vlkit.data.records import ImageRef, Problems, Record, Source, text_to_image
from vlkit.errors import DataError


def test_bytes_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    assert ImageRef(path=str(tmp_path / "a.jpg")).read() == b"image"


def test_bytes_in_memory() -> None:
    assert ImageRef(data=b"image").read() == b"image"


def test_a_member_of_a_tar_where_tarfile_says_it_lies(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"first"), ("b.jpg", b"second one")])
    with tarfile.open(path) as tar:
        member = tar.getmember("b.jpg")
    assert ImageRef(str(path), member.offset_data, member.size).read() == b"second one"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read image .*gone\.jpg: No such file"):
        ImageRef(path=str(tmp_path / "gone.jpg")).read()


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read image"):
        ImageRef(path=str(tmp_path)).read()


def test_a_cut_tar_says_where_it_ends(tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(b"0123456789")
    with pytest.raises(DataError, match=r"ends at byte 10, but an image should reach byte 12"):
        ImageRef(str(tmp_path / "cut.tar"), offset=4, size=8).read()


def test_a_tar_cut_before_the_image_says_where_it_ends(tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(b"0123456789")
    with pytest.raises(DataError, match=r"ends at byte 10, but an image should reach byte 28"):
        ImageRef(str(tmp_path / "cut.tar"), offset=20, size=8).read()


def test_reading_in_one_go_and_in_pieces_give_the_same(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "x").write_bytes(content)
    pieces = [ImageRef(str(tmp_path / "x"), offset=at, size=10_000).read() for at in range(0, 100_000, 10_000)]
    assert b"".join(pieces) == ImageRef(str(tmp_path / "x")).read() == content


def test_problems_count_every_row_and_name_the_first_few() -> None:
    problems = Problems(examples_per_cause=2)
    for row in range(3):
        problems.add("image missing", f"row {row}")
    problems.add("empty caption", "row 9")
    assert problems.total == 4
    assert problems.lines() == ["3 x image missing: row 0, row 1, ...", "1 x empty caption: row 9"]


def test_a_source_is_its_records(tmp_path: Path) -> None:
    records = tuple(Record(key, ImageRef(data=b"")) for key in "ab")
    source = Source(records, "folder", tmp_path)
    assert len(source) == 2
    assert [record.key for record in source] == ["a", "b"]


def test_text_to_image_repeats_each_row_once_per_caption() -> None:
    counts = (2, 0, 3)
    records = [Record(str(row), ImageRef(data=b""), captions=("c",) * count) for row, count in enumerate(counts)]
    assert text_to_image(records) == [0, 0, 2, 2, 2]
