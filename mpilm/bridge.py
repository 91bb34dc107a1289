"""The single place where torch memory is seen as an array, and an array as a tensor.

Nothing is copied: both names point at the same bytes. NumPy has no bfloat16, so bf16 memory
is a uint16 array on that side and a bfloat16 tensor on this one. A GPU's arrays are CuPy's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `dtype` over the memory of `array`, which keeps the array alive."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array).view(dtype)
    return torch.from_dlpack(array).view(dtype)


def array(tensor: torch.Tensor) -> Any:
    """An array over the memory of a contiguous, detached tensor: NumPy's of a CPU, CuPy's of a GPU."""
    bits = torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype
    values = tensor.detach().view(bits)
    if values.device.type == "cpu":
        return values.numpy()
    import cupy

    return cupy.from_dlpack(values)


def rebased(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory of a CPU, with a storage that begins there: torch.compile compiles anew where a tensor begins
    elsewhere in its storage, and gives up after a few times."""
    return torch.from_numpy(array(tensor)).view(tensor.dtype)


def on_stream(device: str, pointer: Callable[[], int]) -> AbstractContextManager[Any]:
    """A block in which torch works, in this thread, on the stream that `pointer()` is CUDA's handle of."""
    if device == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer(), device=device))
