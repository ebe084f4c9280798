"""A teacher made of what the student was in the last epochs: the mean over a window that grows with the training.

    teacher = LocalMean({"vectors": vectors}, epochs=50)
    teacher.add(0)                # after the first epoch
    teacher.values()["vectors"]   # mean over the last 2 of those added; over the last 9 at the end

Early on the window is short, because values of long ago have learned nothing; later it is long, so that the teacher
lags behind a student that begins to fit its few images too well.
"""

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

SHORTEST, LONGEST = 2, 9


class LocalMean:
    """Mean of what is learned over the last epochs.

    Args:
        found: changed in place by the training.
        epochs: of the whole training.
    """

    def __init__(self, found: Mapping[str, Tensor], epochs: int) -> None:
        self.found, self.epochs = found, epochs
        self._past: deque[dict[str, Tensor]] = deque(maxlen=LONGEST)
        self._window = SHORTEST

    def add(self, epoch: int) -> None:
        """The values after an epoch, from 0."""
        self._window = window(epoch, self.epochs)
        self._past.append({name: value.detach().clone() for name, value in self.found.items()})

    def values(self) -> dict[str, Tensor]:
        """The teacher's; empty before the first epoch is over."""
        last = list(self._past)[-self._window :]
        if not last:
            return {}
        return {name: torch.stack([one[name] for one in last]).mean(0) for name in self.found}


def window(epoch: int, epochs: int) -> int:
    """Epochs that count after one of them, from 0: half a cosine from 2 at the first to 9 at the last."""
    share = epoch / max(epochs - 1, 1)
    return math.floor(SHORTEST + (LONGEST - SHORTEST) * 0.5 * (1 - math.cos(math.pi * share)))
