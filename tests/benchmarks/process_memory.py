"""Memory of a computation in this process; used by the benchmarks beside it.

    saved_bytes(lambda: loss(*inputs), inputs)          # what autograd keeps for backward
    peak_rise(lambda: loss(*inputs).backward())         # how far resident memory rises above what it was

Resident memory is read from /proc, so on Linux alone.
"""

import ctypes
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(compute: Callable[[], object], inputs: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps of a computation, those of the inputs left out."""
    given = {value.untyped_storage().data_ptr() for value in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = compute()
    del made
    return sum(kept.values())


def resident_bytes() -> int:
    """Of this process, after what was freed has been given back."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status_bytes("VmRSS")


def peak_rise(compute: Callable[[], object]) -> int:
    """Bytes by which resident memory rises at most above what it is now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = watch_peak()
    compute()
    return peak_bytes() - before


def watch_peak() -> int:
    """Forget the highest resident size so far; returns the present one."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The highest resident size since `watch_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
