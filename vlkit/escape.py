"""Text out of data (captions, class and file names) made safe for a terminal, a CSV cell and a file name.

HTML is escaped by jinja2 with autoescape on, never here.
"""

import re
import unicodedata

# A spreadsheet runs a cell that opens with one of these as a formula.
_FORMULA_OPENERS = ("=", "+", "-", "@", "\t", "\r")


def terminal_text(text: str) -> str:
    """Show control and format characters (terminal escapes, right-to-left overrides) as visible escapes.

    Line feeds stay; everything else of the Unicode categories Cc, Cf, Co, Cs becomes `\\x1b`, `\\u202e`, ...
    """
    return "".join(_visible(char) for char in text)


def one_line(text: str, width: int | None = None) -> str:
    """`terminal_text` on one line, white space folded, cut to `width` characters with an ellipsis."""
    flat = " ".join(terminal_text(text).split())
    if width is not None and len(flat) > width:
        return flat[: max(width - 1, 0)] + "…"
    return flat


def csv_cell(value: object) -> str:
    """A cell that no spreadsheet runs as a formula: text that opens like one gets a leading apostrophe.

    Numbers stay as they are, so that -0.5 remains a number.
    """
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value)
    return "'" + text if text.startswith(_FORMULA_OPENERS) else text


def file_stem(text: str, max_length: int = 80) -> str:
    """A folder or file name made from a class name: no separators, no control characters, never empty or dotted."""
    cleaned = re.sub(r'[\\/:*?"<>|\x00-\x1f\x7f]+', "_", text).strip(" .")
    return cleaned[:max_length] or "unnamed"


def _visible(char: str) -> str:
    if char == "\n" or unicodedata.category(char) not in {"Cc", "Cf", "Co", "Cs"}:
        return char
    return char.encode("unicode_escape").decode("ascii")
