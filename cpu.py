"""What tinygrad's CPU backend lacks: BLAS, the other cores, and a C compiler without set-up.

Importing it is enough. `einsum` is the model's matrix product on every backend. tinygrad's CPU
device then calls BLAS for it, replays a captured jit on all cores, and compiles with `CC`, with a
clang on the PATH, or with the one that the package ziglang carries.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tinygrad.codegen.opt.heuristic as heuristic
import tinygrad.engine.realize as realize
import tinygrad.engine.worker as worker
import tinygrad.runtime.ops_cpu as ops_cpu
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.device import TinyELF
from tinygrad.dtype import DType
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import DEV, NUM_CPU_THREADS, PARALLEL, ContextVar, getenv
from tinygrad.renderer import cstyle
from tinygrad.runtime.support.compiler_cpu import ClangCompiler
from tinygrad.runtime.support.hcq2 import HCQ2Compiled
from tinygrad.uop.ops import AxisType, KernelInfo, Ops

# ---- matrix products, by BLAS ----


PRODUCT_DTYPE = ContextVar("PRODUCT_DTYPE", "float32")


def einsum(spec: str, a: Tensor, b: Tensor) -> Tensor:
    """`Tensor.einsum` for two tensors, by BLAS (in float32) where they are on the CPU.

    Another PRODUCT_DTYPE, "bfloat16", is what operands are rounded to, in the gradients as well;
    sums stay in float32. The environment variable BLAS=0 leaves the CPU's products to tinygrad.
    """
    if PRODUCT_DTYPE.value != "float32":
        a, b = (x.cast(PRODUCT_DTYPE.value) for x in (a, b))
    calls_blas = a.device.startswith("CPU") and blas() is not None
    if calls_blas:
        a, b = (x.cast(dtypes.float32) for x in (a, b))
    operands, letters_c = spec.split("->")
    letters = (*operands.split(","), letters_c)
    _, *sides = _sizes(letters, a, b)
    if sides[0] == 1 and sides.count(1) == 1:
        # no more than reading b once, which a plain loop does best, also in float16
        return Tensor.einsum(spec, a, b, dtype=dtypes.float32)
    a, b = a.contiguous(), b.contiguous()  # stored: a product reads an operand again and again
    if not calls_blas:
        return Tensor.einsum(spec, a, b, dtype=dtypes.float32).contiguous_backward()
    sizes = dict(zip(operands.replace(",", ""), a.shape + b.shape, strict=True))
    c = Tensor.empty(*[sizes[letter] for letter in letters_c], device=a.device)
    address = blas_address(a.device)
    return Tensor(_product(c.uop, a.uop, b.uop, address.uop, letters))


def _product(c: UOp, a: UOp, b: UOp, address: UOp, letters: tuple[str, str, str]) -> UOp:
    """c, holding the product of a and b. The gradients are two more such products."""
    letters_a, letters_b, letters_c = letters
    _, *sides = _sizes(letters, a, b)

    def gradient(of_c: UOp, call: UOp) -> tuple:
        # The address is the one among the call's own sources: within a traced function a captured
        # one would be another, empty buffer.
        _, _, a, b, address = call.src
        of_a, of_b = (UOp.new_buffer(x.device, x.numel(), x.dtype).reshape(x.shape) for x in (a, b))
        if 1 in sides:  # behind a norm over one value it is a constant, which has no memory
            of_c = of_c.contiguous()
        of_a = _product(of_a, of_c, b, address, (letters_c, letters_b, letters_a))
        of_b = _product(of_b, of_c, a, address, (letters_c, letters_a, letters_b))
        return None, of_a, of_b, None

    kernel = functools.partial(_sgemm_kernel, letters=letters)
    return UOp.custom_kernel(c, a, b, address, fxn=kernel, grad_fxn=gradient)[0]


def _groups(letters: tuple[str, str, str]) -> tuple[list[str], ...]:
    """The letters of the batches, of c's rows and columns, and of the sums."""
    letters_a, letters_b, letters_c = letters
    return (
        [x for x in letters_c if x in letters_a and x in letters_b],
        [x for x in letters_c if x not in letters_b],
        [x for x in letters_c if x not in letters_a],
        [x for x in letters_a if x in letters_b and x not in letters_c],
    )


