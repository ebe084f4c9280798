"""Metrics take PyTorch tensors and NumPy arrays alike; they compute with tensors."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Tensor | NDArray[Any]


def as_tensor(values: Array) -> Tensor:
    """The values as a tensor: a tensor as it is, an array without a copy unless it is read-only."""
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    # PyTorch knows no read-only tensors, so features mapped from a file are copied.
    return torch.from_numpy(array if array.flags.writeable else array.copy())
