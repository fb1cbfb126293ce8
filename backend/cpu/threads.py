"""All cores of a CPU: loops in chunks, and lists of kernels that a thread for each core runs."""

import contextlib
import ctypes
import functools
import math
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tinygrad import UOp
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.heuristic import hand_coded_optimizations
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import NUM_CPU_THREADS, PARALLEL, ContextVar
from tinygrad.renderer import Estimates
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import AxisType, Ops

from backend import machine
from backend.cpu.compiler import load_c

MIN_SHARED_WORK = 1 << 14  # element operations; with fewer, waking a core costs more than it gives
CHUNKS_PER_CORE = ContextVar("CHUNKS_PER_CORE", 4)  # chunks that it has not begun, others take
# of threads.c, which calls any kernel with as many arguments
MACROS = {"PARAMETERS": ", ".join(["word"] * 64)}
MACROS["ARGUMENTS"] = ", ".join(f"a[{i}]" for i in range(64))
FUTEX = 202 if platform.machine() == "x86_64" else 98  # the number of Linux's system call


def count_cores() -> None:
    """Sets how many there are for tinygrad, whose own count leaves out a container's share from
    Python 3.13 on; a number that the user gave stays."""
    if "NUM_CPU_THREADS" not in os.environ:
        for variable in (NUM_CPU_THREADS, PARALLEL):
            if variable.key not in os.environ:
                variable.value = min(variable.value, machine.n_cores())


class Kernel(Scheduler):
    """A kernel with chunks of unequal sizes, for which tinygrad can't estimate the operations."""

    def get_optimized_ast(self, name_override: str | None = None) -> UOp:
        ast = super().get_optimized_ast(name_override)
        return ast.replace(arg=replace(ast.arg, estimates=Estimates()))


def plain_loops(kernel: Scheduler) -> Scheduler:
    """Leaves loops to clang, where it compiles them: it vectorises them better than those that
    tinygrad has unrolled."""
    if not isinstance(kernel.ren, ClangRenderer):
        return hand_coded_optimizations(kernel)  # tinygrad's own
    kernel = Kernel(kernel.ast, kernel.ren)
    # A sum down the columns of a matrix: clang can't swap the loops, so sum a cache line of columns
    # at once, or fewer. Of more columns clang makes no vectors.
    for axis in columns_summed(kernel)[-1:]:
        width = max(n for n in (*range(1, 9), 16) if kernel.full_shape[axis] % n == 0)
        if width > 1:
            with contextlib.suppress(KernelOptError):
                kernel.apply_opt(Opt(OptOps.UPCAST, axis, width))

    sizes = [n if isinstance(n, int) else n.vmax for n in kernel.full_shape]
    if (work := math.prod(sizes)) >= MIN_SHARED_WORK:
        split_loop(kernel, work)
    return kernel


