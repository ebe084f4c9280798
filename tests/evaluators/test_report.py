"""The report page: what it holds, and that nothing out of the data acts in it."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval.classification import ClassifiedExample
from eval.examples import Found, RetrievalExample
from eval.report import Card, Gallery, Matrix, Picture, Query, Section, Table, write_report
from eval.report_sections import evaluation_sections, in_words, retrieval_sections
from vlkit.contracts import Evaluation
from vlkit.data.records import ImageRef, Record
from vlkit.data.thumbnail import thumbnail
from vlkit.errors import DataError

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e"


class Page(HTMLParser):
    """Collects tags, their attributes and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self) -> list[str]:
        return [attributes["src"] or "" for _, attributes in self.tags if "src" in attributes]


def image_file(path: Path, size: tuple[int, int] = (400, 200)) -> ImageRef:
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return ImageRef(path=str(path))


def evaluation(tmp_path: Path, name: str) -> Evaluation:
    record = Record(name, image_file(tmp_path / "a.png"), (name,))
    other = Record("other", image_file(tmp_path / "b.png"), ("other",))
    return Evaluation(
        metrics={"accuracy@1": 0.5, "text_to_image/median_rank": 3.5},
        intervals={"accuracy@1": (0.25, 0.75)},
        protocol={"templates": name},
        counts={"images": 2},
        figures={
            "confusion_matrix": torch.tensor([[1, 3], [0, 4]]),
            "class_names": (name, "other"),
            "unreadable_images": ((name, name),),
            "examples": (
                RetrievalExample("image_to_text", record, None, 1, (Found(record, name, 0.9, True),)),
                RetrievalExample("text_to_image", record, name, 7, (Found(other, None, 0.5, False),)),
                ClassifiedExample(record, name, "other", 0.75),
            ),
        },
    )


def test_everything_stands_on_the_page_and_nothing_acts(tmp_path: Path) -> None:
    write_report(tmp_path / "out" / "report.html", HOSTILE, evaluation_sections(evaluation(tmp_path, HOSTILE)), HOSTILE)
    page = Page(tmp_path / "out" / "report.html")
    assert not {"script", "iframe", "link", "object", "a"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.sources() and all(source.startswith("data:image/jpeg;base64,") for source in page.sources())
    policy = next(attributes for tag, attributes in page.tags if "http-equiv" in attributes)
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")
    assert page.text.count("<img src=x onerror=alert(1)>\\x1b[31m\\u202e") >= 8  # shown, as text
    for shown in ("50.00%", "25.00% to 75.00%", "3.5", "75.0%", "rank 7", "similarity 0.900"):
        assert shown in page.text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]


def test_the_matrix_draws_its_cells_and_lists_its_mistakes(tmp_path: Path) -> None:
    matrix = Matrix("Confusion", ("cat", "dog"), torch.tensor([[1, 3], [0, 4]]))
    assert [(cell.row, cell.column, cell.count, cell.share) for cell in matrix.cells] == [
        (0, 0, 1, 0.25),
        (0, 1, 3, 0.75),
        (1, 1, 4, 1.0),
    ]
    assert matrix.confused == [("cat", "dog", 3, "75%")]
    wide = Matrix("Confusion", ("\u732b\u732b\u732b", "dog"), matrix.counts)
    assert 2 < matrix.margin < 3 < wide.margin < 4  # room for the longest name, no more
    write_report(tmp_path / "report.html", "t", [matrix])
    assert len(re.findall('<rect class="cell"', (tmp_path / "report.html").read_text())) == 3


def test_a_large_matrix_shows_the_classes_with_most_mistakes() -> None:
    counts = torch.eye(500, dtype=torch.int64)
    counts[7, 400] = 9
    matrix = Matrix("Confusion", [f"class {number}" for number in range(500)], counts)
    assert len(matrix.shown) == 120 and {7, 400} <= set(matrix.shown)
    assert matrix.confused == [("class 7", "class 400", 9, "90%")]


def test_pictures_tables_and_galleries(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    sections: list[Section] = [
        Picture("Loss", buffer.getvalue()),
        Table("Numbers", ["name", "value"], [("a", 0.123456), ("b", 3)], note="a note"),
        Gallery("Found", [Query(Card(text="a red circle"), [Card(image=thumbnail(torch.zeros(3, 8, 8).byte()))])]),
    ]
    write_report(tmp_path / "report.html", "Title", sections)
    page = Page(tmp_path / "report.html")
    assert page.sources()[0].startswith("data:image/png;base64,") and len(page.sources()) == 2
    assert "0.1235" in page.text and "a red circle" in page.text and "a note" in page.text


@pytest.mark.parametrize(
    ("value", "words"),
    [([], "none"), (None, "none"), ([1, 5], "1, 5"), (True, "yes"), ({"a": [1]}, "a: 1"), ("as it is", "as it is")],
)
def test_settings_are_written_as_people_write_them(value: object, words: str) -> None:
    assert in_words(value) == words


def test_a_gallery_shows_the_ground_truth_where_no_answer_is_right(tmp_path: Path) -> None:
    record = Record("a", image_file(tmp_path / "a.png"), ("its own words", "more of them"))
    other = Record("b", image_file(tmp_path / "b.png"), ("other words",))
    wrong = (Found(other, "other words", 0.5, False),)
    missed = RetrievalExample("image_to_text", record, None, 9, wrong)
    found = RetrievalExample("image_to_text", record, None, 1, (Found(record, "its own words", 0.5, True), *wrong))
    texts, _ = retrieval_sections([missed, found])
    assert isinstance(texts, Gallery)
    assert [card.text for card in texts.queries[0].answers] == ["other words", "its own words · more of them"]
    assert texts.queries[0].answers[1].right is None and texts.queries[0].answers[1].note.endswith("at rank 9")
    assert [card.right for card in texts.queries[1].answers] == [True, False]


def test_a_thumbnail_keeps_its_shape(tmp_path: Path) -> None:
    url = thumbnail(image_file(tmp_path / "wide.png"), side=100)
    small = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert small.size == (100, 50)


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot write the report"):
        write_report(tmp_path / "file" / "report.html", "Title", [])
