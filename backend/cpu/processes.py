"""A pool of processes that compile kernels, and the progress bar meanwhile."""

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
from tinygrad import Context, Device, UOp, helpers
from tinygrad.helpers import PARALLEL

PR_SET_PDEATHSIG = 1  # of Linux's prctl
N_BATCHES = 3  # per process; one call of clang each, which starts as slowly as it compiles a kernel


def can_fork() -> bool:
    """Whether forks are safe: a GPU that is in use does not survive them."""
    return sys.platform == "linux" and Device.DEFAULT.startswith("CPU")


def init_fork() -> None:
    """Initialises a fork: it ignores the terminal's signals and dies with its parent."""
    worker._init_worker()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py's handlers are for train.py
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # the parent has died before prctl
        os._exit(1)
    # the fork must neither use nor close the parent's connection to tinygrad's cache
    init_fork.connection, helpers._db_connection = helpers._db_connection, None


class CompilingPool:
    """Replaces tinygrad's pool, which hangs if a process is killed, and starts processes that
    import everything again, in place of forks."""

    def __init__(self):
        self.forks = can_fork()
        context = multiprocessing.get_context("fork") if self.forks else worker._WorkerContext()
        start = init_fork if self.forks else worker._init_worker
        self.executor = ProcessPoolExecutor(PARALLEL.value, context, start)

    def imap_unordered(self, compile_one: Callable, tasks: Iterable[tuple]) -> Iterator[tuple]:
        tasks = list(tasks)
        n = min(N_BATCHES * PARALLEL.value, len(tasks))
        left = {i: tasks[i::n] for i in range(n)}  # batches, by number
        compile_batch = compile_together if self.forks else compile_each
        try:
            submit = functools.partial(self.executor.submit, compile_batch, compile_one)
            numbers = {submit(batch): i for i, batch in left.items()}
            for future in as_completed(numbers):
                results = future.result()
                del left[numbers[future]]
                yield from results
        except BrokenProcessPool:  # a process was killed: this one compiles the rest
            pool.cache_clear()
            for batch in left.values():
                yield from compile_each(compile_one, batch)
        except BaseException:  # Ctrl-C: without this Python would compile the rest before it ends
            pool.cache_clear()
            self.executor.shutdown(wait=False, cancel_futures=True)
            raise


def compile_each(compile_one: Callable, tasks: list[tuple]) -> list[tuple[int, UOp]]:
    return [compile_one(task) for task in tasks]


def compile_together(compile_one: Callable, tasks: list[tuple]) -> list[tuple[int, UOp]]:
    """Like compile_each, but clang compiles the kernels' C in one call."""
    with Context(RENDER_ONLY=1):
        results = compile_each(compile_one, tasks)
    # a program's sources end with its C and its object, which is empty if only the C is rendered
    missing = [program for _, program in results if not program.src[-1].arg]
    kernels = {program.src[-2].arg: program.arg.function_name for program in missing}
    objects = tasks[0][1][1].compiler.compile_together(kernels) if kernels else {}

    def compiled(program: UOp) -> UOp:
        *sources, binary = program.src
        code = binary.arg or objects[sources[-1].arg]
        return program.replace(src=(*sources, binary.replace(arg=code)))

    return [(number, compiled(program)) for number, program in results]


pool = functools.cache(CompilingPool)


def compiling_processes() -> CompilingPool | None:
    """The pool; None in its processes, which start no others, and with PARALLEL=0 or 1."""
    is_main = multiprocessing.parent_process() is None
    return pool() if is_main and PARALLEL.value > 1 else None


class CompilingBar(helpers.tqdm):
    """tinygrad's progress bar, on any terminal, without kernels' names, and erased at the end."""

    def __init__(self, total: int, **_):
        super().__init__(total=total, disable=None)

    def set_description(self, _: str) -> None:
        self.desc = "compiling: "

    def __exit__(self, *_) -> None:
        if not self.disable:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
