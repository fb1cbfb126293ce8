"""What tinygrad's CPU backend lacks: a C compiler without set-up, BLAS, and every core.

Importing it is enough: tinygrad's CPU device then compiles with `CC`, a clang on the PATH or the
package ziglang, and runs a captured jit on all cores. `einsum` is the matrix product of the model,
by BLAS on the CPU and by tinygrad's own code elsewhere. With BLAS=0 it is that everywhere.
"""

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tinygrad.codegen.opt.heuristic as heuristic
import tinygrad.runtime.ops_cpu as ops_cpu
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.device import TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import NUM_CPU_THREADS, getenv
from tinygrad.renderer.cstyle import ClangRenderer as TinygradClangRenderer
from tinygrad.runtime.support.compiler_cpu import ClangCompiler
from tinygrad.uop.ops import AxisType, KernelInfo, Ops

# ---- compiling ----

# Plain loops, and the leave to reorder sums, without which clang vectorises none of them.
# Not -ffast-math as a whole: infinities and NaN have to keep their meaning.
FLAGS = (
    "-O3",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
    *os.environ.get("XFLAGS", "").split(),
)


@functools.cache
def compiler_command() -> list[str]:
    """The C compiler: CC, a clang on the PATH, or the one that the package ziglang carries."""
    if cc := os.environ.get("CC"):
        return [cc]
    if clang := shutil.which("clang"):
        return [clang]
    import ziglang
    return [str(Path(ziglang.__file__).parent / "zig"), "clang"]


class Compiler(ClangCompiler):
    def __init__(self, arch: list[str]):
        key = "_".join(["gpt_tiny", *FLAGS])
        super().__init__(arch, key)

    def compile(self, src: str) -> bytes:
        return subprocess.check_output([*compiler_command(), "-c", "-x", "c", "-fPIC", "-ffreestanding", "-fno-math-errno", "-nostdlib", "-fno-ident",
            f"--target={self.arch}-none-unknown-elf", *self.args, *FLAGS, "-", "-o", "-"], input=src.encode())


class ClangRenderer(TinygradClangRenderer):
    def __init__(self, target):
        super().__init__(target)
        self.compiler = Compiler(target.arch.split(","))

tinygrad_optimizations = heuristic.hand_coded_optimizations

VEC = int(os.environ.get("VEC", "16"))
def plain_loops(kernel):
    """Clang vectorises a plain loop better than tinygrad unrolls it."""
    if not isinstance(kernel.ren, ClangRenderer):
        return tinygrad_optimizations(kernel)
    kernel = kernel.copy()
    # a sum down the columns: keep a row of sums, since clang can't swap the loops
    if VEC and kernel.reduceop is not None:
        reduce = kernel.ranges_of(AxisType.REDUCE)
        loads = [b.src[1].get_idx() for b in kernel.bufs]
        def unit(r):
            return [i for i in loads if r in i.split_uop(Ops.ADD)]
        if reduce and not any(unit(r) for r in reduce):
            for axis in kernel.axes_of(AxisType.WEAK)[::-1]:
                if unit(kernel.rngs[axis]) and kernel.full_shape[axis] % VEC == 0:
                    try: kernel.apply_opt(Opt(OptOps.UPCAST, axis, VEC))
                    except KernelOptError: pass
                    break
    threads = NUM_CPU_THREADS.value
    if math.prod(kernel.full_shape) >= int(os.environ.get("PAR", "16384")):
        for axis in kernel.axes_of(AxisType.WEAK):
            if kernel.full_shape[axis] % threads == 0:
                try:
                    kernel.apply_opt(Opt(OptOps.THREAD, axis, threads)); break
                except KernelOptError: pass
    return kernel


heuristic.hand_coded_optimizations = plain_loops
ops_cpu.ClangRenderer = ClangRenderer

