"""Jits that are captured once, and kept for the next start with all that was compiled for them.

The files are pickles: they are read from the user's own cache folder alone, where no one else can
write. A file's name is a hash of all that the jit depends on. A file with any fault is made anew.
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
from pathlib import Path

import tinygrad
from tinygrad import Context, Device, Tensor, TinyJit, UOp, Variable
from tinygrad.engine.jit import CapturedJit
from tinygrad.engine.realize import get_call_arg_uops, get_call_outs_ins
from tinygrad.helpers import ContextVar
from tinygrad.uop.ops import Ops

from backend import files
from backend.cpu import native
from backend.cpu.compiler import begin_c, processor, sealed, unsealed
from backend.cpu.native import blas
from backend.cpu.threads import MACROS
from backend.machine import CACHE

KEPT_BYTES = 128 << 20  # of files of up to a few MB each
FOLDER, LOCK = CACHE / "gpt-tiny", ".lock"
FIRST_PLACEHOLDER = 10_000  # tinygrad numbers the arguments of a jit from 0


class CachedJit:
    """A TinyJit that is captured at its first call, or restored from the cache folder.

    The function takes realised tensors, always of the same shapes, and by name integers, each from
    the range in `variables`; it returns nothing. `buffers` are all other tensors that it reads or
    writes, realised. `key` tells it from functions of its name with buffers of these shapes.
    """

    def __init__(
        self, function: Callable, buffers: Sequence[Tensor], key: object, **variables: range
    ):
        self.jit, self.variables = TinyJit(function), variables
        self.jit.cnt = 1  # else it would call it plainly once, which only unrealised state needs
        self.path, device = None, buffers[0].device
        if device.startswith("CPU"):  # where it is tested
            self.buffers = [tensor.uop.base for tensor in buffers]
            shapes = [(buffer.shape, buffer.dtype, buffer.device) for buffer in self.buffers]
            name = fingerprint(function.__qualname__, key, variables, shapes)
            self.path = FOLDER / name
            self.restore()

    def restore(self) -> None:
        with contextlib.suppress(Exception):  # to begin with: there is none
            kept = pickle.loads(unsealed(read_private(self.path)))
            self.jit.captured = restored(kept, self.buffers)
            os.utime(self.path)  # those that are used stay

    def __call__(self, *tensors: Tensor, **numbers: int) -> None:
        if self.jit.captured is None:
            self.capture(*tensors, **numbers)
        else:  # called as such: TinyJit looks for changes in all arguments
            self.jit.captured([tensor.uop.base for tensor in tensors], numbers)

    def capture(self, *tensors: Tensor, **numbers: int) -> None:
        """Runs it, which captures it; or restores what another process captures meanwhile."""
        if not self.path:
            return self.run_and_capture(*tensors, **numbers)
        with alone(self.path):
            self.restore()
            if self.jit.captured is None:
                self.run_and_capture(*tensors, **numbers)
                with contextlib.suppress(Exception):  # a full disk, say: nothing is lost but time
                    keep(self.path, self.jit.captured, self.buffers)
                return
        self(*tensors, **numbers)

    def run_and_capture(self, *tensors: Tensor, **numbers: int) -> None:
        if self.path:
            begin_c("threads.c", **MACROS)
        variables = {
            name: Variable(name, self.variables[name][0], self.variables[name][-1]).bind(number)
            for name, number in numbers.items()
        }
        # tinygrad need not check its own graphs, nor split them into batches of kernels
        with Context(SPEC=0, **({"JIT_BATCH_SIZE": 0} if self.path else {})):
            self.jit(*tensors, **variables)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """For one process at a time, where files can be locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(files.locked(path.with_suffix(LOCK), wait=True))
        yield


def placeholders(buffers: Sequence[UOp]) -> dict[UOp, UOp]:
    """Parameters that stand for the buffers in a file: the number that identifies a buffer may be
    another buffer's in another process."""
    return {
        buffer: UOp.param(number, buffer.dtype, buffer.shape, buffer.device)
        for number, buffer in enumerate(buffers, FIRST_PLACEHOLDER)
    }


def keep(path: Path, jit: CapturedJit, buffers: list[UOp]) -> None:
    """Writes a jit, with placeholders for the buffers that it was given, for the addresses of
    functions, which are kept by name, and for its own buffers, which are kept without content."""
    others = [u for u in jit._linear.toposort() if u.op is Ops.BUFFER and u not in buffers]
    functions = [u for u in others if u in native.names]
    own = [u for u in others if u not in native.names]
    if any(buffer in own for buffer in read_first(jit._linear)):
        return  # it needs content that was made while it was captured
    replaced = placeholders([*buffers, *functions, *own])
    linear = jit._linear.substitute(replaced, walk=True, enter_calls=True)
    expected = jit.expected_names, jit.expected_input_info
    called = [(native.names[buffer], buffer.device) for buffer in functions]
    sizes = [(buffer.device, buffer.max_numel(), buffer.dtype) for buffer in own]
    data = pickle.dumps((linear, expected, called, sizes))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "xb", opener=lambda *name: os.open(*name, 0o600)) as file:
        file.write(sealed(data))
    temporary.replace(path)
    drop_oldest(path.parent)


def drop_oldest(folder: Path) -> None:
    """Leaves the files that were used last, KEPT_BYTES of them."""
    jits = [path for path in folder.iterdir() if path.suffix != LOCK]
    files.drop_oldest(jits, KEPT_BYTES, Path.unlink)


def restored(kept: tuple, buffers: list[UOp]) -> CapturedJit:
    linear, expected, called, sizes = kept
    functions = (native.address_of(*arguments).uop.base for arguments in called)
    buffers = [*buffers, *functions, *(UOp.new_buffer(*size) for size in sizes)]
    back = {placeholder: buffer for buffer, placeholder in placeholders(buffers).items()}
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
        (sys.version, platform.platform(), processor(), native.may_use_tiles()),
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