def split_loop(kernel, work: int) -> None:
    """Splits the loop over the axis that the cores share most evenly, of several the outermost."""
    independent = kernel._globalizable_rngs()  # the axes of the output
    ranges = [r for r in kernel.rngs if r in independent and r.src[0].op is Ops.CONST]
    if not ranges or NUM_CPU_THREADS.value == 1:
        return
    loop = max(ranges, key=lambda range_: evenness(range_.vmax + 1))
    per_core = min(CHUNKS_PER_CORE.value, 2 * work // MIN_SHARED_WORK // NUM_CPU_THREADS.value)
    _, first, size = chunk_of(loop.vmax + 1, next(kernel.opt_range), per_core=per_core)
    kernel.ast = kernel.ast.substitute({loop: loop.replace(src=(size,)) + first})


def evenness(n: int) -> float:
    """The share of the cores' time that is used when they divide n equal pieces of work."""
    n_cores = NUM_CPU_THREADS.value
    return n / (-(-n // n_cores) * n_cores)


def chunk_of(
    n: int, axis: int, work: int = MIN_SHARED_WORK, per_core: int = 1
) -> tuple[UOp, UOp, UOp]:
    """The range over chunks of a loop over n, and the first index and the size of a chunk; there is
    one chunk where all the work is little."""
    n_chunks = min(n, NUM_CPU_THREADS.value * max(1, per_core)) if work >= MIN_SHARED_WORK else 1
    chunk = UOp.range(n_chunks, axis, AxisType.THREAD)
    first, end = (x * n // n_chunks for x in (chunk, chunk + 1))
    return chunk, first.simplify(), (end - first).simplify()


def columns_summed(kernel) -> list[int]:
    """The axes along a row of the kernel's largest matrix, if it sums the matrix over the rows."""
    summed = kernel.ranges_of(AxisType.REDUCE)
    matrices = [
        buffer for buffer in kernel.bufs if any(r in buffer.src[1].get_idx().ranges for r in summed)
    ]
    if not matrices:
        return []
    index = max(matrices, key=lambda buffer: buffer.src[0].max_numel()).src[1].get_idx()
    steps_of_1 = list(index.split_uop(Ops.ADD))
    if any(range_ in steps_of_1 for range_ in summed):
        return []
    return [axis for axis in kernel.axes_of(AxisType.WEAK) if kernel.rngs[axis] in steps_of_1]


class CPUGraph(GraphRunner):
    """The kernels of a captured jit in the list that threads.c runs."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        words, self.n_chunks, self.input_words, self.variable_words = [], 0, {}, {}
        for number, (_, program, buffers, device_variables) in enumerate(self.calls):
            info = program.arg
            addresses = [buffer._buf.va_addr for buffer in buffers]
            values = [device_variables.get(variable.expr, 0) for variable in info.vars]
            chunk_variable = info.runtimevars.get("core_id")
            n_chunks = 1 if chunk_variable is None else info.global_size[0]
            self.n_chunks += n_chunks
            words += [self.runtimes[number].addr, n_chunks]
            words += [len(addresses) + (chunk_variable or 0), len(addresses) + len(values)]
            for position, i in self.uop_replace[number]:
                self.input_words[len(words) + position] = i
            for position, i in self.var_vals_replace.get(number, ()):
                self.variable_words[len(words) + len(addresses) + position] = self.vars[i]
            words += addresses + values
        self.words = (ctypes.c_uint64 * len(words))(*words)

    def __call__(self, input_uops, var_vals, wait=False) -> None:
        device = self.calls[0][2][0].device
        addresses = [uop.buffer.get_buf(device).va_addr for uop in input_uops]
        for word, i in self.input_words.items():
            self.words[word] = addresses[i]
        for word, name in self.variable_words.items():
            self.words[word] = var_vals[name]
        run_kernels(self.words, len(self.calls), self.n_chunks)


def run_kernels(words: ctypes.Array, n_kernels: int, n_chunks: int) -> None:
    """Runs the list on the caller's thread, which is number 0, and on a thread for each other core.
    A thread that comes late finds nothing to do, and is not waited for."""
    n_threads, (pool, function, call) = NUM_CPU_THREADS.value, thread_pool()
    state, is_taken = (ctypes.c_uint32 * 32)(), (ctypes.c_char * n_chunks)()
    for thread_id in reversed(range(n_threads)):
        arguments = words, n_kernels, thread_id, n_threads, state, is_taken, call, FUTEX
        pool.submit(function, *arguments) if thread_id else function(*arguments)


@functools.cache
def thread_pool(**macros: object) -> tuple[ThreadPoolExecutor, Callable, ctypes.c_void_p]:
    """Threads, what each of them calls, threads.c's function, and the call by which it waits."""
    word, pointer = ctypes.c_uint64, ctypes.c_void_p
    program = load_c("threads.c", **MACROS, **macros)
    arguments = pointer, word, word, word, pointer, pointer, pointer, word
    function = ctypes.CFUNCTYPE(None, *arguments)(program.addr)
    function.program = program  # which holds the code
    if sys.platform == "win32":  # whose threads let another one have the core
        call = ctypes.windll.kernel32.SwitchToThread
    else:
        libc = ctypes.CDLL(None)
        call = libc.syscall if sys.platform == "linux" else libc.sched_yield
    return ThreadPoolExecutor(NUM_CPU_THREADS.value, "core"), function, ctypes.cast(call, pointer)
