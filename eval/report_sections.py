"""The sections that show one evaluation: numbers, what was left out, the confusion matrix, examples."""

import math
from collections.abc import Mapping, Sequence

import pyarrow as pa

from eval.classification import ClassifiedExample
from eval.examples import Found, HeatExample, RetrievalExample
from eval.report import Card, Gallery, HeatMap, HeatMaps, Matrix, Query, Section, Table
from vlkit.contracts import Evaluation
from vlkit.data.thumbnail import thumbnail
from vlkit.errors import DataError
from vlkit.escape import one_line

MAX_LISTED = 50
# Columns of a table with a row a class that say how well it was found.
_OF_CLASSES = ("iou", "average_precision")


def evaluation_sections(evaluation: Evaluation) -> list[Section]:
    """All sections of what an evaluator of this package returned, in reading order."""
    sections: list[Section] = [metrics_section(evaluation)]
    figures = evaluation.figures
    if "confusion_matrix" in figures:
        names = figures["class_names"]
        sections.append(classes_section(evaluation))
        sections.append(Matrix("Confusion matrix", names, figures["confusion_matrix"]))
    elif evaluation.per_item is not None:
        sections += worst_section(evaluation.per_item)
    if figures.get("heat_maps"):
        sections.append(heat_section(figures["heat_maps"]))
    examples = figures.get("examples", ())
    retrieved = [example for example in examples if isinstance(example, RetrievalExample)]
    classified = [example for example in examples if isinstance(example, ClassifiedExample)]
    if retrieved:
        sections += retrieval_sections(retrieved)
    if classified:
        sections.append(classified_section(classified))
    if figures.get("unreadable_images"):
        rows = [(one_line(key), one_line(reason)) for key, reason in figures["unreadable_images"][:MAX_LISTED]]
        sections.append(Table("Unreadable images", ["image", "what is wrong"], rows, "Left out of every number."))
    rows = [(one_line(key.replace("_", " ")), one_line(in_words(value))) for key, value in _facts(evaluation)]
    sections.append(Table("Protocol", ["what", "how"], rows))
    return sections


def metric_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Each metric as text with its 95% interval: fractions in per cent, ranks as they are."""
    return [
        (key, _shown(key, value), " to ".join(_shown(key, bound) for bound in evaluation.intervals.get(key, ())))
        for key, value in evaluation.metrics.items()
    ]


def metrics_section(evaluation: Evaluation, title: str = "Metrics") -> Table:
    """The table of metrics with their intervals."""
    return Table(title, ["metric", "value", "95% interval"], metric_rows(evaluation))


def classes_section(evaluation: Evaluation, count: int = 20) -> Table:
    """The classes with the lowest recall; a class without an image has none."""
    matrix, names = evaluation.figures["confusion_matrix"], evaluation.figures["class_names"]
    sizes, hits = matrix.sum(1).tolist(), matrix.diagonal().tolist()
    rows = sorted((hits[c] / sizes[c], c) for c in range(len(names)) if sizes[c])[:count]
    shown = [(one_line(names[c]), f"{recall:.0%}", sizes[c]) for recall, c in rows]
    empty = sum(not size for size in sizes)
    note = f"{empty} classes have no image and no recall." if empty else ""
    return Table(f"The {len(shown)} classes with the lowest recall", ["class", "recall", "images"], shown, note)


def worst_section(table: pa.Table, count: int = 20) -> list[Section]:
    """The classes with the lowest value, of tables with a row a class; nothing for others."""
    names = table.column_names
    found = next((one for one in _OF_CLASSES if one in names), None)
    if "class" not in names or "key" in names or found is None:
        return []
    sizes = next((one for one in ("pixels", "images") if one in names), None)
    rows = [row for row in table.to_pylist() if row[found] is not None and math.isfinite(row[found])]
    rows.sort(key=lambda row: row[found])
    columns = ["class", found.replace("_", " "), *([sizes] if sizes else [])]
    shown = [(one_line(r["class"]), f"{r[found]:.0%}", *([r[sizes]] if sizes else [])) for r in rows[:count]]
    absent = table.num_rows - len(rows)
    note = f"{absent} classes are nowhere and have no value." if absent else ""
    return [Table(f"The {len(shown)} classes with the lowest {columns[1]}", columns, shown, note)]


def heat_section(examples: Sequence[HeatExample]) -> HeatMaps:
    """Photographs under what a method saw in them."""
    pictured = [(one, _thumbnail(one)) for one in examples]
    maps = [HeatMap(url, one.values, one_line(one.text), one_line(one.note)) for one, url in pictured if url]
    return HeatMaps("Where the class was seen", maps, "The redder, the higher the value of that part.")


def retrieval_sections(examples: Sequence[RetrievalExample]) -> list[Section]:
    """One gallery for each direction."""
    titles = {"image_to_text": "Captions found for images", "text_to_image": "Images found for captions"}
    return [
        Gallery(title, [_retrieved(example) for example in examples if example.direction == direction])
        for direction, title in titles.items()
    ]


def classified_section(examples: Sequence[ClassifiedExample]) -> Gallery:
    """Images beside their classes: the most certain right answers, then the most certain mistakes."""
    queries = []
    for example in examples:
        right = example.true == example.predicted
        answer = Card(text=one_line(example.predicted), note=f"probability {example.probability:.1%}", right=right)
        truth = Card(text=one_line(example.true), note="true class")
        picture = Card(image=_thumbnail(example), note=one_line(example.record.key))
        queries.append(Query(picture, [answer] if right else [answer, truth]))
    return Gallery("Most certain answers, right and wrong", queries)


def _retrieved(example: RetrievalExample) -> Query:
    rank = f"right answer at rank {example.rank:g}"
    if example.direction == "image_to_text":
        asked = Card(image=_thumbnail(example), note=f"{one_line(example.record.key)}; {rank}")
        shown = [_answer(found) for found in example.found]
        if not any(found.right for found in example.found):
            own = " · ".join(one_line(caption) for caption in example.record.captions)
            shown.append(Card(text=own, note=f"the image's own captions, the first of them at rank {example.rank:g}"))
        return Query(asked, shown)
    answers = [_answer(found) for found in example.found]
    if not any(found.right for found in example.found):
        answers.append(Card(image=_thumbnail(example), note=f"the caption's own image, rank {example.rank:g}"))
    return Query(Card(text=one_line(example.caption or ""), note=rank), answers)


def _answer(found: Found) -> Card:
    score = f"similarity {found.score:.3f}"
    if found.caption is not None:
        return Card(text=one_line(found.caption), note=score, right=found.right)
    return Card(image=_thumbnail(found), note=score, right=found.right)


def _thumbnail(item: RetrievalExample | ClassifiedExample | HeatExample | Found) -> str | None:
    try:
        return thumbnail(item.record.image, where=item.record.key)
    except DataError:  # it was readable when it was evaluated; a picture less is no reason to lose the report
        return None


def _shown(key: str, value: float) -> str:
    return f"{value:g}" if key.endswith("rank") else f"{value:.2%}"


def in_words(value: object) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {in_words(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(in_words(one) for one in value) or "none"
    return "none" if value is None or value == "" else str(value)


def _facts(evaluation: Evaluation) -> list[tuple[str, object]]:
    return [*evaluation.counts.items(), *evaluation.protocol.items()]
