"""Sorting never overwrites; the report escapes what it shows and stays small."""

import io

import pytest
from PIL import Image

from vlkit.classify.report import write_report
from vlkit.classify.run import Classified, Unreadable, gather_images
from vlkit.classify.sort_into import Sorter
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError

HOSTILE = "<img src=x onerror=alert(1)>"


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), color).save(buffer, "JPEG")
    return buffer.getvalue()


def result(path, name, probability=0.9, unsure=False):
    return Classified(Record(str(path), ImageRef(path=str(path))), ((name, probability),), unsure)


def test_same_names_are_numbered_and_same_content_is_not_stored_twice(tmp_path):
    for folder, color in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes(jpeg(color))
    sorter = Sorter(tmp_path / "out", ("dog",))
    for _ in range(2):
        for folder in ("a", "b"):
            sorter.place(result(tmp_path / folder / "x.jpg", "dog"))
    assert sorted(path.name for path in (tmp_path / "out/dog").iterdir()) == ["x (2).jpg", "x.jpg"]
    assert (tmp_path / "out/dog/x (2).jpg").read_bytes() == jpeg("blue")
    assert (sorter.placed, sorter.already_there) == (2, 2)
    assert (tmp_path / "a/x.jpg").exists()  # nothing is moved


def test_links_point_to_the_original_and_unsure_has_its_own_folder(tmp_path):
    image = tmp_path / "x.jpg"
    image.write_bytes(jpeg("red"))
    sorter = Sorter(tmp_path / "out", ("dog",), link=True)
    placed = sorter.place(result(image, "dog", 0.2, unsure=True))
    assert placed == tmp_path / "out/unsure/x.jpg" and placed.is_symlink() and placed.resolve() == image
    with pytest.raises(ConfigError, match="inside a shard"):
        sorter.place(Classified(Record("s::1", ImageRef(data=jpeg("red"))), (("dog", 1.0),), False))


def test_class_names_cannot_leave_the_folder_and_stay_apart(tmp_path):
    image = tmp_path / "x.jpg"
    image.write_bytes(jpeg("red"))
    sorter = Sorter(tmp_path / "out", ("../../etc", "a/b", "a\\b", "unsure"))
    places = [sorter.place(result(image, name)) for name in ("../../etc", "a/b", "a\\b", "unsure")]
    places.append(sorter.place(result(image, "unsure", unsure=True)))
    assert len({place.parent for place in places[1:3]}) == 2
    assert all(place.resolve().is_relative_to(tmp_path / "out") for place in places)


def test_report_escapes_hostile_text_and_shows_most_and_least_certain(tmp_path):
    records = [Record(f"{HOSTILE}{i}\x1b[31m.jpg", ImageRef(data=jpeg((i * 10, 0, 0)))) for i in range(20)]
    results = [Classified(record, ((HOSTILE, i / 20), ("cat", 0.01)), False) for i, record in enumerate(records)]
    results.append(Unreadable(Record("broken.jpg", ImageRef(path="broken.jpg")), f"no image: {HOSTILE}"))
    page = tmp_path / "sub" / "report.html"
    write_report(page, results, class_names=(HOSTILE, "cat"), model="run:x", rule="softmax")
    text = page.read_text()
    assert "<img src=x" not in text and "\x1b" not in text and "&lt;img src=x onerror" in text
    assert text.count("data:image/jpeg") == 16 and "95.0%" in text and "0.0%" in text
    assert "No image fell into: cat" in text and "broken.jpg" in text


def test_report_stays_below_its_size_with_many_images(tmp_path):
    record = Record("x.jpg", ImageRef(data=jpeg("red")))
    names = tuple(f"class {i}" for i in range(1500))
    results = (Classified(record, ((names[i % 1500], (i % 997) / 997),), False) for i in range(50_000))
    write_report(tmp_path / "r.html", results, class_names=names, model="m", rule="r")
    assert (tmp_path / "r.html").stat().st_size < 30_000_000


def test_gather_images(tmp_path):
    (tmp_path / "photos/deep").mkdir(parents=True)
    (tmp_path / "photos/deep/a.jpg").write_bytes(jpeg("red"))
    (tmp_path / "photos/notes.md").write_text("no image")
    (tmp_path / "b.png").write_bytes(jpeg("blue"))
    source = gather_images([tmp_path / "photos", tmp_path / "b.png"])
    assert [record.key for record in source.records] == [str(tmp_path / "photos/deep/a.jpg"), str(tmp_path / "b.png")]
    assert source.problems.total == 1
    with pytest.raises(DataError, match="does not exist"):
        gather_images([tmp_path / "nowhere"])
