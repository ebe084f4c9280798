"""`vlkit export MODEL --to open_clip|hf|onnx --out DIR`: a trained model for other libraries, or one between two."""

import math
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
    interpolate: Annotated[
        str | None,
        typer.Option(
            metavar="START=ALPHA",
            help="WiSE-FT: write (1 - ALPHA) START + ALPHA MODEL, where START is the model that MODEL was fine-tuned "
            "from. Near 0.5 it is often nearly as good on MODEL's data, and elsewhere hardly worse than START.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a model in the layout of another library."""
    if to not in _TARGETS:
        raise ConfigError(f"--to is {to!r}. {did_you_mean(to, _TARGETS)}")
    from vlkit.models.export import export_hf, export_onnx, export_open_clip
    from vlkit.models.load import load_encoder

    write = {"open_clip": export_open_clip, "hf": export_hf, "onnx": export_onnx}[to]
    between = None if interpolate is None else _read_interpolation(interpolate)
    encoder = load_encoder(model)
    if between is not None:
        from vlkit.models import weight_space

        start, alpha = between
        encoder = weight_space.interpolate(load_encoder(start), encoder, alpha)
    write(encoder, out)
    files = sorted(path.name for path in out.iterdir())
    if json:
        mixed = {} if between is None else {"interpolate": {"start": between[0], "alpha": between[1]}}
        print_json({"model": model, **mixed, "to": to, "out": str(out), "files": files})
    else:
        say(f"wrote {out}: {', '.join(files)}")


def _read_interpolation(text: str) -> tuple[str, float]:
    """START and ALPHA; the name of a model may hold a = itself."""
    start, _, number = text.rpartition("=")
    try:
        alpha = float(number)
    except ValueError:
        alpha = math.nan
    if not start or not math.isfinite(alpha):
        raise ConfigError(
            f"--interpolate is {text!r}; expected START=ALPHA, e.g. open_clip:ViT-B-32/laion2b_s34b_b79k=0.5, where 0 "
            "gives START and 1 the model itself."
        )
    return start, alpha
