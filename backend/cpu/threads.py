"""All cores of a CPU: loops that they share, and lists of kernels that they run together."""

import ctypes
import functools
import math
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tinygrad import UOp
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import NUM_CPU_THREADS, PARALLEL, ContextVar
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import AxisType, Ops

from backend import machine
from backend.cpu.compiler import load_c

MIN_SHARED_WORK = 1 << 14  # element operations; with fewer, waking a core costs more than it gives
SHARES_EACH = ContextVar("SHARES_EACH", 4)  # of a core; what it has not begun, others can take
FUTEX = 202 if platform.machine() == "x86_64" else 98  # the number of Linux's system call


def count_cores() -> None:
    """Sets how many there are for tinygrad, whose own count leaves out a container's share from
    Python 3.13 on; a number that the user gave stays."""
    if "NUM_CPU_THREADS" not in os.environ:
        for variable in (NUM_CPU_THREADS, PARALLEL):
            if variable.key not in os.environ:
                variable.value = min(variable.value, machine.n_cores())


def largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


class Kernel(Scheduler):
    """A kernel whose cores may have unequal shares: tinygrad can't count what each computes."""

    def get_optimized_ast(self, name_override: str | None = None) -> UOp:
        ast = super().get_optimized_ast(name_override)
        return ast.replace(arg=replace(ast.arg, estimates=Estimates()))


def plain_loops(kernel: Scheduler) -> Kernel:
    """Leaves loops as they are: clang vectorises them better than tinygrad unrolls them."""
    kernel = Kernel(kernel.ast, kernel.ren)
    # A sum down the columns of a matrix: clang can't swap the loops, so sum 8 columns at once.
    for axis in columns_summed(kernel)[-1:]:
        width = largest_divisor(kernel.full_shape[axis], 8)
        if width > 1:
            try_optimization(kernel, Opt(OptOps.UPCAST, axis, width))

    sizes = [n if isinstance(n, int) else n.vmax for n in kernel.full_shape]
    if (work := math.prod(sizes)) >= MIN_SHARED_WORK:
        share(kernel, work)
    return kernel


def share(kernel, work: int) -> None:
    """Has the cores share the axis that is the most equal for them, of several the outermost."""
    may_be_shared = kernel._globalizable_rngs()  # those that what is stored has
    ranges = [r for r in kernel.rngs if r in may_be_shared and r.src[0].op is Ops.CONST]
    if not ranges or NUM_CPU_THREADS.value == 1:
        return
    shared = max(ranges, key=lambda range_: evenness(range_.vmax + 1))
    n_each = min(SHARES_EACH.value, 2 * work // MIN_SHARED_WORK // NUM_CPU_THREADS.value)
    _, first, size = share_of(shared.vmax + 1, next(kernel.opt_range), n_each=n_each)
    kernel.ast = kernel.ast.substitute({shared: shared.replace(src=(size,)) + first})


def evenness(n: int) -> float:
    """How much of the cores' time is used when they share n equal pieces of work."""
    n_cores = NUM_CPU_THREADS.value
    return n / (-(-n // n_cores) * n_cores)


def share_of(
    n: int, number: int, work: int = MIN_SHARED_WORK, n_each: int = 1
) -> tuple[UOp, UOp, UOp]:
    """The range of the shares, so many for each core, of n pieces of all the work, and for each
    share its first piece and how many."""
    n_shares = min(n, NUM_CPU_THREADS.value * max(1, n_each)) if work >= MIN_SHARED_WORK else 1
    share = UOp.range(n_shares, number, AxisType.THREAD)
    first, end = (x * n // n_shares for x in (share, share + 1))
    return share, first.simplify(), (end - first).simplify()


def columns_summed(kernel) -> list[int]:
    """The axes along the rows of the largest matrix, if the kernel sums it down its columns."""
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


def try_optimization(kernel, optimization: Opt) -> bool:
    try:
        kernel.apply_opt(optimization)
        return True
    except KernelOptError:
        return False


class CPUGraph(GraphRunner):
    """The kernels of a captured jit, one after the other, each on all cores."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        words, self.n_shares, self.input_words, self.variable_words = [], 0, {}, {}
        for number, (_, program, buffers, device_variables) in enumerate(self.calls):
            info = program.arg
            addresses = [buffer._buf.va_addr for buffer in buffers]
            values = [device_variables.get(variable.expr, 0) for variable in info.vars]
            core_variable = info.runtimevars.get("core_id")
            n_shares = 1 if core_variable is None else info.global_size[0]
            self.n_shares += n_shares
            words += [self.runtimes[number].addr, n_shares]
            words += [len(addresses) + (core_variable or 0), len(addresses) + len(values)]
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
        run_kernels(self.words, len(self.calls), self.n_shares)


def run_kernels(words: ctypes.Array, n_kernels: int, n_shares: int) -> None:
    """Runs the list on every core: a thread for each but the caller's, which takes part. One that
    comes late finds nothing to do, and nobody waits for it."""
    n_cores, (threads, run, call) = NUM_CPU_THREADS.value, on_all_cores()
    state, is_taken = (ctypes.c_uint32 * 32)(), (ctypes.c_char * n_shares)()
    for core in reversed(range(n_cores)):
        arguments = words, n_kernels, core, n_cores, state, is_taken, call, FUTEX
        threads.submit(run, *arguments) if core else run(*arguments)


@functools.cache
def on_all_cores() -> tuple[ThreadPoolExecutor, Callable, ctypes.c_void_p]:
    """The threads, the function that they call, and the one by which that waits and wakes."""
    source = Path(__file__).with_name("threads.c").read_text(encoding="utf-8")
    source = source.replace("PARAMETERS", ", ".join(["word"] * 64))
    source = source.replace("ARGUMENTS", ", ".join(f"a[{i}]" for i in range(64)))
    word, pointer, program = ctypes.c_uint64, ctypes.c_void_p, load_c(source)
    arguments = pointer, word, word, word, pointer, pointer, pointer, word
    run = ctypes.CFUNCTYPE(None, *arguments)(program.addr)
    run.program = program  # which holds the code
    call = ctypes.cast(machine.wait_call(), pointer)
    return ThreadPoolExecutor(NUM_CPU_THREADS.value, "core"), run, call
