"""Memory: zeros, copies between numpy and tensors, and tensors side by side in one buffer."""

import contextlib
import functools
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, takewhile

import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.device import BufferSpec
from tinygrad.dtype import _to_np_dtype
from tinygrad.helpers import NUM_CPU_THREADS, round_up
from tinygrad.runtime.support.hcq import HCQBuffer, MMIOInterface

from backend.cpu.compiler import ops_cpu

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by name
MIN_SHARED_BYTES = 1 << 20  # copied by several cores
MIN_HUGE_BYTES, HUGE_PAGE = 1 << 18, 2 << 20
ALIGNMENT = 16  # floats: a cache line, and the longest vector of a processor


def zeros(*shape: int) -> Tensor:
    """A realised tensor of float32 zeros; on the CPU the system allocates pages at first use."""
    if Device.DEFAULT.startswith("CPU"):
        return tensor_over(aligned_zeros(math.prod(shape)).reshape(shape))
    return from_numpy(np.zeros(shape, np.float32))


def from_numpy(array: np.ndarray, device: str | None = None) -> Tensor:
    """A realised tensor with a copy of the array, without tinygrad's scheduler, which takes a tenth
    of a second to start."""
    tensor = allocate(array, Device.canonicalize(device))
    copy_in(tensor, array)
    return tensor


def tensor_over(array: np.ndarray) -> Tensor:
    """A realised tensor on the CPU that shares the array's memory."""
    return allocate(array, "CPU", array)


def allocate(array: np.ndarray, device: str, memory: np.ndarray | None = None) -> Tensor:
    """A tensor of the array's shape and type, in the given memory or in new memory."""
    uop = UOp.new_buffer(device, array.size, getattr(dtypes, array.dtype.name))
    uop.buffer.memory = memory  # kept alive with the buffer
    uop.buffer.allocate(external_ptr=None if memory is None else memory.ctypes.data)
    return Tensor(uop.reshape(array.shape))


class CPUAllocator(ops_cpu.CPUAllocator):
    """Allocates large buffers in pages of 2 MB, up to twice as fast to read as tinygrad's pages of
    4 kB: a processor prefetches up to the end of a page."""

    left = np.empty(0, np.uint8)  # unused bytes of the last mapping; its last buffer frees it

    def _alloc(self, size: int, options: BufferSpec) -> HCQBuffer:
        if options.external_ptr is not None or size < MIN_HUGE_BYTES or sys.platform != "linux":
            return super()._alloc(size, options)
        n_aligned = round_up(size, 64)
        if n_aligned > len(self.left):
            n_bytes = max(n_aligned, 16 * HUGE_PAGE) + HUGE_PAGE
            memory = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a Linux without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.left = np.frombuffer(memory, np.uint8)
            self.left = self.left[-self.left.ctypes.data % HUGE_PAGE :]
        taken, self.left = self.left[:size], self.left[n_aligned:]
        address, view = taken.ctypes.data, MMIOInterface(taken.ctypes.data, size, fmt="B")
        return HCQBuffer(address, size, meta=taken, view=view, owner=self.dev)


def aligned_zeros(n: int) -> np.ndarray:
    padded = np.zeros(n + ALIGNMENT, np.float32)
    offset = -padded.ctypes.data // padded.itemsize % ALIGNMENT
    return padded[offset : offset + n]


