"""A block of memory that a process and its workers share, without a name and without a limit but the machine's.

On Linux it is an anonymous file (memfd): nothing is left behind however the processes end, and the 64 MB that
containers commonly give to /dev/shm do not matter. Elsewhere it is what multiprocessing offers.
"""

import mmap
import multiprocessing
import os
from collections.abc import Callable
from ctypes import c_uint8
from multiprocessing import reduction
from typing import Any

import torch
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
