"""Instances for image-caption choice: Winoground's and SugarCrepe's files, and a substitute made from any captions."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.image_caption_choice import ChoiceInstance
from vlkit.data.records import ImageRef, Record
from vlkit.data.sources.annotated import read_json, read_lines
from vlkit.data.sources.image_files import ImageLookup
from vlkit.errors import DataError

FORMS = ("winoground", "sugarcrepe", "swapped")

_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")
# A noun ends a phrase: an article before it, and one of these, or the end, behind it.
_NOUN = re.compile(
    r"\b(?:a|an|the) ([a-z]{3,})(?= (?:is|are|in|on|at|with|and|of|near|by|holding|sitting|standing|that|while|under)"
    r"\b|[ ]?[.,]|$)"
)
_NO_NOUNS = frozenset({"front", "top", "side", "back", "middle", "other", "one", "left", "right", "same", "way"})


class ChoiceSet(NamedTuple):
    """Instances, and what was left out."""

    instances: tuple[ChoiceInstance, ...]
    how: str
    left_out: tuple[tuple[str, int], ...]


def read_winoground(file: str | Path, images: str | Path | None = None) -> ChoiceSet:
    """`examples.jsonl`: {"id", "image_0", "image_1", "caption_0", "caption_1", "collapsed_tag"} a line.

    Args:
        file: the file, with the images in `images/` beside it.
        images: their folder where it is another.

    Raises:
        DataError: a row of another form, or no image found.
    """
    place = Path(file)
    lookup = _lookup(place, images)
    found, missing = [], 0
    for number, line in enumerate(read_lines(place), start=1):
        if not line.strip():
            continue
        row = _object(line, f"{place}, line {number}")
        names = [_text(row, f"image_{n}", f"{place}, line {number}") for n in (0, 1)]
        captions = tuple(_text(row, f"caption_{n}", f"{place}, line {number}") for n in (0, 1))
        records = [_record(lookup, name) for name in names]
        if records[0] is None or records[1] is None:
            missing += 1
            continue
        tag = row.get("collapsed_tag")
        found.append(ChoiceInstance(str(row.get("id", number)), (records[0], records[1]), captions, tag if tag else ""))
    return _whole(found, missing, place, "Winoground's file")


def read_sugarcrepe(file: str | Path, images: str | Path | None = None) -> ChoiceSet:
    """`add_obj.json` and the like, or a folder of them: {"0": {"filename", "caption", "negative_caption"}, ...}.

    Args:
        file: one file, or the folder of them; the file's name becomes the tag.
        images: COCO's `val2017`, where it does not lie beside the file.

    Raises:
        DataError: a row of another form, or no image found.
    """
    place = Path(file)
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"{place} holds no .json file; expected SugarCrepe's add_obj.json, replace_att.json, ...")
    found, missing = [], 0
    for one in files:
        lookup = _lookup(one, images)
        document = read_json(one)
        rows = (
            document.items()
            if isinstance(document, dict)
            else enumerate(document if isinstance(document, list) else [])
        )
        for number, row in rows:
            where = f"{one}, entry {number}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object, found {json.dumps(row)[:80]}.")
            record = _record(lookup, _text(row, "filename", where))
            captions = (_text(row, "caption", where), _text(row, "negative_caption", where))
            if record is None:
                missing += 1
            else:
                found.append(ChoiceInstance(f"{one.stem}/{number}", (record,), captions, one.stem))
    return _whole(found, missing, place, "SugarCrepe's files")


def swap_nouns(records: Sequence[Record], min_captions: int = 2) -> ChoiceSet:
    """A substitute for SugarCrepe's swaps: each caption against itself with its first two nouns exchanged.

    Nouns are words that stand at the end of an article's phrase in several captions; no tagger is used, so a few are
    wrong. Captions without two distinct ones are left out.

    Args:
        records: images with captions.
        min_captions: captions in which a word must occur so.

    Raises:
        DataError: no caption has two nouns.
    """
    counts = Counter(
        noun for record in records for text in record.captions for noun in set(_NOUN.findall(text.lower()))
    )
    nouns = {noun for noun, count in counts.items() if count >= min_captions} - _NO_NOUNS
    found, without = [], 0
    for record in records:
        for number, caption in enumerate(record.captions):
            swapped = swap_two(caption, nouns)
            if swapped is None:
                without += 1
            else:
                found.append(ChoiceInstance(f"{record.key}#{number}", (record,), (caption, swapped)))
    if not found:
        raise DataError(f"None of the captions of {len(records)} images has two nouns to exchange.")
    how = "substitute: captions with their first two nouns exchanged, nouns found by articles"
    return ChoiceSet(tuple(found), how, (("captions_without_two_nouns", without),))


def swap_two(caption: str, nouns: set[str]) -> str | None:
    """The caption with its first two distinct nouns exchanged; None when it has none."""
    first: re.Match[str] | None = None
    for match in re.finditer(r"[A-Za-z]+", caption):
        if match[0].lower() not in nouns:
            continue
        if first is None:
            first = match
        elif match[0].lower() != first[0].lower():
            before, between, after = (
                caption[: first.start()],
                caption[first.end() : match.start()],
                caption[match.end() :],
            )
            return f"{before}{match[0]}{between}{first[0]}{after}"
    return None


def _whole(found: list[ChoiceInstance], missing: int, place: Path, how: str) -> ChoiceSet:
    if not found:
        raise DataError(f"None of the images named in {place} was found ({missing} rows). Name their folder, --images.")
    return ChoiceSet(tuple(found), how, (("instances_without_image", missing),))


def _lookup(file: Path, images: str | Path | None) -> ImageLookup:
    if images is not None:
        if not Path(images).is_dir():
            raise DataError(f"The folder of images {images} does not exist.")
        return ImageLookup([Path(images)])
    return ImageLookup(list(_beside(file)))


def _beside(file: Path) -> Iterator[Path]:
    for base in (file.parent, file.parent.parent):
        yield from (base / name for name in ("images", "val2017") if (base / name).is_dir())
    yield file.parent


def _record(lookup: ImageLookup, name: str) -> Record | None:
    path = lookup.find([name + suffix for suffix in _SUFFIXES])
    return None if path is None else Record(name, ImageRef(path=path))


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no valid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {line[:80]}.")
    return row


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: no text under {key!r}; it has {', '.join(map(str, row))[:120]}.")
    return value.strip()
