"""A report of many results: one self-contained page, the same figures as PNG, the table as CSV, LaTeX and Markdown.

    written = write_suite_report("results", "report")     # report/index.html, table.csv, table.tex, table.md, figures/

Needs the results folder alone: neither models nor data. Lines of a plain results file have no figures and show numbers.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from eval.curves import confusion_picture, curves_of
from eval.report import Gallery, Heading, HeatMaps, Matrix, Picture, Section, Table, write_report
from eval.report_pictures import gallery_picture, heat_maps_picture
from eval.report_store import read_sections
from eval.runner import suite_results
from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError
from vlkit.escape import csv_cell, one_line

PAGE = "index.html"


class Overview(NamedTuple):
    """One row a model, one column a protocol: the protocol's own metric."""

    columns: list[str]
    rows: list[list[str]]  # the model's name, then per cent as text, empty where there is no result


def write_suite_report(results: str | Path, out: str | Path) -> list[Path]:
    """Write the page and everything beside it.

    Args:
        results: a suite's folder, or a results file.
        out: folder of the report.

    Returns:
        The files, the page first.

    Raises:
        DataError: no results, files of theirs that are missing or broken, or `out` cannot be written.
    """
    place, out = Path(results), Path(out)
    lines = suite_results(place)
    folder = place if place.is_dir() else place.parent
    overview = overview_of(lines)
    pictures: dict[str, bytes] = {}
    sections: list[Section] = [
        Table("Results", overview.columns, overview.rows, _NOTE, sortable=True),
        _all_metrics(lines),
        *_published(lines),
    ]
    for number, line in enumerate(lines, start=1):
        sections += _of_line(line, number, folder, pictures)
    sections.append(_fingerprints(lines))
    out.mkdir(parents=True, exist_ok=True)
    numbers = {"model": len({line["model"] for line in lines}), "protocol": len({_task(line) for line in lines})}
    title = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in numbers.items())
    write_report(out / PAGE, "vlkit evaluation", sections, title)
    tables = {"table.csv": as_csv(overview), "table.tex": as_latex(overview), "table.md": as_markdown(overview)}
    files = {out / name: text.encode("utf-8", "backslashreplace") for name, text in tables.items()}
    files |= {out / "figures" / name: content for name, content in pictures.items()}
    for path, content in files.items():
        _write(path, content)
    return [out / PAGE, *files]


def overview_of(lines: Sequence[Mapping[str, Any]]) -> Overview:
    """The table of main metrics; the mean is over named protocols that every model has, where there are several."""
    tasks = list(dict.fromkeys(_task(line) for line in lines))
    models = list(dict.fromkeys(str(line["model"]) for line in lines))
    value = {(str(line["model"]), _task(line)): _main_value(line) for line in lines}
    # Results of single commands have metrics of their own, whose mean says nothing.
    named = {_task(line) for line in lines if line["protocol"].get("name")}
    shared = [task for task in tasks if task in named and all((model, task) in value for model in models)]
    with_mean = len(shared) > 1
    rows = []
    for model in models:
        cells = [f"{100 * value[model, task]:.2f}" if (model, task) in value else "" for task in tasks]
        if with_mean:
            cells.append(f"{100 * sum(value[model, task] for task in shared) / len(shared):.2f}")
        rows.append([model, *cells])
    return Overview(["model", *tasks, *([f"mean of {len(shared)}"] if with_mean else [])], rows)


