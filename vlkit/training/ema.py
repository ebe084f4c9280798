"""Averaged weights: an exponential moving average of the encoder, saved, resumed, evaluated and exported.

ema = Ema(encoder, decay=0.999)
ema.update(encoder)                     # after each step of the optimiser
with ema.in_place_of(encoder):          # the encoder has the averaged weights here
    evaluate(encoder)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlkit.training.sharded import load_whole, own_part


class Ema(nn.Module):
    """The average of an encoder's trained parameters, and a copy of what else changes (batch statistics).

    Its state dict holds both under the encoder's names. With parameters spread over processes each keeps its share.

    Args:
        encoder: the start of the average.
        decay: share of the old average that remains in each step, once the run is old enough.

    Source: Polyak and Juditsky 1992; as a moving average with this warmup in TensorFlow's
        ExponentialMovingAverage(num_updates): the decay of update n is min(decay, (1 + n) / (10 + n)), so that the
        start is forgotten quickly.
    """

    num_updates: Tensor

    def __init__(self, encoder: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._names: dict[str, str] = {}
        for name, value in _changing(encoder).items():
            own_name = name.replace(".", "/")  # a buffer's name has no dots
            self._names[name] = own_name
            self.register_buffer(own_name, value.detach().clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, encoder: nn.Module) -> None:
        """Move the average towards the encoder's weights of now."""
        self.num_updates += 1
        count = int(self.num_updates)
        weight = 1 - min(self.decay, (1 + count) / (10 + count))
        now = _changing(encoder)
        averaged = [name for name, value in now.items() if isinstance(value, nn.Parameter)]
        targets = [own_part(self._buffer(name)) for name in averaged]
        sources = [own_part(now[name].detach()) for name in averaged]
        if targets:
            torch._foreach_lerp_(targets, sources, weight)
        for name, value in now.items():
            if not isinstance(value, nn.Parameter):
                self._buffer(name).copy_(value)

    @contextmanager
    def in_place_of(self, encoder: nn.Module) -> Iterator[None]:
        """Exchange the encoder's weights with the averaged ones, and back at the end."""
        self._exchange(encoder)
        try:
            yield
        finally:
            self._exchange(encoder)

    @torch.no_grad()
    def _exchange(self, encoder: nn.Module) -> None:
        for name, value in _changing(encoder).items():
            mine, theirs = own_part(self._buffer(name)), own_part(value.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)

    def _buffer(self, name: str) -> Tensor:
        buffer: Tensor = getattr(self, self._names[name])
        return buffer

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # As torch does it, but into tensors that may be spread over processes.
        targets = {f"{prefix}{name}": value for name, value in self.named_buffers()}
        known = {name: state_dict[name] for name in targets if name in state_dict}
        load_whole({name: targets[name] for name in known}, known)
        _, _, missing, unexpected, _ = rest
        missing.extend(name for name in targets if name not in known)
        unexpected.extend(name for name in state_dict if name.startswith(prefix) and name not in targets)


def _changing(encoder: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained parameters, and buffers that are saved."""
    saved = encoder.state_dict(keep_vars=True)
    return {name: value for name, value in saved.items() if value.requires_grad or not isinstance(value, nn.Parameter)}
