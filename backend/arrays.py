"""Memory: zeros, copies, and tensors side by side, which one kernel or one message serves all."""

import contextlib
import functools
import itertools
import math
import mmap
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import _to_np_dtype
from tinygrad.helpers import NUM_CPU_THREADS

MIN_SHARED_BYTES, MIN_HUGE_BYTES = 1 << 20, 1 << 18
ALIGNMENT = 16  # floats: a cache line, and the longest vector of a processor


def zeros(*shape: int) -> Tensor:
    """A buffer of float32 zeros; on the CPU of memory that is not touched before it is used."""
    if Device.DEFAULT.startswith("CPU"):
        array = aligned_zeros(math.prod(shape))
        tensor = Tensor.from_blob(array.ctypes.data, shape)
        tensor.uop.buffer.memory = array  # as long as there is the buffer
        return tensor
    return from_numpy(np.zeros(shape, np.float32))


def from_numpy(array: np.ndarray, device: str | None = None) -> Tensor:
    """A realised tensor with a copy of the array, made without tinygrad's scheduler, whose start
    alone takes a tenth of a second."""
    device, dtype = Device.canonicalize(device), getattr(dtypes, array.dtype.name)
    tensor = Tensor(UOp.new_buffer(device, array.size, dtype).reshape(array.shape))
    buffer = tensor.uop.base.buffer
    if device.startswith("CPU") and array.nbytes >= MIN_HUGE_BYTES and sys.platform == "linux":
        buffer.memory = huge_pages.take(array.nbytes)  # as long as there is the buffer
        buffer.allocate(external_ptr=buffer.memory.ctypes.data)
    else:
        buffer.allocate()
    copy_in(tensor, array)
    return tensor


@functools.cache
def address_of(function: int, device: str) -> Tensor:
    """A buffer that holds a function's address: unlike the code, it may change with each run."""
    return from_numpy(np.array([function], np.uint64), device)


