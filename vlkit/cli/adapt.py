"""`vlkit adapt`: fit a method on your images, and save it for `--addon`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.adapt_active import Asking, asked_in_rounds
from vlkit.cli.console import Json, print_json, print_table, progress_bar, say
from vlkit.cli.options import BatchSize, Device, Model, NoCache
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.addons.adapt import Adapted, Drawn
    from vlkit.addons.class_names import ClassName
    from vlkit.addons.reference import Reference
    from vlkit.data.records import Record
    from vlkit.features.source import FeatureSource

MAX_SHOWN = 20
AUTO = "auto"


def adapt(
    method: Annotated[
        str,
        typer.Argument(
            help="A name from `vlkit methods`, with settings as in tip_adapter:alpha=2,beta=5; auto: the best of four."
        ),
    ],
    model: Model,
    data: Annotated[str, typer.Option(help="Folder of class folders, or images with captions.")],
    out: Annotated[Path, typer.Option(help="Folder for the fitted add-on.")],
    classes_file: Annotated[
        Path | None, typer.Option(help="`folder<TAB>name` or `folder => name` a line, or names in folder order.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Class folder to leave out; may be repeated.")] = None,
    val: Annotated[
        Path | None, typer.Option(help="Class folders to validate on. [default: min(shots, 4) a class are held out]")
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Images a class to learn from.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, and of training.")] = 0,
    active: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rounds in which labels are asked for, one for each class, in place of drawn shots; the class "
            "folders answer. [default: none]",
        ),
    ] = 0,
    ask: Annotated[str, typer.Option(help="With --active, which images: clusters, random or entropy.")] = "clusters",
    selective: Annotated[
        bool, typer.Option("--selective", help="With --active: no question where the model is sure.")
    ] = False,
    templates: Annotated[str, typer.Option(help="Prompts around class names; a set, a file, or a text with {}.")] = (
        "simple"
    ),
    split: Annotated[str | None, typer.Option(help="Which split of the data to fit on.")] = None,
    format: Annotated[str | None, typer.Option(help="Of the data; default: from the files.")] = None,  # noqa: A002
    device: Device = "auto",
    batch_size: BatchSize = 64,
    no_cache: NoCache = False,
    json: Json = False,
) -> None:
    """Fit a method on labelled images (a few a class, by seed) or on captioned ones, and save it."""
    from vlkit.addons.registry import make_addon

    addon = None if method == AUTO else make_addon(method)
    if (ask != "clusters" or selective) and not active:
        raise ConfigError("--ask and --selective belong to --active ROUNDS. Name the rounds, or leave them out.")
    if active and addon is None:
        raise ConfigError("--active goes with one method, not with auto.")
    asking = Asking(active, ask, selective) if active else None
    if addon is not None and addon.fitted is not None:
        raise ConfigError(f"{method} is a fitted add-on already; name a method to fit.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; name a new folder for the add-on.")
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    records, classes = _records(data, split, format, classes_file, exclude)
    held_out = None if val is None else _records(str(val), None, None, classes_file, exclude)
    if held_out is not None and held_out[1] != classes:
        raise DataError(f"{val} holds other classes than {data}; both need the same class folders.")

    from vlkit.addons.adapt import adapt as fit
    from vlkit.addons.adapt import captioned_reference, labelled_reference
    from vlkit.addons.passes import Passes
    from vlkit.addons.pipeline import Pipeline
    from vlkit.addons.saved import save_addon
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_source

    source = open_source(model, device, None if no_cache else FeatureCache.default())
    with progress_bar("read the images", "images") as tick:
        local = addon is not None and Pipeline([addon]).local
        passes = Passes(source, local=local, batch_size=batch_size, progress=tick)
        if classes:
            reference, drawn = labelled_reference(
                passes, records, classes, shots=shots, seed=seed, val=None if held_out is None else held_out[0]
            )
        else:
            reference, drawn = captioned_reference(passes, records, seed=seed, split=split or "train")
    for note in drawn.notes:
        say(note)
    compared: dict[str, Any] = {}
    if addon is None:
        adapted, compared = _chosen(reference, source, templates, json)
    elif asking is not None:
        adapted, compared = asked_in_rounds(addon, reference, source, templates, asking, json)
    else:
        with progress_bar(f"fit {addon.name}", "steps") as tick:
            adapted = fit(addon, reference, source, templates, tick)
    save_addon(adapted.addon, out)
    _report(adapted, drawn, model, data, out, json, compared)


def _chosen(
    reference: "Reference", source: "FeatureSource", templates: str, json: bool
) -> "tuple[Adapted, dict[str, Any]]":
    """The best of several methods, and what the record says of the comparison."""
    from dataclasses import asdict

    from vlkit.addons.auto import choose

    with progress_bar("compare methods", "methods") as tick:
        choice = choose(reference, source, templates, progress=tick)
    if not json:
        rows = [
            (
                one.name,
                one.reason or f"{one.accuracy:.2%}",
                f"{one.seconds:.1f}",
                "yes" if one.other_classes else "no",
            )
            for one in choice.compared
        ]
        print_table("compared on held-out images", ("method", "accuracy", "seconds", "other classes later"), rows)
    say(choice.why)
    return choice.adapted, {"compared": [asdict(one) for one in choice.compared], "why": choice.why}


def _records(
    data: str, split: str | None, data_format: str | None, file: Path | None, exclude: list[str] | None
) -> "tuple[list[Record], list[ClassName]]":
    """Images of one split with their classes; no classes where they have captions only."""
    from vlkit.cli.own_eval import require_own_eval
    from vlkit.data.sources import read_source

    source = read_source(data, format=data_format, split=split)
    for line in source.problems.lines():
        say(f"left out: {line}")
    chosen = [record for record in source.records if record.split in (None, split or "train")]
    if not chosen:
        found = ", ".join(sorted({record.split or "none" for record in source.records}))
        raise DataError(f"{data} has no images of split train; it has {found}. Name one with --split.")
    if not source.class_names:
        if not any(record.captions for record in chosen):
            raise DataError(f"{data} has neither classes nor captions to fit on; expected a folder for each class.")
        return chosen, []
    if file is None and all(_is_wordnet(name) for name in source.class_names):
        raise DataError(
            f"The class folders of {data} are WordNet ids (such as {source.class_names[0]}), which say nothing to a "
            "text tower. Name the classes: --classes-file with `folder<TAB>name` lines."
        )
    require_own_eval()
    from eval.class_names import name_classes
    from vlkit.addons.class_names import check_classes, parse_class

    named = name_classes(source.class_names, chosen, file, exclude or ())
    return list(named.records), check_classes([parse_class(name) for name in named.names])


def _is_wordnet(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdecimal()


def _report(
    adapted: "Adapted", drawn: "Drawn", model: str, data: str, out: Path, json: bool, compared: dict[str, Any]
) -> None:
    addon = adapted.addon
    assert addon.fitted is not None
    if json:
        print_json(
            {
                "method": addon.name,
                "slot": addon.slot,
                "model": model,
                "data": data,
                "out": str(out),
                "settings": addon.settings(),
                "fitted_on": dict(addon.fitted.seen),
                "held_out": list(drawn.val),
                "validation": {"plain": adapted.plain, "with_addon": adapted.adapted},
                "notes": list(drawn.notes),
                **compared,
            }
        )
        return
    rows: list[tuple[str, Any]] = [
        (name, "none" if value is None else value) for name, value in addon.settings().items()
    ]
    rows += [(f"fitted on {need}", words) for need, words in addon.fitted.seen.items()]
    if adapted.plain is not None:
        rows += [("validation, plain", f"{adapted.plain:.2%}"), ("validation, with it", f"{adapted.adapted:.2%}")]
    print_table(f"{addon.name} ({addon.slot}) for {model}", ("what", "value"), rows)
    if drawn.val:
        more = len(drawn.val) - MAX_SHOWN
        listed = ", ".join(drawn.val[:MAX_SHOWN]) + (f", and {more} more (--json lists all)" if more > 0 else "")
        say(f"held out for validation: {listed}")
    if drawn.unreadable:
        say(f"unreadable images, left out: {len(drawn.unreadable)} (first: {drawn.unreadable[0][0]})")
    say(f"saved in {out}; use it with --addon {out}")