def _sizes(letters: tuple[str, str, str], a: UOp, b: UOp) -> tuple[int, ...]:
    """The numbers of batches, of c's rows and columns, and of the terms of a sum."""
    sizes = dict(zip(letters[0] + letters[1], a.shape + b.shape, strict=True))
    return tuple(math.prod(sizes[x] for x in group) for group in _groups(letters))


class _Matrix:
    """The matrices of a tensor as BLAS sees them, each stored row by row or, transposed, column by
    column, with a step from one of these to the next; `offset` is where one begins."""

    def __init__(self, tensor: UOp, letters: str, rows: list[str], columns: list[str]):
        self.numbers, self.offset = tensor.flatten(), UOp.const(0, dtypes.weakint)
        self.strides = {x: math.prod(tensor.shape[i + 1 :]) for i, x in enumerate(letters)}
        # the letters of a group lie beside one another in memory, so that the last stands for all
        self.is_transposed = self.strides[columns[-1]] != 1
        stored, along = (columns, rows) if self.is_transposed else (rows, columns)
        length = math.prod(tensor.shape[letters.index(x)] for x in along)
        self.step = max(self.strides[stored[-1]], length)  # a single row may have any stride

    def skip_rows(self, n: UOp) -> None:
        self.offset += n * (1 if self.is_transposed else self.step)

    def skip_columns(self, n: UOp) -> None:
        self.offset += n * (self.step if self.is_transposed else 1)


def _sgemm_kernel(c: UOp, a: UOp, b: UOp, address: UOp, letters: tuple[str, str, str]) -> UOp:
    """Calls BLAS once for each batch; the cores share the batches or, in one batch, the rows or the
    columns, whichever are more: BLAS repacks the other operand on each core."""
    letters_a, letters_b, letters_c = letters
    batches, rows, columns, summed = _groups(letters)
    n_batches, m, n, k = _sizes(letters, a, b)
    if letters_c[-1] in rows:  # BLAS writes along rows: (a b)' = b' a'
        a, b, letters_a, letters_b = b, a, letters_b, letters_a
        rows, columns, m, n = columns, rows, n, m
    sizes = dict(zip(letters_c, c.shape, strict=True))
    batches.sort(key=lambda x: -largest_divisor(sizes[x], NUM_CPU_THREADS.value))  # 1 text: heads
    shared = sizes[batches[0]] if batches else max(m, n)
    n_cores = largest_divisor(shared, NUM_CPU_THREADS.value)
    if n_batches * m * n * k < MIN_SHARED_WORK:
        n_cores = 1

    a = _Matrix(a, letters_a, rows, summed)
    b = _Matrix(b, letters_b, summed, columns)
    c = _Matrix(c, letters_c, rows, columns)
    ranges = [core := UOp.range(n_cores, 0, AxisType.THREAD)]
    for number, letter in enumerate(batches, 1):
        n_indices = sizes[letter] // (n_cores if number == 1 else 1)
        ranges.append(index := UOp.range(n_indices, number))
        if number == 1:
            index = core * n_indices + index
        for matrix in (a, b, c):
            matrix.offset += index * matrix.strides[letter]
    if not batches and m >= n:
        m //= n_cores
        a.skip_rows(core * m)
        c.skip_rows(core * m)
    elif not batches:
        n //= n_cores
        b.skip_columns(core * n)
        c.skip_columns(core * n)
    call = _call_sgemm(address, (m, n, k), a, b, c)
    name = "sgemm_" + "_".join(letters)
    return call.end(*ranges).sink(arg=KernelInfo(name=name, opts_to_apply=()))