GRAPH_SOURCE = """
typedef unsigned long long u64;
typedef void kernel(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64,
  u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64);
typedef void kernel8(u64, u64, u64, u64, u64, u64, u64, u64);
void run(u64 *word, u64 n, u64 thread, u64 threads, u64 *arrived, int (*yield)(void)) {
  for (u64 k = 0; k < n; k++) {
    u64 fn = word[0], n_args = word[1], used = word[2], core = word[3], a[32];
    word += 4;
    if (thread < used) {
      for (u64 i = 0; i < n_args; i++) a[i] = word[i];
      if (used > 1) a[core] = thread;
      if (n_args <= 8) ((kernel8 *)fn)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
      else ((kernel *)fn)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15],
        a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29], a[30], a[31]);
    }
    word += n_args;
    if (threads > 1) {
      __atomic_fetch_add(arrived, 1, __ATOMIC_ACQ_REL);
      u64 spins = 0;
      while (__atomic_load_n(arrived, __ATOMIC_ACQUIRE) < (k + 1) * threads) if (++spins > 20000) yield();
    }
  }
}
"""

class CPUGraph(GraphRunner):
    def __init__(self, linear, input_uops=()):
        super().__init__(linear, input_uops)
        words, self.slots, self.varslots = [], {}, {}
        for j, ((_, ast, bufs, device_vars), runtime) in enumerate(zip(self.calls, self.runtimes)):
            p = ast.arg
            args = [b._buf.va_addr for b in bufs]
            vals = [device_vars.get(v.expr, 0) for v in p.vars]
            core = p.runtimevars.get("core_id")
            threads = p.global_size[0] if core is not None else 1
            base = len(words) + 4
            for pos, i in self.uop_replace[j]: self.slots[base + pos] = i
            for i, v in self.var_vals_replace.get(j, ()): self.varslots[base + len(args) + i] = v
            words += [runtime.addr, len(args) + len(vals), threads, len(args) + (core or 0), *args, *vals]
        self.words = np.array(words, np.uint64)
        self.n = len(self.calls)
        self.arrived = np.zeros(1, np.uint64)

    def __call__(self, input_uops, var_vals, wait=False):
        for slot, i in self.slots.items():
            self.words[slot] = input_uops[i].buffer.get_buf("CPU").va_addr
        for slot, i in self.varslots.items():
            self.words[slot] = var_vals[self.vars[i]]
        self.arrived[0] = 0
        run, yld, pool, threads = runner()
        args = lambda t: [ctypes.c_uint64(x) for x in (self.words.ctypes.data, self.n, t, threads, self.arrived.ctypes.data, yld)]
        futures = [pool.submit(run, *args(t)) for t in range(1, threads)]
        run(*args(0))
        for f in futures: f.result()

@functools.cache
def runner():
    dev = Device["CPU"]
    lib = dev.renderer.compiler.compile_cached(GRAPH_SOURCE)
    prog = ops_cpu.CPUProgram(dev, TinyELF(lib, "run", dev.renderer.target, ()))
    runner.prog = prog
    libc = ctypes.CDLL(None)
    n = NUM_CPU_THREADS.value
    return ctypes.CFUNCTYPE(None, *[ctypes.c_uint64]*6)(prog.addr), ctypes.cast(libc.sched_yield, ctypes.c_void_p).value, ThreadPoolExecutor(max(1, n - 1)), n

class CPUDevice(ops_cpu.CPUDevice):
    def __init__(self, device=""):
        super().__init__(device)
        if getenv("CPUGRAPH", 1): self.graph = CPUGraph
ops_cpu.CPUDevice = CPUDevice

@functools.cache
def blas():
    lib = ctypes.CDLL(np._core._multiarray_umath.__file__)
    if os.environ.get("CPUGRAPH", "1") == "1": lib.scipy_openblas_set_num_threads64_(1)
    return lib, ctypes.cast(lib.scipy_cblas_sgemm64_, ctypes.c_void_p).value
@functools.cache
def address():
    return Tensor(np.array([blas()[1]], np.uint64)).realize()

