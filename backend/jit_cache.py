"""CachedJit jits, kept for the next start: what one start has compiled, the next one finds.

They are pickles. So they are read from the user's own cache folder alone, where no one else can
write, under a hash of all that they depend on; and whatever is wrong with one, it is made anew.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import tinygrad
from tinygrad import Context, Device, Tensor, TinyJit, UOp, Variable
from tinygrad.engine.jit import CapturedJit
from tinygrad.engine.realize import get_call_arg_uops, get_call_outs_ins
from tinygrad.helpers import ContextVar
from tinygrad.uop.ops import Ops

from backend import caches
from backend.cpu import native
from backend.cpu.blas import blas
from backend.cpu.compiler import processor
from backend.cpu.processes import forked, wait_for
from backend.machine import cache_folder

KEPT_BYTES = 128 << 20  # of files of up to a few MB each
LOCK = ".lock"
FIRST_PLACE = 10_000  # numbers of the places of the state's buffers: those of arguments are small


class CachedJit:
    """A function as a jit that is captured at its first call, or read from the cache folder.

    It takes realised tensors, always of the same shapes, and by name numbers, each of its `values`,
    and returns nothing. `state` is all that it reads and writes beside them, realised; `key` tells
    it from other functions with such a state.
    """

    def __init__(self, function: Callable, state: Sequence[Tensor], key: object, **values: range):
        self.jit, self.values = TinyJit(function), values
        self.jit.cnt = 1  # else it would call it plainly once, which only unrealised state needs
        self.path, self.process, device = None, None, state[0].device
        if device.startswith("CPU"):  # where it is tested
            self.state = [tensor.uop.base for tensor in state]
            shapes = [(buffer.shape, buffer.dtype, buffer.device) for buffer in self.state]
            name = fingerprint(function.__qualname__, key, values, shapes)
            self.path = cache_folder() / "gpt-tiny" / name
            self.restore()

    def restore(self) -> None:
        with contextlib.suppress(Exception):  # to begin with: there is none
            kept = pickle.loads(caches.unsealed(read_private(self.path)))
            self.jit.captured = restored(kept, self.state)
            os.utime(self.path)  # those that are used stay

    def begin(self, *tensors: Tensor, **numbers: int) -> None:
        """Captures it in another process, for whose file the first call waits: two jits that are
        captured at once keep all cores at work."""
        if self.path and self.jit.captured is None:
            self.process = forked(functools.partial(self.capture, *tensors, **numbers))

    def __call__(self, *tensors: Tensor, **numbers: int) -> None:
        if self.process:
            wait_for(self.process)
            self.process = self.restore()
        if self.jit.captured is None:
            self.capture(*tensors, **numbers)
        else:  # called as such: TinyJit looks for changes in all arguments
            self.jit.captured([tensor.uop.base for tensor in tensors], numbers)

    def capture(self, *tensors: Tensor, **numbers: int) -> None:
        """Runs it, and captures it; or, if another worker does, waits and takes that one's."""
        if not self.path:
            return self.capture_alone(*tensors, **numbers)
        with alone(self.path):
            self.restore()
            if self.jit.captured is None:
                self.capture_alone(*tensors, **numbers)
                with contextlib.suppress(Exception):  # a full disk, say: nothing is lost but time
                    keep(self.path, self.jit.captured, self.state)
                return
        self(*tensors, **numbers)

    def capture_alone(self, *tensors: Tensor, **numbers: int) -> None:
        variables = {
            name: Variable(name, self.values[name][0], self.values[name][-1]).bind(number)
            for name, number in numbers.items()
        }
        # tinygrad need not check its own graphs, nor cut them into parts for a core
        with Context(SPEC=0, **({"JIT_BATCH_SIZE": 0} if self.path else {})):
            self.jit(*tensors, **variables)


def alone(path: Path) -> AbstractContextManager[None]:
    """For one process at a time, where files can be locked."""
    return caches.file_lock(path.with_suffix(LOCK))


def places(buffers: Sequence[UOp]) -> dict[UOp, UOp]:
    """What stands for the buffers in a file. A buffer's own identity is a number, which in another
    process may be another buffer's."""
    numbers = range(FIRST_PLACE, FIRST_PLACE + len(buffers))
    return {
        buffer: UOp.param(number, buffer.dtype, buffer.shape, buffer.device)
        for buffer, number in zip(buffers, numbers, strict=True)
    }


