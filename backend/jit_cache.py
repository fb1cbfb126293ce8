"""Captured jits on disk, with compiled kernels, for the next start.

The files are pickles, read only from a cache folder where nobody else can write. The name of a file
is a hash of everything that the jit depends on. A damaged file is made anew.
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
from backend.cpu.compiler import processor, sealed, start_c, unsealed
from backend.cpu.native import blas
from backend.cpu.threads import MACROS
from backend.machine import CACHE

KEPT_BYTES = 128 << 20  # of files of up to a few MB each
FOLDER, LOCK = CACHE / "gpt-tiny", ".lock"
FIRST_PLACEHOLDER = 10_000  # tinygrad numbers the arguments of a jit from 0


class CachedJit:
    """A TinyJit that is captured at its first call, or restored from the cache folder.

    The function takes realised tensors of fixed shapes, and by name integers within the ranges in
    `variables`; it returns nothing. `buffers` are all other tensors that it reads or writes,
    realised. `key` tells functions of one name apart that have buffers of the same shapes.
    """

    def __init__(
        self, function: Callable, buffers: Sequence[Tensor], key: object, **variables: range
    ):
        self.jit, self.variables = TinyJit(function), variables
        self.jit.cnt = 1  # TinyJit's first call, which realises state, is not needed
        self.path, device = None, buffers[0].device
        if device.startswith("CPU"):  # the only backend where kept jits are tested
            self.buffers = [tensor.uop.base for tensor in buffers]
            shapes = [(buffer.shape, buffer.dtype, buffer.device) for buffer in self.buffers]
            name = fingerprint(function.__qualname__, key, variables, shapes)
            self.path = FOLDER / name
            self.restore()

    def restore(self) -> None:
        with contextlib.suppress(Exception):  # no file, or a damaged one
            self.jit.captured = load(self.path, self.buffers)
            os.utime(self.path)  # `drop_oldest` drops the least recently used

    def __call__(self, *tensors: Tensor, **numbers: int) -> None:
        if self.jit.captured is None:
            self.capture(*tensors, **numbers)
        else:  # not through TinyJit, which compares all arguments
            self.jit.captured([tensor.uop.base for tensor in tensors], numbers)

    def capture(self, *tensors: Tensor, **numbers: int) -> None:
        """Runs and captures the function, or restores the jit that another process captures."""
        if not self.path:
            return self.run_and_capture(*tensors, **numbers)
        with locked(self.path):
            self.restore()
            if self.jit.captured is None:
                self.run_and_capture(*tensors, **numbers)
                with contextlib.suppress(Exception):  # a full disk, say: the next start is slower
                    save(self.path, self.jit.captured, self.buffers)
                return
        self(*tensors, **numbers)

    def run_and_capture(self, *tensors: Tensor, **numbers: int) -> None:
        if self.path:
            start_c("threads.c", **MACROS)
        variables = {
            name: Variable(name, self.variables[name][0], self.variables[name][-1]).bind(number)
            for name, number in numbers.items()
        }
        # tinygrad neither checks its own graphs nor splits them into batches of kernels
        with Context(SPEC=0, **({"JIT_BATCH_SIZE": 0} if self.path else {})):
            self.jit(*tensors, **variables)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock of a jit's file; goes on without in a folder that can't be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(files.locked(path.with_suffix(LOCK), wait=True))
        yield


def placeholders(buffers: Sequence[UOp]) -> dict[UOp, UOp]:
    """The parameter in a file for each buffer: a buffer's own number may be taken in the process
    that loads the file."""
    return {
        buffer: UOp.param(number, buffer.dtype, buffer.shape, buffer.device)
        for number, buffer in enumerate(buffers, FIRST_PLACEHOLDER)
    }


def save(path: Path, jit: CapturedJit, buffers: list[UOp]) -> None:
    """Writes a jit with placeholders for `buffers`, for addresses of C functions, with the names of
    these, and for temporary buffers, with their sizes."""
    internal = [u for u in jit._linear.toposort() if u.op is Ops.BUFFER and u not in buffers]
    addresses = [u for u in internal if u in native.names]
    temporaries = [u for u in internal if u not in native.names]
    if any(buffer in temporaries for buffer in read_first(jit._linear)):
        return  # the jit reads content that was made while it was captured
    replaced = placeholders([*buffers, *addresses, *temporaries])
    linear = jit._linear.substitute(replaced, walk=True, enter_calls=True)
    expected = jit.expected_names, jit.expected_input_info
    functions = [(native.names[buffer], buffer.device) for buffer in addresses]
    sizes = [(buffer.device, buffer.max_numel(), buffer.dtype) for buffer in temporaries]
    data = pickle.dumps((linear, expected, functions, sizes))
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "xb", opener=lambda *name: os.open(*name, 0o600)) as file:
        file.write(sealed(data))
    temporary.replace(path)
    drop_oldest(path.parent)


def drop_oldest(folder: Path) -> None:
    """Deletes the least recently used jits beyond KEPT_BYTES."""
    jits = [path for path in folder.iterdir() if path.suffix != LOCK]
    files.drop_oldest(jits, KEPT_BYTES, Path.unlink)


def load(path: Path, buffers: list[UOp]) -> CapturedJit:
    linear, expected, functions, sizes = pickle.loads(unsealed(read_private(path)))
    addresses = (native.address_of(*function).uop.base for function in functions)
    buffers = [*buffers, *addresses, *(UOp.new_buffer(*size) for size in sizes)]
    back = {placeholder: buffer for buffer, placeholder in placeholders(buffers).items()}
    jit = CapturedJit(None, linear.substitute(back, walk=True, enter_calls=True), *expected)
    jit._written_uops = set()  # no argument is written; tinygrad would search all kernels
    return jit


def read_first(linear: UOp) -> Iterator[UOp]:
    """The buffers that a kernel reads before any kernel writes to them."""
    written = set()
    for call in linear.src:
        is_graph = call.src[0].op is Ops.CUSTOM_FUNCTION
        for kernel in call.src[0].src[0].src if is_graph else (call,):
            arguments = get_call_arg_uops(kernel)
            outs, ins = get_call_outs_ins(kernel)
            yield from (arguments[i] for i in ins if arguments[i] not in written)
            written.update(arguments[i] for i in outs)


def source_files() -> list[Path]:
    """The program's source in Python and C, in all its packages."""
    root = Path(__file__).parents[1]
    kinds = ".py", ".c"
    rooms = (*root.glob("*/__init__.py"), *root.glob("*/*/__init__.py"))
    folders = [root, *(path.parent for path in rooms)]
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in kinds)


@functools.cache
def sources() -> tuple[bytes, list[tuple]]:
    """A hash of the program's source, and the sizes and times of tinygrad's files."""
    ours = hashlib.sha256(b"\0".join(path.read_bytes() for path in source_files())).digest()
    paths = sorted(Path(tinygrad.__file__).parent.rglob("*.py"))
    return ours, [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def fingerprint(*parts: object) -> str:
    """A hash of the parts and of all else that a captured jit depends on."""
    parts += (
        sources(),
        [(name, repr(variable.value)) for name, variable in sorted(ContextVar._cache.items())],
        Device["CPU"].renderer.compiler.cachekey,
        blas() and blas().integer,  # differs between builds of numpy
        (sys.version, platform.platform(), processor(), native.may_use_tiles()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_private(path: Path) -> bytes:
    """A file's bytes; PermissionError if another user could have written it."""
    if sys.platform == "win32":  # a user's folders are closed to others
        return path.read_bytes()
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        for status in (os.fstat(file.fileno()), os.stat(path.parent)):
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(f"{path} is not the user's alone")
        return file.read()