def copy_in(tensor: Tensor, array: np.ndarray) -> None:
    """Copies an array into a realised tensor of the same size, without tinygrad's scheduler, which
    takes longer than a token of a small model."""
    buffer = tensor.uop.base.buffer
    if not buffer.device.startswith("CPU"):
        buffer.allocator._copyin(buffer._buf, memoryview(np.ascontiguousarray(array)).cast("B"))
        return
    memory, n_cores = as_numpy(tensor).reshape(array.shape), NUM_CPU_THREADS.value
    if array.nbytes < MIN_SHARED_BYTES:
        memory[...] = array
        return
    parts = (np.array_split(x, n_cores) for x in (memory, array))
    with ThreadPoolExecutor(n_cores) as threads:
        list(threads.map(np.copyto, *parts))


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A realised tensor as an array; on the CPU without a copy."""
    buffer = tensor.uop.base.buffer
    if not buffer.device.startswith("CPU"):
        return copy_out(tensor)
    memory = buffer.allocator._as_buffer(buffer._buf)
    return np.frombuffer(memory, _to_np_dtype(tensor.dtype), tensor.numel()).reshape(tensor.shape)


def copy_out(tensor: Tensor) -> np.ndarray:
    """A realised tensor as a new array."""
    array, buffer = np.empty(tensor.shape, _to_np_dtype(tensor.dtype)), tensor.uop.base.buffer
    buffer.allocator._copyout(memoryview(array).cast("B"), buffer._buf)
    return array


class FlatBuffer:
    """Float32 tensors by name, side by side in memory in the order of `shapes`, initially 0.

    `views` are the tensors by name, `whole` lists one tensor (n,) over all views on the CPU, or the
    views elsewhere, since not every backend has views of a buffer. tinygrad does not know that
    views and whole share memory: realise a write to one before reading the other.
    """

    def __init__(self, shapes: Shapes):
        self.shapes, self.parent, self.parts = dict(shapes), None, {}
        size = sum(map(padded_size, self.shapes.values()))
        self.memory = aligned_zeros(size) if Device.DEFAULT.startswith("CPU") else None

    @functools.cached_property
    def views(self) -> dict[str, Tensor]:
        if self.parent:
            return {name: self.parent.views[name] for name in self.shapes}
        if self.memory is None:
            return {name: zeros(*shape) for name, shape in self.shapes.items()}
        ends = list(accumulate(map(padded_size, self.shapes.values())))
        pieces = zip(np.split(self.memory, ends[:-1]), self.shapes.values(), strict=True)
        views = (tensor_over(piece[: math.prod(shape)].reshape(shape)) for piece, shape in pieces)
        return dict(zip(self.shapes, views, strict=True))

    @functools.cached_property
    def whole(self) -> list[Tensor]:
        return list(self.views.values()) if self.memory is None else [tensor_over(self.memory)]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors over this memory, for the buffers of a jit."""
        if self.memory is None:
            return self.whole
        parts = (tensor for part in self.parts.values() for tensor in part.whole)
        return [*self.whole, *self.views.values(), *parts]

    def part(self, names: Iterable[str]) -> "FlatBuffer":
        """The tensors of consecutive names as a FlatBuffer over the same memory."""
        names = tuple(names)
        if names not in self.parts:
            part = self.parts[names] = FlatBuffer({name: self.shapes[name] for name in names})
            part.parent, before = self, takewhile(lambda name: name != names[0], self.shapes)
            start = sum(padded_size(self.shapes[name]) for name in before)
            if self.memory is not None:
                part.memory = self.memory[start : start + len(part.memory)]
        return self.parts[names]

    def read(self) -> dict[str, np.ndarray]:
        """The views as arrays; on the CPU without a copy."""
        return {name: as_numpy(view) for name, view in self.views.items()}

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copies arrays into the views of the same names."""
        for name, view in self.views.items():
            copy_in(view, arrays[name].astype(np.float32, copy=False))

    def apply_in_place(self, function: Callable[[np.ndarray], object]) -> None:
        """Calls the function with one array (n,) of all numbers, which are changed in place."""
        if self.memory is not None:
            function(self.memory)
            return
        message = np.concatenate([array.ravel() for array in self.read().values()])
        function(message)
        ends = np.cumsum([view.numel() for view in self.whole])
        self.write(dict(zip(self.shapes, np.split(message, ends[:-1]), strict=True)))

    def stack(self, whole: list[Tensor]) -> Tensor:
        """Tensors laid out as `whole`, of n views with one shape -> (n, *shape)"""
        n, shape = len(self.shapes), next(iter(self.shapes.values()))
        if self.memory is None:
            return Tensor.stack(*whole)
        return whole[0].reshape(n, -1)[:, : math.prod(shape)].reshape(n, *shape)

    def unstack(self, stacked: Tensor) -> list[Tensor]:
        """The inverse of `stack`: (n, *shape) -> tensors laid out as `whole`."""
        if self.memory is None:
            return [stacked[i] for i in range(stacked.shape[0])]
        rows = stacked.flatten(1)
        padding = padded_size(stacked.shape[1:]) - rows.shape[1]
        return [rows.pad(((0, 0), (0, padding))).flatten()]


def padded_size(shape: tuple[int, ...]) -> int:
    return round_up(math.prod(shape), ALIGNMENT)
