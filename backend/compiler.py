"""The C compiler: `CC`, a clang on the PATH, or the one that the package ziglang carries."""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import mmap
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tinygrad.engine.worker as worker
from tinygrad import Device, helpers
from tinygrad.device import TinyELF
from tinygrad.engine.jit import CapturedJit
from tinygrad.helpers import PARALLEL
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

from backend.imports import ops_cpu

# Clang vectorises a sum only with leave to reorder it. -ffast-math as a whole would also take
# infinities and NaN for impossible. -O3 takes longer to compile, for code that is no faster.
FLAGS = (
    "-O2 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
FREESTANDING = "-c -x c -fPIC -ffreestanding -nostdlib -fno-ident"
# What tinygrad writes is C with clang's vectors.
PROBE = "typedef float f4 __attribute__((ext_vector_type(4))); f4 f(f4 x) { return x + x.wzyx; }"


class CPUCompiler(ClangCompiler):
    """tinygrad's ClangCompiler, with flags of our own and any clang that there is."""

    def __init__(self, arch: list[str]):
        super().__init__(arch)
        self.command = self.find()
        # tinygrad's cache of compiled kernels knows only their source
        key = hashlib.sha256(" ".join([*self.command, FLAGS]).encode()).hexdigest()[:16]
        self.cachekey = f"{self.cachekey}_{key}" if self.cachekey else None

    def compile(self, src: str) -> bytes:
        return self.call(self.command, src)

    def call(self, command: list[str], source: str) -> bytes:
        flags = f"{FREESTANDING} --target={self.arch}-none-unknown-elf {FLAGS} - -o -"
        command = [*command, *self.args, *flags.split()]
        run = subprocess.run(command, input=source.encode(), capture_output=True)
        if run.returncode:
            raise ValueError(f"{command[0]} does not compile: {run.stderr.decode()[:300]}")
        return run.stdout

    def find(self) -> list[str]:
        """The command of a working compiler: CC, a clang on the PATH, or ziglang's."""
        for command in (os.environ.get("CC"), shutil.which("clang")):
            try:
                if command:
                    self.call(words := shlex.split(command), PROBE)
                    return words
            except (OSError, ValueError):
                print(f"warning: {command} can't compile what tinygrad writes", file=sys.stderr)
        try:
            import ziglang
        except ImportError:
            reason = "no C compiler: pip install ziglang, or put a clang on the PATH"
            raise ValueError(reason) from None
        return [str(Path(ziglang.__file__).parent / "zig"), "clang"]


def compiled(source: str) -> ops_cpu.CPUProgram:
    """C of our own, loaded; its first function is at `addr` as long as there is the program."""
    device = Device["CPU"]
    code = device.renderer.compiler.compile_cached(source)
    return ops_cpu.CPUProgram(device, TinyELF(code, "", device.renderer.target, ()))


def can_fork() -> bool:
    """No GPU that is in use survives it."""
    is_process = not multiprocessing.current_process().daemon
    is_on_cpu = sys.platform == "linux" and Device.DEFAULT.startswith("CPU")
    return is_process and is_on_cpu and PARALLEL.value > 1


def begin_fork() -> None:
    """A process of ours that ends with the one it was forked from, whatever ends that."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py's handlers are for train.py, and
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # so is a Ctrl-C, though all processes get it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # a connection to tinygrad's cache must not be used on both sides, nor closed on this one
    begin_fork.connection, helpers._db_connection = helpers._db_connection, None


def forked(capture: Callable[[], None]) -> multiprocessing.Process | None:
    """A process that captures a jit, and runs nothing; None where no process can be forked."""
    if not can_fork():
        return None

    def work() -> None:
        begin_fork()
        forked_pool.cache_clear()
        Progress.mine = 1
        with contextlib.suppress(Exception), patch.object(CapturedJit, "__call__", lambda *_: None):
            capture()
        os._exit(0)  # with the processes that compile for it

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    atexit.register(process.kill)
    return process


@functools.cache
def forked_pool():
    pool = multiprocessing.get_context("fork").Pool(PARALLEL.value, start_worker)
    atexit.register(pool.terminate)
    return pool


def start_worker() -> None:
    begin_fork()
    worker._init_worker()


tinygrads_pool = worker.get_worker_pool


def compiling_processes():
    """The pool that compiles kernels, or None. tinygrad starts processes anew, which import all
    that this one has imported; forks have it."""
    if multiprocessing.current_process().daemon or PARALLEL.value < 2:
        return None
    return forked_pool() if can_fork() else tinygrads_pool()


class Progress:
    """A line on a terminal while kernels are compiled, here and in a fork; it goes away."""

    # for each of the two processes how many are compiled, and of how many
    counts = np.frombuffer(mmap.mmap(-1, 4 * 8), np.int64).reshape(2, 2)
    mine = 0

    def __init__(self, total: int, **_):
        if (self.counts[:, 0] == self.counts[:, 1]).all():
            self.counts[:] = 0
        self.counts[self.mine, 1] += total

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def set_description(self, _: str) -> None:
        pass

    def update(self, n: int) -> None:
        self.counts[self.mine, 0] += n
        if sys.stderr.isatty():
            done, total = self.counts.sum(0)
            print(f"\rcompiling {done}/{total}", end="", file=sys.stderr, flush=True)


def processor() -> str:
    """What tells this machine's processor from others that the same code may not run on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        telling = "model name", "flags", "CPU part", "Features"  # the latter two of Arm
        return " ".join(sorted({x for x in lines if x.startswith(telling)}))
    return platform.processor()
