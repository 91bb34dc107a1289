"""The single place where torch memory is seen as an array, and an array as a tensor.

Nothing is copied: both names point at the same bytes. NumPy has no bfloat16, so bf16 memory
is a uint16 array on that side and a bfloat16 tensor on this one.
"""

from __future__ import annotations

import numpy as np
import torch

_BITS = {torch.bfloat16: np.uint16, torch.float32: np.float32, torch.float64: np.float64}


def array_dtype(dtype: torch.dtype) -> np.dtype:
    """The NumPy dtype whose array holds tensors of `dtype`.

    Raises:
        TypeError: For a dtype that parameters are never kept in.
    """
    if dtype not in _BITS:
        raise TypeError(f"parameters are kept in {', '.join(map(str, _BITS))}, not {dtype}")
    return np.dtype(_BITS[dtype])


def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `dtype` over the memory of `array`, which keeps the array alive."""
    return torch.from_numpy(array).view(dtype)


def array(tensor: torch.Tensor) -> np.ndarray:
    """An array over the memory of a contiguous, detached CPU tensor."""
    bits = torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype
    return tensor.detach().view(bits).numpy()
