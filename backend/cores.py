"""All cores of a CPU: loops that they share, and lists of kernels that they run together."""

import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tinygrad import UOp
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import NUM_CPU_THREADS
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import AxisType, Ops

from backend.compiler import compiled

MIN_SHARED_WORK = 1 << 14  # element operations; with fewer, waking a core costs more than it gives


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
    if math.prod(sizes) >= MIN_SHARED_WORK:
        share(kernel)
    return kernel


def share(kernel) -> None:
    """Has the cores share the axis that is the most equal for them, of several the outermost."""
    may_be_shared = kernel._globalizable_rngs()  # those that what is stored has
    ranges = [r for r in kernel.rngs if r in may_be_shared and r.src[0].op is Ops.CONST]
    if not ranges or NUM_CPU_THREADS.value == 1:
        return
    shared = max(ranges, key=lambda range_: evenness(range_.vmax + 1))
    _, first, size = share_of(shared.vmax + 1, next(kernel.opt_range))
    kernel.ast = kernel.ast.substitute({shared: shared.replace(src=(size,)) + first})


def evenness(n: int) -> float:
    """How much of the cores' time is used when they share n equal pieces of work."""
    n_cores = NUM_CPU_THREADS.value
    return n / (-(-n // n_cores) * n_cores)


def share_of(n: int, number: int, work: int = MIN_SHARED_WORK) -> tuple[UOp, UOp, UOp]:
    """The range of the cores that share n pieces of all the work, and for each its first piece and
    how many."""
    n_cores = min(n, NUM_CPU_THREADS.value) if work >= MIN_SHARED_WORK else 1
    core = UOp.range(n_cores, number, AxisType.THREAD)
    first, end = (c * n // n_cores for c in (core, core + 1))
    return core, first.simplify(), (end - first).simplify()


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


# Of each kernel, `words` holds its address, in how many shares it comes, which of its arguments is
# the number of the share, how many arguments it has, and these. Every core runs the whole list.
RUN_KERNELS = """
typedef unsigned long long word;
typedef void kernel_8(word, word, word, word, word, word, word, word);
typedef void kernel_64(PARAMETERS);
void run_kernels(word *words, word n_kernels, word core, word n_cores, word *arrived,
                 int (*yield)(void)) {
  for (word i = 1; i <= n_kernels; i++) {
    word kernel = words[0], n_sharing = words[1], share_argument = words[2], n = words[3], a[64];
    words += 4;
    for (word share = core; share < n_sharing; share += n_cores) {
      for (word j = 0; j < n; j++) a[j] = words[j];
      if (n_sharing > 1) a[share_argument] = share;
      if (n <= 8) ((kernel_8 *)kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
      else ((kernel_64 *)kernel)(ARGUMENTS);
    }
    words += n;
    __atomic_fetch_add(arrived, 1, __ATOMIC_ACQ_REL);
    for (word spins = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < i * n_cores; spins++)
      if (spins > 10000) yield();
  }
}
"""
RUN_KERNELS = RUN_KERNELS.replace("PARAMETERS", ", ".join(["word"] * 64))
RUN_KERNELS = RUN_KERNELS.replace("ARGUMENTS", ", ".join(f"a[{i}]" for i in range(64)))


class CPUGraph(GraphRunner):
    """The kernels of a captured jit, one after the other, each on all cores."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        words, self.input_words, self.variable_words = [], {}, {}
        for number, (_, program, buffers, device_variables) in enumerate(self.calls):
            info = program.arg
            addresses = [buffer._buf.va_addr for buffer in buffers]
            values = [device_variables.get(variable.expr, 0) for variable in info.vars]
            core_variable = info.runtimevars.get("core_id")
            n_sharing = 1 if core_variable is None else info.global_size[0]
            words += [self.runtimes[number].addr, n_sharing]
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
        run_kernels(self.words, len(self.calls))


def run_kernels(words: ctypes.Array, n_kernels: int) -> None:
    """Runs the list on every core: a thread for each but the caller's, which takes part."""
    n_cores, arrived = NUM_CPU_THREADS.value, ctypes.c_uint64(0)
    threads, run, yield_core = on_all_cores()
    rest = n_cores, ctypes.byref(arrived), yield_core
    others = [threads.submit(run, words, n_kernels, core, *rest) for core in range(1, n_cores)]
    run(words, n_kernels, 0, *rest)
    for other in others:
        other.result()


@functools.cache
def on_all_cores() -> tuple[ThreadPoolExecutor, Callable, ctypes.c_void_p]:
    """The threads, the function that they call, and the one that this calls while it waits."""
    word, pointer, program = ctypes.c_uint64, ctypes.c_void_p, compiled(RUN_KERNELS)
    run = ctypes.CFUNCTYPE(None, pointer, word, word, word, pointer, pointer)(program.addr)
    run.program = program  # which holds the code
    yield_core = ctypes.cast(ctypes.CDLL(None).sched_yield, pointer)
    return ThreadPoolExecutor(NUM_CPU_THREADS.value, "core"), run, yield_core
