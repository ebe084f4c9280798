"""Tables: columns, separators, quoting, grouping, labels, splits and what is wrong with rows."""

import json

import pytest

from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "images/d.jpg", "<img src=x onerror=alert(1)>.jpg", "ümlaut.jpg"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def table(folder, text, name="pairs.csv", encoding="utf-8", newline=""):
    path = folder / name
    path.write_text(text, encoding=encoding, newline=newline)
    return path


def pairs(source):
    return {record.key: record.captions for record in source}


def test_rows_of_one_image_become_one_record_in_first_seen_order(folder):
    path = table(folder, "filepath,title\nb.jpg,one\na.jpg,two\nb.jpg,three\n./images/../a.jpg,four\n")
    source = read_source(path)
    assert source.format == "table"
    assert list(pairs(source).items()) == [("b.jpg", ("one", "three")), ("a.jpg", ("two", "four"))]
    assert source.problems.total == 0


@pytest.mark.parametrize("header", ["Image,Caption", "PATH,Text", " filepath , title ", "image,extra,text"])
def test_columns_are_recognised_in_any_case(folder, header):
    row = "a.jpg,x,a dog" if "extra" in header else "a.jpg,a dog"
    assert pairs(read_source(table(folder, f"{header}\n{row}\n"))) == {"a.jpg": ("a dog",)}


def test_tsv_jsonl_and_json_list_give_the_same(folder):
    rows = [("a.jpg", "a dog, running"), ("images/d.jpg", "deux chats"), ("a.jpg", 'a "dog"')]
    objects = [{"image": name, "caption": caption} for name, caption in rows]
    quoted = [(name, '"' + caption.replace('"', '""') + '"') for name, caption in rows]
    files = [
        table(folder, "image,caption\n" + "".join(f"{name},{caption}\n" for name, caption in quoted)),
        table(folder, "image\tcaption\r\n" + "".join(f"{n}\t{c}\r\n" for n, c in quoted), "pairs.tsv"),
        table(folder, "".join(json.dumps(row) + "\n" for row in objects), "pairs.jsonl"),
        table(folder, json.dumps(objects), "pairs.json"),
        table(folder, "image,caption\n" + "".join(f"{n},{c}\n" for n, c in quoted), "bom.csv", "utf-8-sig"),
    ]
    expected = {"a.jpg": ("a dog, running", 'a "dog"'), "images/d.jpg": ("deux chats",)}
    assert [pairs(read_source(path)) for path in files] == [expected] * 5


def test_json_rows_with_lists_of_captions(folder):
    lines = '{"image": "a.jpg", "caption": ["one", " ", "two"]}\n\n{"image": "b.jpg", "caption": "three"}\n'
    assert pairs(read_source(table(folder, lines, "x.jsonl"))) == {"a.jpg": ("one", "two"), "b.jpg": ("three",)}


def test_named_columns(folder):
    path = table(folder, "File,name,group\na.jpg,keycap,Symbols\n")
    source = read_source(path, image_column="file", caption_column="name")
    assert pairs(source) == {"a.jpg": ("keycap",)}
    source = read_source(path, image_column="file", class_column="Group")
    assert source.class_names == ("Symbols",) and [record.label for record in source.records] == [0]
    with pytest.raises(
        ConfigError, match=r"column 'nam' \(--caption-column\) not found, have: File, name, group\. Did"
    ):
        read_source(path, image_column="File", caption_column="nam")


def test_missing_columns_are_listed(folder):
    with pytest.raises(
        DataError, match=r"no column filepath \| image \| path found, have: file, caption\. .*--image-c"
    ):
        read_source(table(folder, "file,caption\na.jpg,x\n"))
    with pytest.raises(
        DataError, match=r"no column caption \| title \| text \| captions found, have: image, words\. .*--caption-c"
    ):
        read_source(table(folder, "image,words\na.jpg,x\n"))


@pytest.mark.parametrize(
    ("name", "header", "found"),
    [("x.csv", "image\tcaption", "tab"), ("x.csv", "image;caption", "semicolon"), ("x.tsv", "image,caption", "comma")],
)
def test_wrong_separator_is_named(folder, name, header, found):
    with pytest.raises(DataError, match=rf"the first line .* holds no \w+, but a {found}\. A \.\wsv file is separated"):
        read_source(table(folder, f"{header}\na.jpg,x\n", name))


def test_bad_rows_are_counted_and_named(folder):
    text = (
        "image,caption\n"
        "a.jpg,fine\n"
        "b.jpg,not, quoted\n"
        ",no image\n"
        'a.jpg,"broken" quote\n'
        "c.jpg,\n"
        "gone.jpg,where\n"
        "https://example.org/a.jpg,remote\n"
    )
    source = read_source(table(folder, text))
    assert pairs(source) == {"a.jpg": ("fine",)}
    assert source.problems.examples == {
        "row that has not the 2 cells of the header": ["pairs.csv:3"],
        "row without an image path": ["pairs.csv:4"],
        "row with a broken quote": ["pairs.csv:5"],
        "row without caption": ["pairs.csv:6"],
        "image without caption": ["c.jpg"],
        "image file missing": ["gone.jpg"],
        "row with a URL where a file is expected (download the images first)": ["pairs.csv:8"],
    }


