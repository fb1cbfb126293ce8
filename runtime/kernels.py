"""What tinygrad renders as a program of C: its kernels, the calls of these, and what they read."""

import re
from collections.abc import Iterable

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer

from backend.arrays import as_numpy
from backend.cpu import native
from backend.rendered import Call

ALIGNMENT = 64  # bytes


class Kernels:
    """The kernels of calls, and where each of their buffers is.

    The given weights are in a file, those in half precision first, so that places among these can
    be counted in numbers; all else is in memory.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self.file: list[np.ndarray] = []
        self.n_file_bytes = self.n_halves = self.n_memory_bytes = 0
        self.names: dict[str, str] = {}  # of functions, by their source
        self.places: dict[Buffer, int] = {}  # in memory
        self.arguments: dict[Buffer, str] = {}  # in C, of what is not in memory
        for weight in sorted(weights, key=lambda weight: weight.dtype != dtypes.half):
            place, is_half = self.add(as_numpy(weight)), weight.dtype == dtypes.half
            argument = f"HALF({place // 2})" if is_half else f"WEIGHT({place})"
            self.arguments[weight.uop.base.buffer] = argument
            self.n_halves = self.n_file_bytes // 2 if is_half else self.n_halves

    def add(self, array: np.ndarray) -> int:
        """Puts an array at the end of the file; its place there, in bytes."""
        place = self.n_file_bytes
        self.file.append(array)
        self.n_file_bytes += round_up(array.nbytes)
        return place

    def place_of(self, tensor: Tensor) -> int:
        """Where a tensor's buffer is in memory, in bytes."""
        return self.places[tensor.uop.base.buffer]

    def argument(self, buffer: Buffer, offset: int) -> str:
        if buffer in self.arguments:
            return self.arguments[buffer]
        if buffer not in self.places:
            self.places[buffer] = self.n_memory_bytes
            self.n_memory_bytes += round_up(buffer.nbytes)
        return f"MEMORY({self.places[buffer] + offset})"

    def calls(self, calls: Iterable[Call]) -> str:
        """These calls in C, of macros that steps.c defines."""
        lines = []
        for function, name in native.names.items():
            self.arguments[function.buffer] = f"FUNCTION({name})"
        for call in calls:
            name = self.names.setdefault(call.source, f"k{len(self.names)}_{call.name}")
            buffers = (self.argument(*buffer) for buffer in call.buffers)
            lines.append(f"CALL({call.n_chunks}, {name}({', '.join([*buffers, *call.variables])}))")
        return "\n".join(lines)

    def source(self) -> str:
        """The kernels in C. tinygrad's `long` has 64 bits, and C's has not everywhere."""
        functions = (
            re.sub(r"\bvoid \w+\(", f"KERNEL {name}(", source, count=1)
            for source, name in self.names.items()
        )
        return re.sub(r"\blong\b", "long long", "".join(functions))

    def write(self, file) -> None:
        for array in self.file:
            data = np.ascontiguousarray(array)
            file.write(data.data)
            file.write(bytes(round_up(data.nbytes) - data.nbytes))


def round_up(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
