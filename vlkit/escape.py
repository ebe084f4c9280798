"""Text out of data (captions, class and file names) made safe for a terminal, a CSV cell and a file name.

HTML is escaped by jinja2 with autoescape on, never here.
"""

import re
import unicodedata

# A spreadsheet runs a cell that opens with one of these as a formula; the last four are the full-width forms.
_FORMULA_OPENERS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# Control, format, private-use and surrogate characters, line and paragraph separators.
_ACTING = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
# Format characters that only join letters: Persian, Indic scripts and composed emoji are not readable without them.
_JOINERS = "\u200c\u200d"
# File systems allow 255 bytes to a name; a counter and an ending have to fit behind this.
_MAX_NAME_BYTES = 200


def terminal_text(text: str) -> str:
    """Show control and format characters (terminal escapes, right-to-left overrides) as visible escapes.

    Line feeds and the two zero-width joiners stay; everything else of the Unicode categories Cc, Cf, Co, Cs, Zl and
    Zp becomes `\\x1b`, `\\u202e`, ...
    """
    return "".join(_visible(char) for char in text)


def one_line(text: str, width: int | None = None) -> str:
    """`terminal_text` on one line, white space (tabs too) folded, cut to `width` characters with an ellipsis."""
    flat = terminal_text(" ".join(text.split()))
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
    """A folder or file name made from a class name: no separators, no control characters, never empty or dotted.

    At most `max_length` characters and 200 bytes. Two names can come out the same; the caller keeps them apart.
    """
    cleaned = re.sub(r'[\\/:*?"<>|]+', "_", "".join("_" if _acts(char) else char for char in text))
    short = cleaned.strip(" .")[:max_length].encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    return short.strip(" .") or "unnamed"


def _acts(char: str) -> bool:
    return char not in _JOINERS and unicodedata.category(char) in _ACTING


def _visible(char: str) -> str:
    if char == "\n" or not _acts(char):
        return char
    return char.encode("unicode_escape").decode("ascii")
