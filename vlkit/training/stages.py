"""Stages of a run with their own image size and text length, and the batches that follow from them.

    [[stages]]                  # most of the run on small images and short texts: cheap steps
    length = 0.8
    image_size = 112
    text_length = 16

    [[stages]]                  # the rest as the model will be used

The order of the samples does not depend on the stages. Position embeddings keep their full size and are resized to
the smaller grid in each forward, so that weights, checkpoints and evaluations have one shape throughout.

Source: Li et al. 2023, "An Inverse Scaling Law for CLIP Training", arXiv:2305.07017 (CLIPA), section 4.
Differs: CLIPA resizes the embeddings once, between two runs; the learning rate has one schedule over all stages.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from vlkit.config import RunConfig
from vlkit.contracts import ImageTextBatch
from vlkit.data.loader import Loader
from vlkit.data.randomness import raw
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder

# What `add_draws` puts beside the images of a batch.
PATCH_DRAWS = "patch_draws"


class Stage(NamedTuple):
    """Steps up to `end` with one size and length; None: the model's own."""

    end: int
    image_size: int | None
    text_length: int | None


def plan_stages(run: RunConfig, *, steps: int, steps_per_epoch: int) -> list[Stage]:
    """The stages of a run of so many steps; a single one when the run file names none.

    Raises:
        ConfigError: a stage that is empty, or begins after the end of the run.
    """
    stages: list[Stage] = []
    for number, stage in enumerate(run.stages):
        begin = stages[-1].end if stages else 0
        end = steps
        if stage.length is not None:
            size = run.data.global_batch_size
            end = begin + stage.length.in_steps(total=steps, steps_per_epoch=steps_per_epoch, batch_size=size)
        if not begin < end <= steps:
            raise ConfigError(
                f"stages.{number} would last from step {begin} to {end} of {steps}: each stage needs a step at least, "
                "and all together fit into the run. Change its length."
            )
        stages.append(Stage(end, stage.image_size, stage.text_length))
    return stages or [Stage(steps, None, None)]


def check_stages(stages: Sequence[Stage], encoder: DualEncoder, whole: DualEncoder | None = None) -> None:
    """Make the encoder take the image sizes of all stages.

    Args:
        whole: to be tried in place of an encoder whose weights are spread over processes.

    Raises:
        ConfigError: a size or length that this model does not take.
    """
    sizes = {stage.image_size for stage in stages if stage.image_size is not None}
    encoder.stage_sizes = frozenset(sizes)
    for size in sorted(sizes):
        try:
            _try_size(whole or encoder, size)
        except Exception as error:  # open_clip, timm and torch each raise their own
            raise ConfigError(
                f"stages: this model cannot take images of {size} pixels ({str(error).splitlines()[0]}). Take a "
                "multiple of its patch size, and a model whose image tower has no fixed grid (open_clip's ViT, a "
                "convolutional timm tower)."
            ) from error
    for length in (stage.text_length for stage in stages):
        if length is not None and length > encoder.context_length:
            raise ConfigError(f"stages: text_length = {length}, but this model takes {encoder.context_length} tokens.")


@torch.no_grad()
def _try_size(encoder: DualEncoder, size: int) -> None:
    """One forward; anything may be raised."""
    architecture = getattr(encoder, "architecture", None)
    if architecture is not None:
        architecture.with_changes(image_size=size)  # a size that is no multiple of the patch would lose pixels
    encoder.stage_sizes = encoder.stage_sizes | {size}
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            encoder.encode_image(torch.zeros(2, 3, size, size, dtype=torch.uint8, device=encoder.device))
    finally:
        for module, mode in modes:
            module.training = mode


def staged_batches(
    stages: Sequence[Stage],
    make_loader: Callable[[Stage], Loader],
    start: int,
    skipped: int = 0,
    close: Callable[[Loader], None] = lambda loader: None,
) -> Generator[ImageTextBatch, None, None]:
    """The batches from step `start` on, epoch after epoch without end, each stage from a loader of its own.

    Args:
        skipped: batches that were left out before that step.
        make_loader: called when a stage begins. All loaders have the same plan.
        close: called with the loader of a stage that is over.
    """
    step = start
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        if step >= stage.end and not last:
            continue
        loader = make_loader(stage)
        try:
            while last or step < stage.end:
                epoch, index = loader.plan.position(step + skipped)
                # Up to the end of the epoch, or of the stage.
                room = loader.num_batches - index if last else min(loader.num_batches - index, stage.end - step)
                for batch in _some(loader.epoch(epoch, start=index), room):
                    yield batch
                    step += 1
        finally:
            close(loader)


def _some(batches: Iterator[ImageTextBatch], count: int) -> Iterator[ImageTextBatch]:
    """The first ones; then, or when nobody asks for more, their workers are to stop."""
    try:
        yield from islice(batches, count)
    finally:
        if isinstance(batches, Generator):
            batches.close()


def add_draws(
    batches: Iterator[ImageTextBatch], *, seed: int, start: int, until: int, epoch_of: Callable[[int], int]
) -> Iterator[ImageTextBatch]:
    """Give each image the number that decides which of its patches remain, in the steps before `until`.

    Args:
        start: step of the first batch.
        epoch_of: step -> epoch.
    """
    for step, batch in enumerate(batches, start):
        if step >= until:
            yield batch
            continue
        epoch = epoch_of(step)
        drawn = [int(raw(seed, epoch, max(number, 0), "patch dropout", 1)[0]) for number in batch.ids.tolist()]
        draws = torch.tensor([value - 2**64 if value >= 2**63 else value for value in drawn])
        yield batch._replace(extra={**batch.extra, PATCH_DRAWS: draws})