USE = int(os.environ.get("BLAS","1"))
def einsum(spec, a, b):
    if not USE: return Tensor.einsum(spec, a, b)
    ins, out = spec.split("->"); la, lb = ins.split(",")
    sizes = dict(zip(la, a.shape)) | dict(zip(lb, b.shape))
    c = Tensor.empty(*[sizes[x] for x in out])
    return Tensor(_blas(c.uop, a.contiguous().uop, b.contiguous().uop, address().uop, la, lb, out))

def _blas(c, a, b, fn, la, lb, out):
    def grad(g, k):
        _, A, B, F = k.src[1:]
        ga = UOp.new_buffer(A.device, math.prod(A.shape), dtypes.float32).reshape(A.shape)
        gb = UOp.new_buffer(B.device, math.prod(B.shape), dtypes.float32).reshape(B.shape)
        return None, _blas(ga, g, B, F, out, lb, la), _blas(gb, g, A, F, out, la, lb), None
    return UOp.custom_kernel(c, a, b, fn, fxn=functools.partial(_gemm, la=la, lb=lb, lc=out), grad_fxn=grad)[0]

def strides(letters, shape):
    s, r = 1, {}
    for l, n in zip(reversed(letters), reversed(shape)): r[l] = s; s *= n
    return r
def _gemm(c, a, b, fn, la, lb, lc):
    A, B, C = strides(la, a.shape), strides(lb, b.shape), strides(lc, c.shape)
    size = dict(zip(la, a.shape)) | dict(zip(lb, b.shape))
    batch = [l for l in lc if l in la and l in lb]
    k = [l for l in la if l in lb and l not in lc]
    m = [l for l in lc if l in la and l not in lb]
    n = [l for l in lc if l in lb and l not in la]
    def dims(ls): return math.prod(size[l] for l in ls)
    def ld(S, rows, cols):
        if S[cols[-1]] == 1: return 0, S[rows[-1]]
        assert S[rows[-1]] == 1, (S, rows, cols)
        return 1, S[cols[-1]]
    ta, lda = ld(A, m, k); tb, ldb = ld(B, k, n); tc, ldc = ld(C, m, n)
    if tc: # C^T = B^T A^T
        a, b, A, B, m, n, ta, lda, tb, ldb = b, a, B, A, n, m, 1-tb, ldb, 1-ta, lda
    M, N, K = dims(m), dims(n), dims(k)
    threads = NUM_CPU_THREADS.value
    t = UOp.const(0, dtypes.weakint)
    rngs, idx = [], {}
    thr = False
    moff = 0
    if threads > 1 and USE < 2:
        if batch and size[batch[0]] % threads == 0:
            thr = True
        elif M % threads == 0 and M*N*K > 1e5:
            t = UOp.range(threads, 0, AxisType.THREAD); rngs.append(t); M //= threads; moff = t * M
    for i, l in enumerate(batch):
        if i == 0 and thr:
            t = UOp.range(threads, 0, AxisType.THREAD); r = UOp.range(size[l]//threads, 1); rngs += [t, r]; idx[l] = t * (size[l]//threads) + r
        else:
            r = UOp.range(size[l], i + 1); rngs.append(r); idx[l] = r
    off = lambda S: sum((idx[l]*S[l] for l in batch), start=UOp.const(0, dtypes.weakint))
    i = lambda v: UOp.const(v, dtypes.int64); i32 = lambda v: UOp.const(v, dtypes.int32); f = lambda v: UOp.const(v, dtypes.float32)
    p = lambda t, o: t.flatten()[o]
    call = fn[0].load().call(i32(101), i32(111+ta), i32(111+tb), i(M), i(N), i(K), f(1.0), p(a, off(A) + moff * (1 if ta else lda)), i(lda), p(b, off(B)), i(ldb), f(0.0), p(c, off(C) + moff * ldc), i(ldc), ret_dtype=dtypes.void)
    return call.end(*rngs).sink(arg=KernelInfo(name=f"sgemm_{la}_{lb}_{lc}", opts_to_apply=()))