class HugePages:
    """Memory for many arrays in pages of 2 MB: read up to twice as fast as in those of 4 kB, at
    whose ends a processor stops to read ahead. It is freed when the last of its arrays is."""

    SIZE, PAGE = 32 << 20, 2 << 20

    def __init__(self):
        self.left = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> np.ndarray:
        n_aligned = -(-n_bytes // 64) * 64
        if n_aligned > len(self.left):
            memory = mmap.mmap(
                -1, max(n_aligned, self.SIZE) + self.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            with contextlib.suppress(OSError):  # a Linux without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.left = np.frombuffer(memory, np.uint8)
            self.left = self.left[-self.left.ctypes.data % self.PAGE :]
        taken, self.left = self.left[:n_bytes], self.left[n_aligned:]
        return taken


huge_pages = HugePages()


def aligned_zeros(n: int) -> np.ndarray:
    padded = np.zeros(n + ALIGNMENT, np.float32)
    offset = -padded.ctypes.data // padded.itemsize % ALIGNMENT
    return padded[offset : offset + n]


def copy_in(tensor: Tensor, array: np.ndarray) -> None:
    """Copies an array into a realised tensor of its size, without tinygrad's scheduler, which takes
    longer than a token of a small model."""
    buffer = tensor.uop.base.buffer
    if not buffer.device.startswith("CPU"):
        array = np.ascontiguousarray(array)
        return buffer.allocator._copyin(buffer._buf, memoryview(array).cast("B"))
    memory, n_cores = as_numpy(tensor).reshape(array.shape), NUM_CPU_THREADS.value
    if array.nbytes < MIN_SHARED_BYTES:
        memory[...] = array
        return None
    parts = (np.array_split(x, n_cores) for x in (memory, array))
    with ThreadPoolExecutor(n_cores) as threads:
        list(threads.map(np.copyto, *parts))


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers of a realised tensor; on the CPU they are the tensor's own memory."""
    buffer = tensor.uop.base.buffer
    if not buffer.device.startswith("CPU"):
        return copy_out(tensor)
    memory = buffer.allocator._as_buffer(buffer._buf)
    return np.frombuffer(memory, _to_np_dtype(tensor.dtype), tensor.numel()).reshape(tensor.shape)


def copy_out(tensor: Tensor) -> np.ndarray:
    """A copy of a realised tensor's numbers."""
    array, buffer = np.empty(tensor.shape, _to_np_dtype(tensor.dtype)), tensor.uop.base.buffer
    buffer.allocator._copyout(memoryview(array).cast("B"), buffer._buf)
    return array


class Flat:
    """Float32 tensors of these shapes, 0 at first: `parts`, and `whole`, which is all of them.

    On the CPU `whole` is one tensor (n,) over the memory of the parts, of `array` if that is given;
    elsewhere, where not every backend has parts of a buffer, it is the parts. tinygrad does not
    know that they are the same: realise what is written to one before the other is read.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], array: np.ndarray | None = None):
        self.shapes = list(shapes)
        self.is_one = Device.DEFAULT.startswith("CPU")
        if not self.is_one:
            self.whole = self.parts
            return
        sizes = [padded_size(shape) for shape in self.shapes]
        self.array = aligned_zeros(sum(sizes)) if array is None else array
        padded = np.split(self.array, np.cumsum(sizes)[:-1])
        self.arrays = [
            array[: math.prod(shape)].reshape(shape)
            for array, shape in zip(padded, self.shapes, strict=True)
        ]
        self.whole = [Tensor.from_blob(self.array.ctypes.data, self.array.shape)]

    def like(self) -> "Flat":
        """Another one, laid out alike."""
        return Flat(self.shapes)

    @functools.cached_property
    def parts(self) -> list[Tensor]:
        if self.is_one:
            return [Tensor.from_blob(array.ctypes.data, array.shape) for array in self.arrays]
        return [zeros(*shape) for shape in self.shapes]

    def read(self) -> list[np.ndarray]:
        """The values of the parts; on the CPU not a copy."""
        return self.arrays if self.is_one else [copy_out(part) for part in self.parts]

    def write(self, parts: Iterable[np.ndarray]) -> None:
        for place, part in zip(self.arrays if self.is_one else self.parts, parts, strict=True):
            if self.is_one:
                place[...] = part
            else:
                copy_in(place, part.astype(np.float32, copy=False))

    def stack(self, whole: list[Tensor]) -> Tensor:
        """What is laid out as `whole`, of n parts of one shape -> (n, *shape)"""
        n, shape = len(self.shapes), self.shapes[0]
        if not self.is_one:
            return Tensor.stack(*whole)
        return whole[0].reshape(n, -1)[:, : math.prod(shape)].reshape(n, *shape)

    def unstack(self, stacked: Tensor) -> list[Tensor]:
        """The way back: (n, *shape) -> what is laid out as `whole`."""
        if not self.is_one:
            return [stacked[i] for i in range(len(self.shapes))]
        rows = stacked.flatten(1)
        return [rows.pad(((0, 0), (0, padded_size(self.shapes[0]) - rows.shape[1]))).flatten()]


class Groups(Flat):
    """A Flat in which some parts lie side by side: `groups` are Flats of these, `indices` says of
    which, and `whole` is the groups' wholes, one after the other."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], indices: Sequence[Sequence[int]]):
        self.shapes, self.indices = list(shapes), list(indices)
        self.is_one = Device.DEFAULT.startswith("CPU")
        of_groups = [[self.shapes[i] for i in group] for group in self.indices]
        arrays = [None] * len(of_groups)
        if self.is_one:
            sizes = [sum(map(padded_size, shapes)) for shapes in of_groups]
            self.array = aligned_zeros(sum(sizes))
            arrays = np.split(self.array, np.cumsum(sizes)[:-1])
        self.groups = [Flat(*each) for each in zip(of_groups, arrays, strict=True)]
        self.whole = [tensor for group in self.groups for tensor in group.whole]

    def like(self) -> "Groups":
        return Groups(self.shapes, self.indices)

    @functools.cached_property
    def parts(self) -> list[Tensor]:
        return self._in_order(group.parts for group in self.groups)

    @functools.cached_property
    def arrays(self) -> list[np.ndarray]:
        return self._in_order(group.arrays for group in self.groups)

    def _in_order(self, of_groups: Iterable[list]) -> list:
        """The groups' things in the order of the shapes."""
        numbered = zip(itertools.chain(*self.indices), itertools.chain(*of_groups), strict=True)
        return [thing for _, thing in sorted(numbered, key=lambda pair: pair[0])]


def padded_size(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
