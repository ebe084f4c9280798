"""`vlkit protocols`: the named presets of `vlkit eval suite` and `eval prompts`, and what each of them fixes."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table
from vlkit.cli.own_eval import require_own_eval

if TYPE_CHECKING:
    from eval.coop_sets import Preset


def protocols(
    text: Annotated[str, typer.Argument(help="Only those whose name or title holds this.")] = "",
    json: Json = False,
) -> None:
    """List evaluation protocols: split, captions, templates, class names, metric."""
    require_own_eval()
    from eval.coop_sets import PRESETS
    from eval.protocols import PROTOCOLS
    from vlkit.features.model_card import DECODERS

    rows = [row for row in PROTOCOLS.values() if text.lower() in f"{row.name} {row.title}".lower()]
    # Over several data sets, of `vlkit eval prompts --protocol NAME --data FOLDER`.
    presets = {name: one for name, one in PRESETS.items() if text.lower() in f"{name} {one.title}".lower()}
    if json:
        for row in rows:
            settings = row.settings("fp32", DECODERS["reference"])  # what `eval suite` does unless asked otherwise
            print_json({"title": row.title, "folders": list(row.folders), "published": row.published, **settings})
        for name, one in presets.items():
            print_json(_about(name, one))
        return
    table: list[tuple[str, ...]] = [
        (row.name, row.task, row.metric, row.split or "all", "yes" if row.published else "", row.title) for row in rows
    ]
    for name, one in presets.items():
        about = _about(name, one)
        published = "yes" if about["published"] else ""
        table.append((name, about["task"], about["metric"], about["split"], published, one.title))
    print_table(None, ["protocol", "task", "metric", "split", "published", "what"], table)


def _about(name: str, preset: "Preset") -> dict[str, Any]:
    """What a protocol over several sets fixes."""
    halves = preset.protocol == "base-to-new"
    return {
        "title": preset.title,
        "folders": [one.folder for one in preset.sets],
        "published": halves,
        "name": name,
        "task": f"prompts: {preset.protocol}",
        "metric": "harmonic_mean" if halves else "accuracy@1",
        "split": "test",
        "templates": {one.name: one.template for one in preset.sets},
    }
