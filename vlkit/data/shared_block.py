"""A block of memory that a process and its workers share, without a name and without a limit but the machine's.

On Linux it is an anonymous file (memfd): nothing is left behind however the processes end, and the 64 MB that
containers commonly give to /dev/shm do not matter. Elsewhere it is what multiprocessing offers.
"""

import mmap
import multiprocessing
import os
import weakref
from collections import deque
from collections.abc import Callable
from ctypes import c_uint8
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SharedBlock:
    """`tensor` is flat uint8. A block may be passed to a process when that is started, and only then."""

    def __init__(self, num_bytes: int, descriptor: int | None = None, array: Any = None):
        """Make a block; the last two arguments are for its arrival in another process."""
        self.num_bytes = num_bytes
        self._descriptor, self._array = descriptor, array
        if descriptor is None and array is None:
            if hasattr(os, "memfd_create"):
                self._descriptor = os.memfd_create("vlkit-batches")
                os.ftruncate(self._descriptor, num_bytes)
            else:
                self._array = multiprocessing.RawArray(c_uint8, num_bytes)
        buffer = self._array if self._descriptor is None else mmap.mmap(self._descriptor, num_bytes)
        self.tensor: Tensor = torch.frombuffer(buffer, dtype=torch.uint8)

    def __reduce__(self) -> tuple[Callable[..., "SharedBlock"], tuple[Any, ...]]:
        if self._descriptor is None:
            return SharedBlock, (self.num_bytes, None, self._array)
        return _arrive, (self.num_bytes, reduction.DupFd(self._descriptor))

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]  # the mapping stays until the tensor goes


def _arrive(num_bytes: int, descriptor: Any) -> SharedBlock:
    return SharedBlock(num_bytes, descriptor.detach())


class Slots:
    """Equal parts of a block, lent out as tensors that come back by themselves.

    A slot belongs to whoever took it, until `give_back`, or, after `lend`, until nobody refers to the tensor any
    more. So a batch can be handed over in the memory that the workers wrote, without a copy.
    """

    def __init__(self, memory: Tensor, count: int):
        """Cut `memory`, flat uint8, into `count` parts."""
        self.num_bytes = memory.numel() // count
        self._memory = memory.numpy()
        # Both are changed from any thread, wherever the last reference goes: only by single calls, which are atomic.
        self._free = deque(range(count))
        self._lent: set[int] = set()

    @property
    def num_lent(self) -> int:
        """Slots somebody still holds as a tensor."""
        return len(self._lent)

    def take(self) -> int:
        """The number of a free slot; there must be one."""
        return self._free.popleft()

    def give_back(self, slot: int) -> None:
        """Free a slot that was taken and not lent."""
        self._free.append(slot)

    def view(self, slot: int) -> Tensor:
        """The bytes of a slot, for as long as it is taken."""
        return torch.from_numpy(self._part(slot))

    def lend(self, slot: int) -> Tensor:
        """The bytes of a slot that is free again when this tensor and all its views are gone."""
        part = self._part(slot)
        self._lent.add(slot)
        # The tensor keeps this very array, so the array's end is the tensor's.
        weakref.finalize(part, self._come_back, slot).atexit = False
        return torch.from_numpy(part)

    def _part(self, slot: int) -> NDArray[np.uint8]:
        part: NDArray[np.uint8] = self._memory[slot * self.num_bytes : (slot + 1) * self.num_bytes]
        return part

    def _come_back(self, slot: int) -> None:
        self._lent.discard(slot)
        self._free.append(slot)
