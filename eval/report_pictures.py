"""Galleries and heat maps of a report as PNG, for papers and slides: the same content as on the page."""

import base64
import io
import textwrap
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.report import Card, Gallery, HeatMap, HeatMaps
from vlkit.escape import one_line

_MOST_QUERIES = 12  # of a gallery: a page of a paper holds no more
_MOST_ANSWERS = 6  # five, and the right one where it is not among them
_MAPS_A_ROW = 4
# In pixels: a cell of the sheet, what a thumbnail may take of it, and the space around.
_CELL, _PICTURE, _SPACE = (184, 214), (168, 160), 8
_LETTER, _NOTE = 13, 11
_LETTERS, _LINES, _NOTE_LETTERS = 23, 8, 28
_RIGHT, _WRONG, _PLAIN, _INK, _SOFT = "#18794e", "#c62a2f", "#d9d9e0", "#1c2024", "#60646c"


def gallery_picture(gallery: Gallery) -> bytes:
    """One row a query: what was asked, then its first answers, right ones framed in green and wrong ones in red."""
    rows = [[query.asked, *query.answers[:_MOST_ANSWERS]] for query in gallery.queries[:_MOST_QUERIES]]
    return _sheet(rows)


def heat_maps_picture(section: HeatMaps) -> bytes:
    """The images under their grids of values."""
    cards = [Card(image=_tinted(one), note=f"{one.text}: {one.note}") for one in section.maps]
    return _sheet([cards[start : start + _MAPS_A_ROW] for start in range(0, len(cards), _MAPS_A_ROW)])


def _sheet(rows: Sequence[Sequence[Card]]) -> bytes:
    columns = max((len(row) for row in rows), default=1)
    sheet = Image.new("RGB", (columns * _CELL[0] + _SPACE, max(len(rows), 1) * _CELL[1] + _SPACE), "white")
    for row, cards in enumerate(rows):
        for column, card in enumerate(cards):
            _draw(sheet, card, column * _CELL[0] + _SPACE, row * _CELL[1] + _SPACE)
    written = io.BytesIO()
    sheet.save(written, "PNG", optimize=True)
    return written.getvalue()


def _draw(sheet: Image.Image, card: Card, left: int, top: int) -> None:
    pen = ImageDraw.Draw(sheet)
    frame = (left, top, left + _CELL[0] - _SPACE, top + _CELL[1] - _SPACE)
    colour = _PLAIN if card.right is None else _RIGHT if card.right else _WRONG
    pen.rectangle(frame, outline=colour, width=1 if card.right is None else 3)
    if card.image is not None:
        picture = _decoded(card.image)
        picture.thumbnail(_PICTURE)
        sheet.paste(picture, (left + (_CELL[0] - _SPACE - picture.width) // 2, top + 6))
    elif card.text:
        pen.multiline_text((left + 8, top + 8), _wrapped(card.text, _LETTERS, _LINES), _INK, _font(_LETTER))
    note = _wrapped(card.note, _NOTE_LETTERS, 2)
    pen.multiline_text((left + 8, frame[3] - 6), note, _SOFT, _font(_NOTE), anchor="ld", spacing=2)


def _tinted(one: HeatMap) -> str:
    """The image under the page's colour, the stronger the higher the value, as a data URL."""
    picture = _decoded(one.image)
    values = np.array(one.values, dtype=np.float32).clip(0, 1)
    strength = Image.fromarray((255 * 0.75 * values).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    picture.paste(Image.new("RGB", picture.size, (255, 64, 0)), (0, 0), strength)
    written = io.BytesIO()
    picture.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")


def _decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def _wrapped(text: str, letters: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(one_line(text), letters, max_lines=lines, placeholder=" ..."))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own, which holds more letters than pillow's."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)
