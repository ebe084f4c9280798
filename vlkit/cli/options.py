"""Options and arguments that commands of several groups have, each with one help text."""

from typing import Annotated

import typer

ImagePaths = Annotated[list[str], typer.Argument(help="Folders (recursive), image files, .tar shards.")]
Shards = Annotated[str, typer.Argument(help="A folder of shards, a tar, a glob, or braces like {00000..00099}.tar.")]
Model = Annotated[
    str, typer.Option(help="run:FOLDER, local-dir:FOLDER, open_clip:NAME/TAG, hf:NAME or timm:NAME (images only).")
]
Templates = Annotated[str, typer.Option(help="none, photo, simple, imagenet80, a file, or a text with {}.")]
Device = Annotated[str, typer.Option(help="auto (cuda, mps, cpu) or a device's name.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images encoded together.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Encode everything anew.")]
