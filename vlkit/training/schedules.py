"""Learning rates as pure functions of the step.

    schedule = make_schedule(settings, steps=1000, steps_per_epoch=40, batch_size=256)
    schedule(0), schedule(500)

"cosine" falls along half a cosine from the end of the warmup to the end of the run. "wsd" (warmup, stable, decay)
stays at the top and falls in the last part of the run, so that a run can be prolonged from any checkpoint before
that. "constant" stays at the top.
"""

import math
from collections.abc import Callable
from typing import Literal

from vlkit.config import OptimSettings

Kind = Literal["cosine", "wsd", "constant"]


def learning_rate(
    step: int, *, steps: int, warmup: int, peak: float, end: float = 0.0, kind: Kind = "cosine", decay: int = 0
) -> float:
    """The learning rate of one step.

    It rises linearly over the first `warmup` steps, from peak/warmup in step 0 to `peak` in step warmup - 1. Then it
    stays ("constant"), falls along half a cosine which would reach `end` in step `steps` ("cosine"), or stays up to
    the last `decay` steps and falls there in proportion to one minus the square root of what is done of them ("wsd").

    Source: cosine: open_clip 3.3.0, open_clip_train.scheduler.cosine_lr. wsd: Haegele et al. 2024, "Scaling Laws and
        Compute-Optimal Training Beyond Fixed Training Durations", arXiv:2405.18392, equation 1 with the 1-sqrt form.
    Differs: both end at `end`, not always at zero.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    if kind == "wsd":
        begin = max(steps - decay, warmup)
        progress = min(max(step - begin, 0) / max(steps - begin, 1), 1.0)
        return end + (peak - end) * (1 - math.sqrt(progress))
    assert kind == "cosine", kind
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def make_schedule(
    settings: OptimSettings, *, steps: int, steps_per_epoch: int, batch_size: int
) -> Callable[[int], float]:
    """The learning rate of a run as a function of the step."""
    warmup, decay = (
        part.in_steps(total=steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
        for part in (settings.warmup, settings.decay)
    )

    def schedule(step: int) -> float:
        return learning_rate(
            step,
            steps=steps,
            warmup=warmup,
            peak=settings.lr,
            end=settings.min_lr,
            kind=settings.schedule,
            decay=decay,
        )

    return schedule
