"""`vlkit eval blind-pairs | mine-pairs`: pairs of images that a model confuses."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.console import progress_bar, say
from vlkit.cli.evaluate_common import (
    Data,
    Format,
    Images,
    Shared,
    Split,
    remark_on,
    source_of_features,
    with_shared_options,
)
from vlkit.cli.evaluate_options import Seed
from vlkit.errors import ConfigError


@with_shared_options
def blind_pairs(
    shared: Shared,
    data: Annotated[str, typer.Option(help="Folder of MMVP-VLM: Questions.csv and `MLLM_VLM Images/`.")],
    template: Annotated[str, typer.Option(help="Of a statement.")] = "a photo of {}",
    seed: Seed = 0,
) -> None:
    """MMVP: pairs of images of which both statements pick their own; chance is 25%."""
    from eval.blind_pairs import BlindPairsEvaluator, read_mmvp
    from vlkit.data.records import Source

    pairs = read_mmvp(data)
    evaluator = BlindPairsEvaluator(pairs, template, shared.batch_size, shared.workers, seed)
    embedder = shared.source()
    with progress_bar("blind-pairs", "images and texts") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    title = f"{evaluation.counts['pairs']} pairs"
    shared.finish(evaluation, "blind-pairs", embedder, data, Source((), "mmvp", Path(data)), title)


@with_shared_options
def mine_pairs(
    shared: Shared,
    data: Data,
    second: Annotated[str, typer.Option(help="The model that sees otherwise, e.g. timm:NAME@FILE; images suffice.")],
    above: Annotated[float, typer.Option(help="Cosine in --model that makes two images the same.")] = 0.95,
    below: Annotated[float, typer.Option(help="Cosine in --second below which they are not.")] = 0.6,
    share: Annotated[
        float | None,
        typer.Option(help="In place of both: this share of all pairs, the most alike, and the median of --second."),
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="The most pairs.")] = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
    seed: Seed = 0,
) -> None:
    """Mine pairs that --model takes for the same image and --second does not; score those with captions.

    The paper's thresholds are for CLIP and DINOv2 ViT-L/14. --per-item FILE.parquet keeps the pairs.
    """
    from eval.mined_pairs import MinedPairsEvaluator
    from vlkit.data.sources import read_source

    if share is not None and not 0 < share < 1:
        raise ConfigError(f"--share is {share}; expected a number within 0 and 1.")
    source = read_source(data, format=format, images=images, split=split)
    remark_on(source, split)
    other = source_of_features(second, shared.device, None, shared.no_cache)
    evaluator = MinedPairsEvaluator(
        source.records, other, above, below, share, most, shared.batch_size, shared.workers, seed
    )
    embedder = shared.source()
    with progress_bar("mine-pairs", "images") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    counts = evaluation.counts
    if not counts["mined_pairs"]:
        say("No pair passes both thresholds; --share chooses them by the data.")
    title = f"{counts['images']} images, {counts['mined_pairs']} pairs mined"
    shared.finish(evaluation, "mine-pairs", embedder, data, source, title, split)