def keep(path: Path, jit: CapturedJit, state: list[UOp]) -> None:
    """Writes a jit, with placeholders for the buffers of the state, for the addresses of functions,
    which are kept by name, and for its own buffers, without content."""
    others = [u for u in jit._linear.toposort() if u.op is Ops.BUFFER and u not in state]
    functions = [u for u in others if u in native.names]
    own = [u for u in others if u not in native.names]
    if any(buffer in own for buffer in read_first(jit._linear)):
        return  # it needs content that was made while it was captured
    stand_ins = places([*state, *functions, *own])
    linear = jit._linear.substitute(stand_ins, walk=True, enter_calls=True)
    expected = jit.expected_names, jit.expected_input_info
    called = [(native.names[buffer], buffer.device) for buffer in functions]
    sizes = [(buffer.device, buffer.max_numel(), buffer.dtype) for buffer in own]
    data = pickle.dumps((linear, expected, called, sizes))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "xb", opener=lambda *name: os.open(*name, 0o600)) as file:
        file.write(caches.sealed(data))
    temporary.replace(path)
    drop_oldest(path.parent)


def drop_oldest(folder: Path) -> None:
    """Leaves the files that were used last, KEPT_BYTES of them."""
    jits = [path for path in folder.iterdir() if path.suffix != LOCK]
    caches.drop_oldest(jits, KEPT_BYTES, Path.unlink)


def restored(kept: tuple, state: list[UOp]) -> CapturedJit:
    linear, expected, called, sizes = kept
    functions = (native.address_of(*arguments).uop.base for arguments in called)
    buffers = [*state, *functions, *(UOp.new_buffer(*size) for size in sizes)]
    back = {place: buffer for buffer, place in places(buffers).items()}
    jit = CapturedJit(None, linear.substitute(back, walk=True, enter_calls=True), *expected)
    jit._written_uops = set()  # of the arguments; tinygrad would go through all kernels for them
    return jit


def read_first(linear: UOp) -> Iterator[UOp]:
    """The buffers that are read as a whole before anything is written to them."""
    written = set()
    for kernel in kernels_of(linear):
        arguments = get_call_arg_uops(kernel)
        outs, ins = get_call_outs_ins(kernel)
        yield from (arguments[i] for i in ins if arguments[i] not in written)
        written.update(arguments[i] for i in outs)


def kernels_of(linear: UOp) -> Iterator[UOp]:
    """The calls of kernels in a jit, one by one, also of those that a graph runs."""
    for call in linear.src:
        is_graph = call.src[0].op is Ops.CUSTOM_FUNCTION
        yield from call.src[0].src[0].src if is_graph else (call,)


def source_files() -> list[Path]:
    """The program's, Python and C: beside this package, and in the packages there."""
    root = Path(__file__).parents[1]
    kinds = ".py", ".c"
    rooms = (*root.glob("*/__init__.py"), *root.glob("*/*/__init__.py"))
    folders = [root, *(path.parent for path in rooms)]
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in kinds)


@functools.cache
def sources() -> str:
    """A hash of the program."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in source_files())).hexdigest()


@functools.cache
def tinygrads_sources() -> list[tuple]:
    paths = sorted(Path(tinygrad.__file__).parent.rglob("*.py"))
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def fingerprint(*parts: object) -> str:
    """A hash of the parts and of all else that a captured jit depends on."""
    parts += (
        sources(),
        tinygrads_sources(),
        [(name, repr(variable.value)) for name, variable in sorted(ContextVar._cache.items())],
        Device["CPU"].renderer.compiler.cachekey,
        blas() and blas().integer,  # another numpy, another BLAS
        (sys.version, platform.platform(), processor()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_private(path: Path) -> bytes:
    """A file's bytes; PermissionError if anyone but the user could have written it."""
    if sys.platform == "win32":  # a user's own folders are closed to others there
        return path.read_bytes()
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        for status in (os.fstat(file.fileno()), os.stat(path.parent)):
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(f"{path} is not the user's alone")
        return file.read()
