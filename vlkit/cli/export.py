"""`vlkit export MODEL --to open_clip|hf|onnx --out DIR`: a trained model for other libraries."""

from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.console import Json, print_json, say
from vlkit.errors import ConfigError, did_you_mean

_TARGETS = ("open_clip", "hf", "onnx")


def export(
    model: Annotated[str, typer.Argument(help="Any --model name: run:FOLDER, open_clip:ARCHITECTURE/TAG, hf:NAME.")],
    to: Annotated[str, typer.Option(help="open_clip (a local-dir: folder), hf (transformers), onnx (extra `export`).")],
    out: Annotated[Path, typer.Option(help="Folder to write; one of that name is replaced once the new one is whole.")],
    json: Json = False,
) -> None:
    """Write a model in the layout of another library."""
    if to not in _TARGETS:
        raise ConfigError(f"--to is {to!r}. {did_you_mean(to, _TARGETS)}")
    from vlkit.models.export import export_hf, export_onnx, export_open_clip
    from vlkit.models.load import load_encoder

    write = {"open_clip": export_open_clip, "hf": export_hf, "onnx": export_onnx}[to]
    write(load_encoder(model), out)
    files = sorted(path.name for path in out.iterdir())
    if json:
        print_json({"model": model, "to": to, "out": str(out), "files": files})
    else:
        say(f"wrote {out}: {', '.join(files)}")
