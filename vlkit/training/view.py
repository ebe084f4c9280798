"""The encoder as evaluations and the end of a run see it: whole, in eval mode.

While FSDP spreads the weights over processes, only the encoder's `forward` may be called, and by all processes at
once. A twin that is whole takes the weights over and answers to everything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlkit.config import RunConfig
from vlkit.models.dual_encoder import DualEncoder
from vlkit.training import assemble
from vlkit.training.assemble import Learner
from vlkit.training.sharded import whole


class View:
    """What `Every` entries get in place of the encoder that is trained.

    Args:
        learner: `twin` is there when its encoder is sharded.
    """

    def __init__(self, learner: Learner, run: RunConfig) -> None:
        self._learner, self._run = learner, run
        self.ema = learner.ema

    @contextmanager
    def lend_averaged(self) -> Iterator[DualEncoder]:
        """The same with the averaged weights of now."""
        assert self.ema is not None
        with self.ema.in_place_of(self._learner.encoder), self.lend() as encoder:
            yield encoder

    @contextmanager
    def lend(self) -> Iterator[DualEncoder]:
        """The encoder with the weights of now, until the block ends. All processes call this alike."""
        encoder, twin = self._learner.encoder, self._learner.twin
        if twin is None:
            encoder.eval()
            try:
                yield encoder
            finally:
                assemble.train_mode(encoder, self._run)
            return
        targets = twin.weights()
        with torch.no_grad():
            for name, value in encoder.weights().items():
                targets[name].copy_(whole(value))
        try:
            yield twin.to(encoder.device).eval()
        finally:
            twin.to("cpu")
