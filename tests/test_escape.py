"""Hostile text: terminal escapes, spreadsheet formulas, names that are no file names."""

import csv
import io
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlkit.escape import csv_cell, file_stem, one_line, terminal_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a dog", "a dog"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),  # the one-character form of escape [
        ("back\rfront", "back\\rfront"),
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),  # right-to-left override
        ("a\u2028b", "a\\u2028b"),
        ("lone \udcff", "lone \\udcff"),  # a file name that is not UTF-8
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        ("Zürich 東京", "Zürich 東京"),
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", "\u0645\u06cc\u200c\u0631\u0648\u0645"),  # Persian needs its joiner
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),  # so does a composed emoji
    ],
)
def test_terminal_text(text: str, shown: str) -> None:
    assert terminal_text(text) == shown


@given(st.text())
def test_nothing_that_acts_on_a_terminal_is_left(text: str) -> None:
    left = {unicodedata.category(char) for char in terminal_text(text) if char not in "\n\u200c\u200d"}
    assert not left & {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}


def test_one_line_folds_white_space_and_cuts() -> None:
    assert one_line(" a\tb\n\n c ") == "a b c"
    assert one_line("abcdef", width=4) == "abc…"
    assert one_line("abcd", width=4) == "abcd"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1"])
def test_a_cell_that_opens_like_a_formula_is_quoted(text: str) -> None:
    assert csv_cell(text) == "'" + text


@pytest.mark.parametrize(("value", "cell"), [("dog", "dog"), (-0.5, "-0.5"), (3, "3"), ("", ""), ("a=b", "a=b")])
def test_other_cells_stay_as_they_are(value: object, cell: str) -> None:
    assert csv_cell(value) == cell


def test_a_quoted_cell_comes_back_from_a_csv_file_as_text() -> None:
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell('=HYPERLINK("http://x","y")')])
    file.seek(0)
    assert next(csv.reader(file)) == ['\'=HYPERLINK("http://x","y")']


@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("golden retriever", "golden retriever"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("a/b\\c:d", "a_b_c_d"),
        ("..", "unnamed"),
        ("", "unnamed"),
        (" . ", "unnamed"),
        ("\x1b[31m\u202e", "_[31m_"),
        ("x" * 79 + " y", "x" * 79),  # what a cut leaves at the end is trimmed again
    ],
)
def test_file_stem(text: str, stem: str) -> None:
    assert file_stem(text) == stem


@given(st.text())
def test_every_text_makes_a_name_a_file_system_takes(text: str) -> None:
    stem = file_stem(text)
    assert 0 < len(stem.encode()) <= 200
    assert stem not in {".", ".."}
    assert Path("folder", stem).name == stem


def test_four_byte_characters_stay_within_the_limit_of_a_file_name(tmp_path: Path) -> None:
    folder = tmp_path / file_stem("\U0001f436" * 300)
    folder.mkdir()
    assert folder.is_dir()
