"""Tables of links in the forms the published data sets have."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.url_table import open_url_table, read_rows
from vlkit.errors import ConfigError, DataError

LINK = "http://host/a.jpg"


def rows_of(path, folder, url_column=None, caption_column=None, per_part=1000):
    table = open_url_table(path, folder, url_column, caption_column)
    return [tuple(row) for segments in table.cut(per_part) for row in read_rows(segments, table.columns)]


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Train_GCC-training.tsv", f'he said "hi\t{LINK}\nit\'s 5" tall\t{LINK}2\n'),
        ("cc12m.tsv", f'{LINK}\the said "hi\n{LINK}2\tit\'s 5" tall\n'),
        ("cc12m.tsv.gz", f'{LINK}\the said "hi\r\n{LINK}2\tit\'s 5" tall'),
        ("t.tsv", f'url\tcaption\n{LINK}\the said "hi\n{LINK}2\tit\'s 5" tall\n'),
        ("t.csv", f'caption,url\n"he said ""hi",{LINK}\n"it\'s 5"" tall",{LINK}2\n'),
        ("t.csv", f'"he said ""hi",{LINK}\n"it\'s 5"" tall",{LINK}2\n'),
        (
            "t.jsonl",
            f'{{"URL": "{LINK}", "TEXT": "he said \\"hi"}}\n\n{{"URL": "{LINK}2", "TEXT": "it\'s 5\\" tall"}}\n',
        ),
        (
            "dogs_2020.json",
            json.dumps(
                {
                    "info": {"url": "x"},
                    "annotations": [
                        {"image_id": "1", "url": LINK, "raw_caption": "HE SAID", "caption": 'he said "hi'},
                        {"image_id": "2", "url": f"{LINK}2", "raw_caption": "IT", "caption": "it's 5\" tall"},
                    ],
                }
            ),
        ),
    ],
)
def test_text(tmp_path, name, text):
    found = rows_of(put(tmp_path / "in" / name, text), tmp_path)
    assert found == [(LINK, 'he said "hi', None), (f"{LINK}2", "it's 5\" tall", None)]


def test_the_options_name_the_columns_of_a_headless_table(tmp_path):
    path = put(tmp_path / "t.tsv", f"a\t{LINK}\n")
    assert rows_of(path, tmp_path, "url", "caption") == [(LINK, "a", None)]
    with pytest.raises(ConfigError, match=r"column 'link' \(--url-column\) not found, have: caption, url"):
        rows_of(path, tmp_path, "link")


def test_rows_that_cannot_be_read_stay_rows(tmp_path):
    path = put(tmp_path / "t.tsv", f"{LINK}\ta\nonly one cell\n\n{LINK}\tb\tc\n{LINK}\td\n")
    assert rows_of(path, tmp_path) == [(LINK, "a", None), (None, "only one cell", None), (None, f"{LINK} b c", None),
                                       (LINK, "d", None)]  # fmt: skip
    path = put(tmp_path / "t.jsonl", f'{{"url": "{LINK}", "text": "a"}}\n{{"url": \n{{"text": "b"}}\n[1]\n')
    found = rows_of(path, tmp_path)
    assert [row[0] for row in found] == [LINK, None, None, None]


def test_datacomp_and_laion(tmp_path):
    for number in range(2):
        columns = {"uid": [f"{number}{row}" for row in range(3)], "url": [LINK] * 3, "text": ["a", "b", None]}
        (tmp_path / "datacomp").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "datacomp" / f"{number}.parquet", row_group_size=2)
        (tmp_path / "datacomp" / f"{number}.npz").write_bytes(b"")
    expected = [(LINK, text, f"{number}{row}") for number in range(2) for row, text in enumerate(["a", "b", None])]
    for per_part in range(1, 8):
        assert rows_of(tmp_path / "datacomp", tmp_path, per_part=per_part) == expected
    laion = pa.table({"SAMPLE_ID": [1.0], "URL": [LINK], "TEXT": ["a"], "NSFW": ["UNLIKELY"]})
    pq.write_table(laion, tmp_path / "part-00000.parquet")
    assert rows_of(tmp_path / "part-00000.parquet", tmp_path, "url", "text") == [(LINK, "a", None)]


def test_cut(tmp_path):
    path = put(tmp_path / "t.tsv", "".join(f"{LINK}{row}\tcaption {row}\n" for row in range(10)))
    table = open_url_table(path, tmp_path, None, None)
    assert [[segment[1:] for segment in part] for part in table.cut(4)] == [[(0, 4)], [(4, 8)], [(8, 10)]]
    assert [row.caption for row in read_rows(table.cut(4)[1], table.columns)] == [f"caption {n}" for n in (4, 5, 6, 7)]


def test_the_fingerprint_and_the_copy_follow_the_content(tmp_path):
    path = put(tmp_path / "t.tsv", f"a\t{LINK}\n")
    first = open_url_table(path, tmp_path, None, None)
    copied = (tmp_path / ".urls.parquet").stat().st_mtime_ns
    assert open_url_table(path, tmp_path, None, None) == first
    assert (tmp_path / ".urls.parquet").stat().st_mtime_ns == copied
    put(path, f"b\t{LINK}\n")
    assert open_url_table(path, tmp_path, None, None).fingerprint != first.fingerprint
    assert rows_of(path, tmp_path)[0][1] == "b"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("t.tsv", "", r"no column of links found"),
        ("t.tsv", "url\tcaption\n", r"has no rows"),
        ("t.tsv", "url\twords\n", r"no column of captions found, have: url, words\. Name it by --caption-column"),
        ("t.csv", f'url,caption\n{LINK},"a\nb\n', r"t\.csv, at line 3: .*A quote may be open"),
        ("t.json", '{"a": 1}', r"neither a list of objects nor one under 'annotations'"),
        ("t.json", "{", r"is no valid JSON"),
        ("t.txt", LINK, r"a table of links ends in \.parquet, \.tsv"),
        ("t.parquet", "PAR1", r"is no readable parquet file"),
    ],
)
def test_what_is_no_table_of_links(tmp_path, name, text, expected):
    with pytest.raises(DataError, match=expected):
        rows_of(put(tmp_path / name, text), tmp_path)


def test_folders(tmp_path):
    for month in ("01", "02"):
        put(tmp_path / "in" / f"dogs_{month}.json", json.dumps([{"url": f"{LINK}{month}", "caption": month}]))
    assert [row[1] for row in rows_of(tmp_path / "in", tmp_path)] == ["01", "02"]
    put(tmp_path / "in" / "more.tsv", "x")
    with pytest.raises(DataError, match=r"Expected tables of one kind .* found: \.json, \.tsv"):
        rows_of(tmp_path / "in", tmp_path)
    with pytest.raises(DataError, match=r"does not exist"):
        rows_of(tmp_path / "gone", tmp_path)
