"""`vlkit classify`: name the images of folders, files or shards with classes the user chooses."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.addon_options import AddOns, fitted_on_names, pipeline_of
from vlkit.cli.console import Json, Precision, print_json, print_table, progress_bar, say, say_unreadable
from vlkit.cli.options import BatchSize, Device, ImagePaths, Model, NoCache, Templates
from vlkit.errors import ConfigError, DataError
from vlkit.escape import csv_cell

if TYPE_CHECKING:
    from vlkit.addons.adapted import AdaptedClassifier
    from vlkit.classify import Classified, Sorter, Unreadable

MAX_TABLE_ROWS = 200


def classify(
    images: ImagePaths,
    model: Model,
    classes: Annotated[str | None, typer.Option(help="Class names, separated by commas, or a file's path.")] = None,
    classes_file: Annotated[
        Path | None, typer.Option(help="One class a line; `name | synonym | synonym` scores the maximum.")
    ] = None,
    templates: Templates = "simple",
    addon: AddOns = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to give for each image.")] = 5,
    min_probability: Annotated[float, typer.Option(min=0.0, max=1.0, help="Below it an image counts as unsure.")] = 0.0,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write a CSV file.")] = None,
    sort_into: Annotated[Path | None, typer.Option(help="Put each image into DIR/<class>/; nothing is moved.")] = None,
    link: Annotated[bool, typer.Option("--link/--copy", help="How --sort-into places images.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with thumbnails.")] = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Annotated[int, typer.Option(min=0, help="Decoders beside this process.")] = min(os.cpu_count() or 1, 8),
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of the weights. auto: fp32's classes in little more than bf16's time, where the processor has bf16: "
            "close calls are encoded again in fp32, and another class list has its own. With --addon: fp32."
        ),
    ] = Precision.AUTO,
    no_cache: NoCache = False,
    json: Json = False,
) -> None:
    """Classify images zero-shot. Unreadable images are listed at the end and do not stop the run."""
    # Cheap checks first: a mistyped class list should not wait for torch.
    lines, where = _class_lines(classes, classes_file)
    from vlkit.addons.class_weights.templates import load_templates
    from vlkit.addons.classifier import ZeroShotClassifier, parse_class_list
    from vlkit.classify import (
        SecondLook,
        Sorter,
        classify_images,
        classify_with_addons,
        gather_images,
        write_report,
    )
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_sources

    class_list = parse_class_list(lines, where)
    chosen_templates = load_templates(templates)
    source = gather_images(images)
    for line in source.problems.lines():
        say(f"left out: {line}")
    cache = None if no_cache else FeatureCache.default()
    pipeline = pipeline_of(addon)
    if pipeline.addons and precision is Precision.AUTO:
        precision = Precision.FP32  # the weights that add-ons are fitted for
    sources = open_sources(model, source.records, device, cache, precision=precision.value)
    look: SecondLook | None = None
    classifier: ZeroShotClassifier | AdaptedClassifier  # annotations of locals are not evaluated
    if pipeline.addons:
        pipeline = fitted_on_names(pipeline, sources.exact, class_list, chosen_templates)
        classifier = pipeline.classifier(class_list, sources.exact, chosen_templates)
        run = partial(classify_with_addons, sources.exact, pipeline, classifier)
    else:
        with progress_bar("encode classes", "prompts") as encoded:
            classifier = plain = ZeroShotClassifier.build(sources.exact, class_list, chosen_templates, encoded)
        if sources.first is not sources.exact:
            look = SecondLook(sources.exact, plain, min_probability)
        run = partial(classify_images, sources.first, plain, second_look=look)
    sorter = Sorter(sort_into, classifier.class_names, link=link) if sort_into is not None else None
    with ExitStack() as stack:
        write_row = _csv_writer(stack, csv_file, min(top, len(class_list))) if csv_file is not None else None
        sinks = _Sinks(json, classifier.rule, write_row, sorter)
        results = run(
            source.records,
            top=top,
            min_probability=min_probability,
            batch_size=batch_size,
            workers=workers,
            progress=stack.enter_context(progress_bar("classify", "images")),
        )
        passed_on = sinks.pass_on(results)
        if report is not None:
            names, rule = classifier.class_names, classifier.rule
            write_report(report, passed_on, class_names=names, model=model, rule=rule, min_probability=min_probability)
        for _ in passed_on:  # without a report nobody else has consumed them
            pass
    num_classified = len(source.records) - len(sinks.unreadable)
    if not json:
        title = f"{num_classified} images; {classifier.rule}"
        print_table(title, ["image", "class", "probability", "next"], sinks.table)
        if num_classified > len(sinks.table):
            say(f"... {num_classified - len(sinks.table)} more; --csv or --json gives all.")
    if look is not None:
        say(f"{look.num_again} of {num_classified} images, bf16's closest calls, were classified in fp32.")
    _closing_remarks(sinks.unreadable, sorter, [path for path in (report, csv_file) if path is not None])


class _Sinks:
    """Where each result goes as it comes: JSON lines, CSV rows, sorted folders, the table shown at the end."""

    def __init__(
        self,
        json: bool,
        rule: str,
        write_row: "Callable[[Classified | Unreadable], None] | None",
        sorter: "Sorter | None",
    ) -> None:
        self.json, self.rule, self.write_row, self.sorter = json, rule, write_row, sorter
        self.unreadable: list[Unreadable] = []
        self.table: list[tuple[object, ...]] = []

    def pass_on(self, results: "Iterable[Classified | Unreadable]") -> "Iterator[Classified | Unreadable]":
        """The same results, each sent to every sink on its way."""
        from vlkit.classify import Unreadable

        for result in results:
            if self.json:
                print_json(_as_json(result, self.rule))
            if self.write_row is not None:
                self.write_row(result)
            if isinstance(result, Unreadable):
                self.unreadable.append(result)
            else:
                if self.sorter is not None:
                    self.sorter.place(result)
                if len(self.table) < MAX_TABLE_ROWS:
                    self.table.append(_table_row(result))
            yield result


def _class_lines(classes: str | None, classes_file: Path | None) -> tuple[list[str], str]:
    if (classes is None) == (classes_file is None):
        raise ConfigError("Give the classes once: --classes dog,cat,... or --classes-file FILE with one a line.")
    path = classes_file
    if path is None and classes is not None and "," not in classes and Path(classes).is_file():
        path = Path(classes)
    if path is None:
        assert classes is not None
        return (classes.split(",") if classes.strip() else []), "--classes"
    try:
        return path.read_text(encoding="utf-8-sig").splitlines(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the class file {path}: {error}. It must be UTF-8 text, one class a line."
        ) from error


def _csv_writer(stack: ExitStack, path: Path, top: int) -> "Callable[[Classified | Unreadable], None]":
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("w", newline="", encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error
    writer = csv.writer(file)
    columns = [f"{kind}_{rank}" for rank in range(1, top + 1) for kind in ("class", "probability")]
    writer.writerow(["image", "unsure", "error", *columns])

    from vlkit.classify import Unreadable

    def write(result: "Classified | Unreadable") -> None:
        if isinstance(result, Unreadable):
            row: list[object] = [result.record.key, "", result.reason]
        else:
            pairs = [cell for pair in result.classes for cell in pair]
            row = [result.record.key, "yes" if result.unsure else "no", "", *pairs]
        writer.writerow([csv_cell(cell) for cell in row])

    return write


def _as_json(result: "Classified | Unreadable", rule: str) -> dict[str, object]:
    from vlkit.classify import Unreadable

    if isinstance(result, Unreadable):
        return {"path": result.record.key, "error": result.reason}
    return {
        "path": result.record.key,
        "classes": [{"name": name, "probability": round(probability, 6)} for name, probability in result.classes],
        "unsure": result.unsure,
        "probability": rule,
    }


def _table_row(result: "Classified") -> tuple[object, ...]:
    name, probability = result.classes[0]
    following = ", ".join(f"{other} {value:.1%}" for other, value in result.classes[1:3])
    return result.record.key, "unsure" if result.unsure else name, f"{probability:.1%}", following


def _closing_remarks(unreadable: "list[Unreadable]", sorter: "Sorter | None", written: list[Path]) -> None:
    if sorter is not None:
        verb = "linked" if sorter.link else "copied"
        say(f"{sorter.placed} images {verb} into {sorter.folder}; {sorter.already_there} were there already.")
    for path in written:
        say(f"written: {path}")
    if unreadable:
        found = [(item.record.key, item.reason) for item in unreadable]
        say_unreadable("unreadable images", found, " (--json lists all).")
