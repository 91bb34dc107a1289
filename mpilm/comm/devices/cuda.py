"""A GPU: CuPy arrays. Whatever of CUDA is called of them is called here; with a CuPy for ROCm the same calls are HIP's.

Long-lived arrays are allocations of their own by cudaMalloc: what comes from a pool, or from torch's expandable
segments, other processes could not open. NumPy's functions that are given CuPy's arrays call CuPy's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mpilm.comm import arrays
from mpilm.comm.devices import _kernels
from mpilm.comm.devices._base import STREAMS, Array, Device, Signal
from mpilm.comm.devices._sums import NodeSum, places
from mpilm.comm.memory import SharedMemoryError
from mpilm.comm.order import BLOCK
from mpilm.log import UserError

ALLOCATION_BYTES = 2 * 2**20    # cudaMalloc puts smaller ones together, and opening one would open its neighbours
FP8_CAPABILITY = 89             # of NVIDIA's, 10 times the number
BLOCKS = 1024                   # of a grid whose threads go through a long array
APART = ("The ranks of a node can't open each other's GPU memory ({reason}). They must see each other's GPUs: srun "
         "--gpus-per-node=N --gpu-bind=none instead of --gpus-per-task; MIG instances never do.")


class Cuda(Device):
    """GPU number `index` of those that this process sees; it becomes the current one of the calling thread.

    Raises:
        UserError: There is no CuPy, or no such GPU.
    """

    grain: ClassVar[int] = 16

    def __init__(self, index: int) -> None:
        self.cupy = _cupy()
        self.index, self.torch, self.array = index, f"cuda:{index}", self.cupy.ndarray
        self._runtime = self.cupy.cuda.runtime
        self._device = self.cupy.cuda.Device(index)
        self._device.use()
        self._streams = {name: self.cupy.cuda.Stream(non_blocking=True) for name in STREAMS}
        self._squares = cache(lambda: self.cupy.RawKernel(_kernels.squares(), "squares"))

    def empty(self, count: int, dtype: npt.DTypeLike) -> Array:
        """As Device; from CuPy's pool."""
        return self.cupy.empty(count, dtype)

    def zeros(self, count: int, dtype: npt.DTypeLike) -> Array:
        """As Device."""
        wanted = max(1, count * np.dtype(dtype).itemsize)
        memory = self.cupy.cuda.Memory(-(-wanted // ALLOCATION_BYTES) * ALLOCATION_BYTES)
        array = self.cupy.ndarray((count,), dtype, self.cupy.cuda.MemoryPointer(memory, 0))
        array.fill(0)
        self.settle()
        return array

    def pinned(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """As Device."""
        memory = self.cupy.cuda.alloc_pinned_memory(max(1, count * np.dtype(dtype).itemsize))
        return np.frombuffer(memory, dtype, count)

    def to_host(self, source: Array, target: np.ndarray) -> None:
        """As Device."""
        if source.nbytes:
            source.data.copy_to_host_async(target.ctypes.data, source.nbytes)

    def to_device(self, source: np.ndarray, target: Array) -> None:
        """As Device."""
        if target.nbytes:
            target.data.copy_from_host_async(source.ctypes.data, target.nbytes)

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """As Device."""
        with self._device, self._streams[name]:
            yield

    def pointer(self) -> int:
        """CUDA's handle of the current stream, for torch."""
        return int(self.cupy.cuda.get_current_stream().ptr)

    def record(self) -> Any:
        """As Device."""
        return self._recorded(disable_timing=True)

    def stamp(self) -> Any:
        """As Device."""
        return self._recorded(disable_timing=False)

    def _recorded(self, *, disable_timing: bool) -> Any:
        event = self.cupy.cuda.Event(disable_timing=disable_timing)
        event.record(self.cupy.cuda.get_current_stream())
        return event

    def wait(self, event: Any) -> None:
        """As Device."""
        event.synchronize()

    def elapsed(self, first: Any, last: Any) -> float:
        """As Device."""
        last.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(first, last)) / 1000

    def happened(self, event: Any) -> bool:
        """As Device."""
        return bool(event.done)

    def follow(self, event: Any) -> None:
        """As Device."""
        if event is not None:
            self.cupy.cuda.get_current_stream().wait_event(event)

    def settle(self) -> None:
        """As Device."""
        self.cupy.cuda.get_current_stream().synchronize()

    def export(self, array: Array) -> Any:
        """As Device."""
        try:
            return self._runtime.ipcGetMemHandle(array.data.ptr)
        except self._runtime.CUDARuntimeError as error:
            raise SharedMemoryError(APART.format(reason=error)) from None

    def open(self, handle: Any, count: int, dtype: npt.DTypeLike) -> Array:
        """As Device."""
        try:
            pointer = self._runtime.ipcOpenMemHandle(handle, self._runtime.cudaIpcMemLazyEnablePeerAccess)
        except self._runtime.CUDARuntimeError as error:
            raise SharedMemoryError(APART.format(reason=error)) from None
        nbytes = count * np.dtype(dtype).itemsize
        memory = self.cupy.cuda.UnownedMemory(pointer, nbytes, None, self.index)
        return self.cupy.ndarray((count,), dtype, self.cupy.cuda.MemoryPointer(memory, 0))

    def close(self, array: Array) -> None:
        """As Device."""
        self._runtime.ipcCloseMemHandle(array.data.ptr)

    def signal(self) -> Signal | None:
        """As Device."""
        try:
            return CudaSignal(self)
        except self._runtime.CUDARuntimeError:
            return None

    def free_bytes(self) -> int:
        """As Device."""
        return int(self._device.mem_info[0])

    @property
    def uuid(self) -> str:
        """As Device; a MIG instance has one of its own."""
        found = self._properties().get("uuid", b"")
        return bytes(found).hex() or str(self._runtime.deviceGetPCIBusId(self.index))

    @property
    def title(self) -> str:
        """As Device."""
        name = self._properties()["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    @property
    def fp8(self) -> bool:
        """As Device."""
        return not self._runtime.is_hip and int(self._device.compute_capability) >= FP8_CAPABILITY

    def _properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = self._runtime.getDeviceProperties(self.index)
        return properties

    def local_sum(self, leaves: Sequence[range], *, first: int, size: int, mine: int) -> NodeSum:
        """As Device: one kernel."""
        return FusedSum(self, leaves, first=first, size=size, mine=mine)

    def squares(self, values: Array, out: Array) -> None:
        """As Device: one kernel, in float64."""
        assert len(values) == len(out) * BLOCK, f"{len(values)} values for {len(out)} blocks"
        if len(out):
            self._squares()((len(out),), (_kernels.THREADS,), (values, out))


class CudaSignal(Signal):
    """An event of CUDA's that processes share."""

    def __init__(self, device: Cuda) -> None:
        self.device = device
        self.event = device.cupy.cuda.Event(disable_timing=True, interprocess=True)
        self.handle = device.cupy.cuda.runtime.ipcGetEventHandle(self.event.ptr)
        self.opened: dict[Any, int] = {}

    def record(self) -> None:
        """As Signal."""
        self.event.record(self.device.cupy.cuda.get_current_stream())

    def follow(self, handle: Any, turn: int) -> None:
        """As Signal. An event stands for its latest recording; following one that came after `turn` is late, not wrong.
        """
        runtime = self.device.cupy.cuda.runtime
        if handle not in self.opened:
            self.opened[handle] = runtime.ipcOpenEventHandle(handle)
        runtime.streamWaitEvent(self.device.pointer(), self.opened[handle])


class FusedSum:
    """As LocalSum, by one kernel that reads every part once."""

    chunk_bytes = 1 << 40   # nothing is gained by pieces

    def __init__(self, device: Cuda, leaves: Sequence[range], *, first: int, size: int, mine: int) -> None:
        self.places = places(leaves, first=first, mine=mine)
        self.cupy, self.leaves, self.first, self.size = device.cupy, leaves, first, size
        self._kernel = cache(self._compile)

    def _compile(self, dtype: np.dtype, spread: bool) -> Any:
        outputs = [range(self.size)] if spread else [[place] for place in self.places]
        source = _kernels.sum_parts(str(dtype), self.leaves, first=self.first, size=self.size, outputs=outputs)
        return self.cupy.RawKernel(source, "sum_parts")

    def sum(self, parts: Sequence[Array], chunk: slice, *, spread: bool = False) -> None:
        """As NodeSum."""
        count = chunk.stop - chunk.start
        if count <= 0 or self.size == 1:    # one part is its own sum
            return
        values = [part[chunk] for part in parts]
        itemsize = parts[0].itemsize
        head = min(count, -arrays.address(values[0]) % _kernels.VECTOR_BYTES // itemsize)
        vectors = -(-count * itemsize // _kernels.VECTOR_BYTES)
        blocks = min(BLOCKS, -(-vectors // _kernels.THREADS))
        self._kernel(parts[0].dtype, spread)((blocks,), (_kernels.THREADS,),
                                             (*values, np.uint64(count), np.uint64(head)))


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise UserError(f"--run.device cuda needs CuPy ({error}): pip install cupy-cuda13x, or the package for your "
                        "version of CUDA or ROCm; or --run.device host.") from None
    return cupy