def as_csv(overview: Overview) -> str:
    """Comma-separated, cells safe to open in a spreadsheet."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([[csv_cell(cell) for cell in row] for row in (overview.columns, *overview.rows)])
    return buffer.getvalue()


def as_markdown(overview: Overview) -> str:
    """A pipe table."""
    lines = [[_markdown(cell) for cell in row] for row in (overview.columns, *overview.rows)]
    rule = ["---", *["---:"] * (len(overview.columns) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (lines[0], rule, *lines[1:]))


def as_latex(overview: Overview) -> str:
    """A booktabs table."""
    rows = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (overview.columns, *overview.rows)]
    begin = r"\begin{tabular}{l" + "r" * (len(overview.columns) - 1) + "}"
    return "\n".join([begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", ""])


_NOTE = (
    "Each protocol's own metric in per cent: mean recall@1 of both directions for retrieval, accuracy or mean recall "
    "per class for classification. Click a column to sort by it."
)


def _decoder(line: Mapping[str, Any]) -> str:
    """How images were read; what an evaluator says of it stands among its own facts."""
    if "decoder" in line["protocol"]:
        return str(line["protocol"]["decoder"])
    return "see its protocol" if line.get("counts", {}).get("images") else "reads no images"


# Of lines that were written by other tools or earlier versions.
_UNKNOWN = "not stated"


def _task(line: Mapping[str, Any]) -> str:
    """What a column of the table is called."""
    protocol = line["protocol"]
    if protocol.get("name"):
        return one_line(protocol["name"])
    # Of single commands: the data by their folder, and whatever tells two evaluations of them apart.
    parts = [str(line["task"]), Path(str(line["data"])).name, str(line["split"] or "")]
    parts += [str(addon.get("name")) for addon in protocol.get("addons", ()) if isinstance(addon, dict)]
    told = [str(protocol.get(key, "none")).partition(";")[0] for key in ("folds", "post_processing")]
    parts += [text for text in told if text not in ("none", "1")]
    return one_line(" ".join(part for part in parts if part))


def _main_metric(line: Mapping[str, Any]) -> str:
    wanted = line["protocol"].get("metric", "mean_recall@1")
    return str(wanted) if wanted in line["metrics"] else str(next(iter(line["metrics"])))


def _main_value(line: Mapping[str, Any]) -> float:
    return float(line["metrics"][_main_metric(line)])


def _all_metrics(lines: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[tuple[str, ...]] = []
    for line in lines:
        for key, value in line["metrics"].items():
            rank = key.endswith("rank")
            interval = line["intervals"].get(key)
            low, high = ("", "") if interval is None else (f"{b:g}" if rank else f"{100 * b:.2f}" for b in interval)
            shown = f"{value:g}" if rank else f"{100 * value:.2f}"
            rows.append((key, shown, low, high, _task(line), one_line(line["model"])))
    # What is read first stands first: on a narrow screen the rest is scrolled to.
    columns = ["metric", "value", "95% from", "to", "protocol", "model"]
    if len({row[-1] for row in rows}) == 1:
        rows, columns = [row[:-1] for row in rows], columns[:-1]
    return Table("All metrics", columns, rows, "In per cent, ranks as they are.", sortable=True)


def _published(lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    rows = [
        (
            one_line(line["model"]),
            _task(line),
            key,
            f"{100 * line['metrics'][key]:.2f}",
            f"{100 * anchor['published']:.2f}",
            f"{100 * anchor['difference']:+.2f}",
            "yes" if anchor["within"] else "NO",
        )
        for line in lines
        for key, anchor in line.get("published", {}).items()
    ]
    if not rows:
        return []
    columns = ["model", "protocol", "metric", "measured", "published", "difference", "within 0.2"]
    return [Table("Beside the published numbers of these weights", columns, rows, sortable=True)]


def _of_line(line: Mapping[str, Any], number: int, folder: Path, pictures: dict[str, bytes]) -> list[Section]:
    title = f"{_task(line)}: {one_line(line['model'])}"
    sections: list[Section] = [Heading(title, f"{_main_metric(line)} {_main_value(line):.2%}")]
    files = line.get("files")
    if not files:
        return []
    stored = read_sections(folder / files["figures"])
    prefix = f"{number:02d}_{re.sub('[^A-Za-z0-9_-]+', '_', title)[:80]}"
    try:
        table = pq.read_table(folder / files["per_item"])
    except OSError as error:
        raise DataError(f"Cannot read {folder / files['per_item']}: {error}. Run the suite again.") from error
    curves = curves_of(table)
    for name, content in curves.items():
        pictures[f"{prefix}_{name.lower().replace(' ', '_')}.png"] = content
    for section in stored:
        name = re.sub("[^a-z0-9]+", "_", section.title.lower())
        if isinstance(section, Matrix):
            pictures[f"{prefix}_confusion_matrix.png"] = confusion_picture(section.counts, section.class_names)
        elif isinstance(section, Gallery) and section.queries:
            pictures[f"{prefix}_{name}.png"] = gallery_picture(section)
        elif isinstance(section, HeatMaps) and section.maps:
            pictures[f"{prefix}_{name}.png"] = heat_maps_picture(section)
    drawn = [Picture(name, content) for name, content in curves.items()]
    return [*sections, stored[0], *drawn, *stored[1:]]


def _fingerprints(lines: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            one_line(line["model"]),
            _task(line),
            line["protocol"].get("fingerprint", _UNKNOWN),
            line["protocol"].get("precision", _UNKNOWN),
            _decoder(line),
            line["protocol"].get("data_hash", _UNKNOWN),
            str(line["model_identity"])[:12],
        )
        for line in lines
    ]
    columns = ["model", "protocol", "fingerprint", "precision", "decoder", "data", "weights and preprocessing"]
    return Table("Fingerprints", columns, rows, "Numbers of equal fingerprint and data may be compared.")


def _markdown(cell: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", one_line(cell))


def _latex(cell: str) -> str:
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(words.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in one_line(cell))


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error
