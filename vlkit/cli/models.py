"""`vlkit models [TEXT]`: the architectures and published weights there are, and which of them are on this disk."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table, say

if TYPE_CHECKING:
    from vlkit.models import catalogue


def models(
    text: Annotated[str, typer.Argument(help="Only names that contain this, in upper or lower case.")] = "",
    json: Json = False,
) -> None:
    """List architectures, published weights and what is on disk."""
    from vlkit.models import catalogue

    found = catalogue.offers(text)
    if json:
        for offer in found:
            print_json({**asdict(offer), "on_disk": str(offer.on_disk) if offer.on_disk else None})
        return
    columns = ("name", "image size", "dimensions", "context", "image params (M)", "text params (M)", "on disk")
    print_table(None, columns, [_row(offer) for offer in found])
    weights = sum(offer.tag is not None for offer in found)
    say(
        f"{len({offer.architecture for offer in found})} architectures, {weights} published weights. A name with "
        "open_clip: is a --model; one without has no published weights and is for training ([model] name)."
    )


def _row(offer: "catalogue.Offer") -> tuple[object, ...]:
    return (
        offer.name,
        offer.image_size,
        offer.embed_dim,
        offer.context_length,
        _millions(offer.image_parameters),
        _millions(offer.text_parameters),
        offer.on_disk or "",
    )


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"