def _call_sgemm(address: UOp, sizes: tuple[int, int, int], a: _Matrix, b: _Matrix, c: _Matrix):
    """cblas_sgemm: c = 1 a b + 0 c, of row-major matrices (101), transposed (112) or not (111)."""
    m, n, k, *steps = (UOp.const(x, blas().integer) for x in (*sizes, a.step, b.step, c.step))
    order, flag_a, flag_b = (
        UOp.const(x, dtypes.int32) for x in (101, 111 + a.is_transposed, 111 + b.is_transposed)
    )
    alpha, beta = (UOp.const(x, dtypes.float32) for x in (1.0, 0.0))
    (at_a, step_a), (at_b, step_b), (at_c, step_c) = (
        (x.numbers[x.offset], step) for x, step in zip((a, b, c), steps, strict=True)
    )
    arguments = (order, flag_a, flag_b, m, n, k, alpha, at_a, step_a, at_b, step_b, beta)
    return address[0].load().call(*arguments, at_c, step_c, ret_dtype=dtypes.void)


class Blas:
    """The BLAS that numpy was built with: OpenBLAS, MKL or Accelerate."""

    def __init__(self):
        import numpy

        # Symbols are looked for in what this module was linked with, too.
        library = ctypes.CDLL(numpy._core._multiarray_umath.__file__)
        names = ["scipy_{}64_", "{}64_", "scipy_{}", "{}"]
        name = next(name for name in names if hasattr(library, name.format("cblas_sgemm")))
        self.integer: DType = dtypes.int64 if "64" in name else dtypes.int32
        sgemm = getattr(library, name.format("cblas_sgemm"))
        self.sgemm: int = ctypes.cast(sgemm, ctypes.c_void_p).value
        # A kernel runs on all cores already, each of which calls BLAS for its share.
        for setter in (name.format("openblas_set_num_threads"), "MKL_Set_Num_Threads"):
            if hasattr(library, setter):
                getattr(library, setter)(1)


@functools.cache
def blas() -> Blas | None:
    if os.environ.get("BLAS") == "0":
        return None
    try:
        return Blas()
    except (StopIteration, OSError):
        return None


@functools.cache
def blas_address(device: str) -> Tensor:
    """A buffer that holds the address of `sgemm`: unlike the code, it may change with each run."""
    return Tensor([blas().sgemm], dtype=dtypes.uint64, device=device).realize()


def blas_addresses(device: str) -> list[Tensor]:
    """The buffer of `blas_address`, if products on the device go through BLAS."""
    return [blas_address(device)] if blas() is not None else []


# ---- kernels, and all cores for them ----

MIN_SHARED_WORK = 1 << 14  # element operations; with fewer, waking a core costs more than it gives


def largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def plain_loops(kernel):
    """Leaves loops as they are: clang vectorises them better than tinygrad unrolls them."""
    kernel = kernel.copy()
    # A sum down the columns of a matrix: clang can't swap the loops, so sum 8 columns at once.
    for axis in columns_summed(kernel)[-1:]:
        width = largest_divisor(kernel.full_shape[axis], 8)
        if width > 1:
            try_optimization(kernel, Opt(OptOps.UPCAST, axis, width))

    if all(isinstance(n, int) for n in kernel.full_shape):
        if math.prod(kernel.full_shape) < MIN_SHARED_WORK:
            return kernel
        for axis in kernel.axes_of(AxisType.WEAK):
            n_cores = largest_divisor(kernel.full_shape[axis], NUM_CPU_THREADS.value)
            if n_cores > 1 and try_optimization(kernel, Opt(OptOps.THREAD, axis, n_cores)):
                break
    return kernel


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
        cores.run_kernels(self.words, len(self.calls))


class Cores:
    """A thread for each core but the caller's, which take part in running lists of kernels."""

    def run_kernels(self, words: ctypes.Array, n_kernels: int) -> None:
        n_cores, arrived = NUM_CPU_THREADS.value, ctypes.c_uint64(0)
        arguments = (words, n_kernels), (n_cores, ctypes.byref(arrived), self.yield_core)
        others = [
            self.threads.submit(self.function, *arguments[0], core, *arguments[1])
            for core in range(1, n_cores)
        ]
        self.function(*arguments[0], 0, *arguments[1])
        for other in others:
            other.result()

    @functools.cached_property
    def threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(NUM_CPU_THREADS.value, "core")

    @functools.cached_property
    def function(self):
        device = Device["CPU"]
        code = device.renderer.compiler.compile_cached(RUN_KERNELS)
        self.program = ops_cpu.CPUProgram(
            device, TinyELF(code, "run_kernels", device.renderer.target, ())
        )
        word, pointer = ctypes.c_uint64, ctypes.c_void_p
        return ctypes.CFUNCTYPE(None, pointer, word, word, word, pointer, pointer)(
            self.program.addr
        )

    @functools.cached_property
    def yield_core(self) -> ctypes.c_void_p:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)