def test_bad_json_lines_are_counted(folder):
    source = read_source(table(folder, '{"image": "a.jpg", "text": "x"}\n{"image":\n[1]\n{"image": 7}\n', "x.jsonl"))
    assert pairs(source) == {"a.jpg": ("x",)}
    assert source.problems.examples == {
        "line that is no JSON": ["x.jsonl:2"],
        "row that is no object": ["x.jsonl:3"],
        "row without an image path": ["x.jsonl:4"],
    }


def test_unclosed_quote_does_not_swallow_the_file(folder):
    path = table(folder, 'image,caption\na.jpg,one\nb.jpg,"two\nc.jpg,three\n')
    with pytest.raises(DataError, match="a quote opened in the row that starts in line 3 is never closed"):
        read_source(path)


def test_quoted_cells_may_hold_line_feeds(folder):
    assert pairs(read_source(table(folder, 'image,caption\na.jpg,"two\nlines"\n'))) == {"a.jpg": ("two\nlines",)}


def test_class_column_gives_labels_by_sorted_name_and_needs_no_captions(folder):
    source = read_source(table(folder, "path,class\nb.jpg,zebra\na.jpg,ant\nc.jpg,\n"))
    assert source.class_names == ("ant", "zebra")
    assert {record.key: record.label for record in source} == {"b.jpg": 1, "a.jpg": 0}
    assert source.problems.examples["image without caption"] == ["c.jpg"]


def test_whole_number_labels_stay_what_they_are(folder):
    source = read_source(table(folder, "path,caption,label\nb.jpg,x,7\na.jpg,y,0\n"))
    assert [record.label for record in source] == [7, 0]
    assert source.class_names == ("0", "1", "2", "3", "4", "5", "6", "7")


def test_split_column(folder):
    path = table(folder, "image,caption,Split\na.jpg,x,Train\nb.jpg,y,dev\nc.jpg,z,\n")
    assert [record.split for record in read_source(path)] == ["train", "val", None]
    for alias in ("val", "validation", "dev", "VAL"):
        assert pairs(read_source(path, split=alias)) == {"b.jpg": ("y",)}
    with pytest.raises(DataError, match=r"No split 'test' in .*pairs\.csv\. Present: train, val\."):
        read_source(path, split="test")
    with pytest.raises(DataError, match=r"names no splits"):
        read_source(table(folder, "image,caption\na.jpg,x\n", "none.csv"), split="test")


def test_paths_are_relative_to_the_file_or_to_images(folder):
    (folder / "tables").mkdir()
    below = table(folder / "tables", "image,caption\nd.jpg,x\n")
    with pytest.raises(
        DataError, match=r"None of the 1 images named in .* was found \(first: d\.jpg\)\. Searched in: "
    ):
        read_source(below)
    assert pairs(read_source(below, images=folder / "images")) == {"d.jpg": ("x",)}
    absolute = table(folder / "tables", f"image,caption\n{folder / 'a.jpg'},x\n../b.jpg,y\n")
    assert [record.image.read() for record in read_source(absolute)] == [b"x", b"x"]
    with pytest.raises(DataError, match=r"The folder of images .*nowhere does not exist"):
        read_source(below, images=folder / "nowhere")


def test_hostile_names_and_captions_survive_as_data(folder):
    name, caption = "<img src=x onerror=alert(1)>.jpg", "\x1b[31m=SUM(A1)"
    path = table(
        folder, json.dumps({"image": name, "caption": caption}) + '\n{"image":"ümlaut.jpg","text":"ü"}', "x.jsonl"
    )
    assert pairs(read_source(path)) == {name: (caption,)}


def test_not_utf8_is_an_error_with_its_line(folder):
    path = folder / "latin.csv"
    path.write_bytes("image,caption\na.jpg,ok\na.jpg,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv, line 3: not UTF-8"):
        read_source(path)


def test_empty_table(folder):
    with pytest.raises(DataError, match=r"is empty"):
        read_source(table(folder, ""))
    with pytest.raises(DataError, match=r"No usable image with a caption in .*: it names no images"):
        read_source(table(folder, "image,caption\n"))
    with pytest.raises(DataError, match=r"the column name 'image' stands twice"):
        read_source(table(folder, "image,image,caption\n"))


def test_folder_with_one_table_and_with_two(folder):
    table(folder, "image,caption\na.jpg,x\n")
    assert read_source(folder).format == "table"
    table(folder, "image,caption\na.jpg,x\n", "more.tsv".replace("tsv", "csv"))
    with pytest.raises(DataError, match=r"found: more\.csv, pairs\.csv\. Name the file itself"):
        read_source(folder)
