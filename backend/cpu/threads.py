"""All cores of a CPU: loops in chunks, and lists of kernels that run on one thread per core."""

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
from tinygrad.helpers import NUM_CPU_THREADS, PARALLEL, ContextVar, round_up
from tinygrad.renderer import Estimates
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import AxisType, Ops, to_max_shape

from backend import machine
from backend.cpu.compiler import load_c

MIN_SHARED_WORK = 1 << 14  # element operations below which waking a core costs more than it saves
CHUNKS_PER_CORE = ContextVar("CHUNKS_PER_CORE", 4)  # more than 1, so that idle cores can take some
# of threads.c: kernels are called with 64 arguments, and ignore the surplus
MACROS = {"PARAMETERS": ", ".join(["word"] * 64)}
MACROS["ARGUMENTS"] = ", ".join(f"a[{i}]" for i in range(64))
FUTEX = 202 if platform.machine() == "x86_64" else 98  # Linux's number of the system call


def set_core_counts() -> None:
    """Sets tinygrad's numbers of threads and processes, unless the user has. From Python 3.13 on,
    tinygrad overlooks a container's limit."""
    if "NUM_CPU_THREADS" not in os.environ:
        for variable in (NUM_CPU_THREADS, PARALLEL):
            if variable.key not in os.environ:
                variable.value = min(variable.value, machine.n_cores())


class Kernel(Scheduler):
    """A kernel without estimates: tinygrad can't estimate chunks of unequal sizes."""

    def get_optimized_ast(self, name_override: str | None = None) -> UOp:
        ast = super().get_optimized_ast(name_override)
        return ast.replace(arg=replace(ast.arg, estimates=Estimates()))


def plain_loops(kernel: Scheduler) -> Scheduler:
    """Leaves loops to clang, which vectorises plain loops better than unrolled ones."""
    if not isinstance(kernel.ren, ClangRenderer):
        return hand_coded_optimizations(kernel)  # tinygrad's own
    kernel = Kernel(kernel.ast, kernel.ren)
    # Sums down the columns of a matrix: clang can't swap the loops, so sum a cache line of columns
    # at once, or fewer; clang does not vectorise more.
    for axis in columns_summed(kernel)[-1:]:
        width = max(n for n in (*range(1, 9), 16) if kernel.full_shape[axis] % n == 0)
        if width > 1:
            with contextlib.suppress(KernelOptError):
                kernel.apply_opt(Opt(OptOps.UPCAST, axis, width))

    if (work := math.prod(to_max_shape(kernel.full_shape))) >= MIN_SHARED_WORK:
        split_loop(kernel, work)
    return kernel


def split_loop(kernel, work: int) -> None:
    """Splits the loop that divides most evenly among the cores, the outermost of equals."""
    output_ranges = kernel._globalizable_rngs()
    ranges = [r for r in kernel.rngs if r in output_ranges and r.src[0].op is Ops.CONST]
    if not ranges or NUM_CPU_THREADS.value == 1:
        return
    loop = max(ranges, key=lambda range_: evenness(range_.vmax + 1))
    per_core = min(CHUNKS_PER_CORE.value, 2 * work // MIN_SHARED_WORK // NUM_CPU_THREADS.value)
    _, first, size = chunk_of(loop.vmax + 1, next(kernel.opt_range), per_core=per_core)
    kernel.ast = kernel.ast.substitute({loop: loop.replace(src=(size,)) + first})


def evenness(n: int) -> float:
    """The utilisation of the cores, 0 to 1, when they divide n equal tasks."""
    return n / round_up(n, NUM_CPU_THREADS.value)


def chunk_of(
    n: int, axis: int, work: int = MIN_SHARED_WORK, per_core: int = 1
) -> tuple[UOp, UOp, UOp]:
    """The range over the chunks of a loop of n, and the first index and the size of a chunk. Below
    MIN_SHARED_WORK there is one chunk."""
    n_chunks = min(n, NUM_CPU_THREADS.value * max(1, per_core)) if work >= MIN_SHARED_WORK else 1
    chunk = UOp.range(n_chunks, axis, AxisType.THREAD)
    first, end = (x * n // n_chunks for x in (chunk, chunk + 1))
    return chunk, first.simplify(), (end - first).simplify()


def columns_summed(kernel) -> list[int]:
    """The axes along a row of the kernel's largest operand, if the kernel sums it over its rows."""
    summed = kernel.ranges_of(AxisType.REDUCE)
    operands = [
        buffer for buffer in kernel.bufs if any(r in buffer.src[1].get_idx().ranges for r in summed)
    ]
    if not operands:
        return []
    index = max(operands, key=lambda buffer: buffer.src[0].max_numel()).src[1].get_idx()
    contiguous = list(index.split_uop(Ops.ADD))  # ranges with a stride of 1 among them
    if any(range_ in contiguous for range_ in summed):
        return []
    return [axis for axis in kernel.axes_of(AxisType.WEAK) if kernel.rngs[axis] in contiguous]


class CPUGraph(GraphRunner):
    """Runs the kernels of a captured jit by threads.c, from a list of its structs `Kernel`."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        # input_words and variable_words: index in the list -> number of an input, or a variable
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
    """Runs the list on the caller's thread, number 0, and on one thread for each other core. The
    caller does not wait for a thread that starts late, which finds nothing left to do."""
    n_threads, (pool, function, call) = NUM_CPU_THREADS.value, thread_pool()
    state, is_taken = (ctypes.c_uint32 * 32)(), (ctypes.c_char * n_chunks)()
    for thread_id in reversed(range(n_threads)):
        arguments = words, n_kernels, thread_id, n_threads, state, is_taken, call, FUTEX
        pool.submit(function, *arguments) if thread_id else function(*arguments)


@functools.cache
def thread_pool(**macros: object) -> tuple[ThreadPoolExecutor, Callable, ctypes.c_void_p]:
    """The threads, run_kernels of threads.c, and the system's function by which a thread waits."""
    word, pointer = ctypes.c_uint64, ctypes.c_void_p
    program = load_c("threads.c", "run_kernels", **MACROS, **macros)
    arguments = pointer, word, word, word, pointer, pointer, pointer, word
    function = ctypes.CFUNCTYPE(None, *arguments)(program.addr)
    function.program = program  # keeps the code in memory
    if sys.platform == "win32":  # no futex: threads yield the core
        call = ctypes.windll.kernel32.SwitchToThread
    else:
        libc = ctypes.CDLL(None)
        call = libc.syscall if sys.platform == "linux" else libc.sched_yield
    return ThreadPoolExecutor(NUM_CPU_THREADS.value, "core"), function, ctypes.cast(call, pointer)