cores = Cores()


def processor() -> str:
    """What tells this machine's processor from others that the same code may not run on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return " ".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    return platform.processor()


# ---- the C compiler ----

# Clang vectorises a sum only with leave to reorder it. -ffast-math as a whole would also take
# infinities and NaN for impossible. -O3 takes longer to compile, for code that is no faster.
FLAGS = (
    "-O2 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
)
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
        target = f"--target={self.arch}-none-unknown-elf"
        freestanding = [
            "-c",
            "-x",
            "c",
            "-fPIC",
            "-ffreestanding",
            "-nostdlib",
            "-fno-ident",
            target,
        ]
        command = [*command, *freestanding, *self.args, *FLAGS.split(), "-", "-o", "-"]
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
            raise ValueError(
                "no C compiler: pip install ziglang, or put a clang on the PATH"
            ) from None
        return [str(Path(ziglang.__file__).parent / "zig"), "clang"]


@functools.cache
def forked_pool():
    pool = multiprocessing.get_context("fork").Pool(PARALLEL.value, start_worker)
    atexit.register(pool.terminate)
    return pool


def start_worker() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py's is for train.py
    worker._init_worker()


tinygrads_pool = worker.get_worker_pool


def compiling_processes():
    """The pool that compiles kernels, or None. tinygrad starts processes anew, which import all
    that this one has imported; without a GPU in use, which no fork survives, they can be forks."""
    if multiprocessing.current_process().daemon or PARALLEL.value < 2:
        return None
    can_fork = sys.platform == "linux" and Device.DEFAULT.startswith("CPU")
    return forked_pool() if can_fork else tinygrads_pool()


# ---- all that as tinygrad's CPU device ----


class ClangRenderer(cstyle.ClangRenderer):
    def __init__(self, target):
        super().__init__(target)
        self.compiler = CPUCompiler(target.arch.split(","))


class CPUDevice(ops_cpu.CPUDevice):
    def __init__(self, device: str = ""):
        if getenv("HCQ2"):
            super().__init__(device)
        else:  # the same, less the kernels of HCQ2's queue, which took a third of a second
            self.workers = []
            machine = platform.machine().lower()
            machine = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
            renderers = [ClangRenderer, ops_cpu.CPULLVMRenderer]
            allocator, arch = ops_cpu.CPUAllocator(self), f"{machine},native"
            HCQ2Compiled.__init__(self, device, allocator, renderers, ops_cpu.CPUProgram, arch=arch)
        self.graph = CPUGraph


tinygrads_optimizations = heuristic.hand_coded_optimizations


def optimizations(kernel):
    is_ours = isinstance(kernel.ren, ClangRenderer)
    return plain_loops(kernel) if is_ours else tinygrads_optimizations(kernel)


def choose_backend() -> None:
    """Leaves DEV to the user, and the choice without it to tinygrad where there may be a GPU.

    Else tinygrad would take an OpenCL that runs on the CPU (pocl) before its own, faster, backend,
    and spend half a second on looking for GPUs.
    """
    gpu_drivers = ("/dev/kfd", "/dev/nvidiactl", "/dev/dxg")
    if not DEV.device and sys.platform != "darwin" and not any(map(os.path.exists, gpu_drivers)):
        DEV.value = os.environ["DEV"] = "CPU"


heuristic.hand_coded_optimizations = optimizations
ops_cpu.ClangRenderer, ops_cpu.CPUDevice = ClangRenderer, CPUDevice
realize.get_worker_pool = compiling_processes
choose_backend()
