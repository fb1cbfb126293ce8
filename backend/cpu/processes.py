"""Processes beside this one that compile kernels."""

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

import tinygrad.engine.worker as worker
from tinygrad import Device, UOp, helpers
from tinygrad.helpers import PARALLEL

from backend.cpu.compiler import ELF, CPUCompiler

PR_SET_PDEATHSIG = 1  # of Linux's prctl
N_PARTS = 3  # of all kernels, for each process: clang takes as long to start as to compile a kernel


def may_start() -> bool:
    """Processes, that is: those of a pool start none, and PARALLEL may forbid it."""
    return multiprocessing.parent_process() is None and PARALLEL.value > 1


def can_fork() -> bool:
    """No GPU that is in use survives it."""
    return may_start() and sys.platform == "linux" and Device.DEFAULT.startswith("CPU")


def begin_fork() -> None:
    """A process of ours that ends with the one it was forked from, whatever ends that."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py's handlers are for train.py, and
    for number in (signal.SIGINT, signal.SIGHUP):  # so is what a terminal sends all processes
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended before that
        os._exit(1)
    # a connection to tinygrad's cache must not be used on both sides, nor closed on this one
    begin_fork.connection, helpers._db_connection = helpers._db_connection, None


class CompilingPool:
    """What tinygrad asks of its pool. Its own would wait for ever for a process that is killed, and
    starts processes anew, which import all that this one has imported; forks have it."""

    def __init__(self):
        self.forks = can_fork()
        context = multiprocessing.get_context("fork") if self.forks else worker._WorkerContext()
        start = start_fork if self.forks else worker._init_worker
        self.executor = ProcessPoolExecutor(PARALLEL.value, context, start)

    def imap_unordered(self, compile_one: Callable, tasks: Iterable[tuple]) -> Iterator[tuple]:
        tasks = list(tasks)
        n = N_PARTS * PARALLEL.value
        left = {i: tasks[i::n] for i in range(min(n, len(tasks)))}
        compile_part = compile_together if self.forks else compile_each
        try:
            submit = functools.partial(self.executor.submit, compile_part, compile_one)
            places = {submit(part): i for i, part in left.items()}
            for future in as_completed(places):
                results = future.result()
                del left[places[future]]
                yield from results
        except BrokenProcessPool:  # the system has killed one: this process does what is left
            pool.cache_clear()
            for part in left.values():
                yield from compile_each(compile_one, part)
        except BaseException:  # Ctrl-C, say, and Python would wait for all that is to be done
            pool.cache_clear()
            self.executor.shutdown(wait=False, cancel_futures=True)
            raise


def compile_each(compile_one: Callable, tasks: list[tuple]) -> list[tuple[int, UOp]]:
    return [compile_one(task) for task in tasks]


def compile_together(compile_one: Callable, tasks: list[tuple]) -> list[tuple[int, UOp]]:
    """Kernels by tinygrad's function for one, but for clang, which compiles them together."""
    results = compile_each(compile_one, tasks)
    sources = [program.src[-1].arg for _, program in results]
    sources = {lib.decode() for lib in sources if not lib.startswith(ELF)}
    if not sources:
        return results
    libs = tasks[0][1][1].compiler.compile_together(sorted(sources))

    def finished(program: UOp) -> UOp:
        *rest, binary = program.src
        return program.replace(src=(*rest, binary.replace(arg=libs.get(binary.arg, binary.arg))))

    return [(number, finished(program)) for number, program in results]


def start_fork() -> None:
    begin_fork()
    worker._init_worker()
    CPUCompiler.compile_cached = CPUCompiler.cached_or_source  # for `compile_together`


pool = functools.cache(CompilingPool)


def compiling_processes() -> CompilingPool | None:
    """The pool that compiles kernels, or None."""
    return pool() if may_start() else None


class Progress:
    """A line on a terminal while kernels are compiled; it goes away."""

    def __init__(self, total: int, **_):
        self.n_done, self.total, self.is_shown = 0, total, sys.stderr.isatty()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def set_description(self, _: str) -> None:
        pass

    def update(self, n: int) -> None:
        self.n_done += n
        if self.is_shown:
            print(f"\rcompiling {self.n_done}/{self.total}", end="", file=sys.stderr, flush=True)
