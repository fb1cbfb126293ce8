"""C functions that kernels call: gemv.c, gemm.c, attention.c, norm.c, and sgemm of numpy's BLAS.

A kernel reads the function's address from a buffer, since captured kernels are kept on disk and
addresses differ from process to process. `names` holds the function's name for each such buffer.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, buffers

from backend.cpu.compiler import CPUProgram, load_c, processor, start_c

FILES = {"gemv": "gemv.c", "sgemm": "gemm.c", "sbgemm": "gemm.c"}  # by function
FILES |= {"attention": "attention.c", "attention_gradients": "attention.c"}
FILES |= {"layer_norm": "norm.c", "layer_norm_gradients": "norm.c"}
# Linux's system call on x86-64 for permission to use large registers, AMX's tiles among them
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18
# Processors on which gemm.c multiplies float32 faster than numpy's BLAS, as measured
# (bench/README.md): flags that they have, and a flag that they lack.
GEMM_IS_FASTER = {"AMD Zen 3": ({"sse4a", "vaes"}, "avx512f")}
names: dict[UOp, str] = {}  # of C functions, by the buffer with the address


def call(
    name: str,
    address: UOp,
    arguments: Iterable[UOp | float],
    *ranges: UOp,
    integer: DType = dtypes.int32,
) -> UOp:
    """A kernel that calls the C function at the address once for each index of the ranges.

    It passes a tensor as a pointer to the first element, a Python integer or an index expression
    as `integer`, a Python float as a float, and any other scalar expression as it is.
    """

    def converted(x: UOp | float) -> UOp:
        if isinstance(x, float):
            return UOp.const(x, dtypes.float32)
        if isinstance(x, int) or x.dtype == dtypes.weakint:
            return UOp.const(x, integer)
        return x.flatten()[0] if x.shape else x

    function = address[0].load()
    kernel = function.call(*map(converted, arguments), ret_dtype=dtypes.void).end(*ranges)
    return kernel.sink(arg=KernelInfo(name=name, opts_to_apply=(), estimates=Estimates()))


def stored(x: Tensor) -> Tensor:
    """x in a buffer; if a size varies, at the start of a buffer of the largest shape of x."""
    shape = x.max_shape
    if x.shape == shape:  # `contiguous` would copy what a kernel has stored in another shape
        return x if x.uop.has_buffer_identity(after_ok=True) else x.contiguous()
    if x.uop.op is Ops.SHRINK and x.uop.src[0].shape == shape:
        return Tensor(x.uop.src[0])  # a KV cache, filled up to x
    whole = Tensor.empty(*shape, device=x.device, dtype=x.dtype)
    filled = whole.shrink(tuple((0, size) for size in x.shape))
    return Tensor(whole.uop.after(filled.uop.store(x.uop)))


def stored_gradient(grad: UOp) -> UOp:
    """The gradient as a kernel can take it: in a buffer also behind a norm over one value, where
    tinygrad folds it to a constant."""
    return grad.contiguous() if grad.shape[-1] == 1 else grad


def address_of(name: str, device: str) -> Tensor:
    """A buffer (1,) of uint64 with the address of a C function."""
    # sbgemm is loaded already, to see whether it compiles
    address = load(name).addr if name == "sbgemm" else blas().sgemm if name == "sgemm" else 0
    return address_buffer(name, address, device)


@functools.cache
def address_buffer(name: str, address: int, device: str) -> Tensor:
    uop, buffer = UOp.new_buffer(device, 1, dtypes.uint64), AddressBuffer(device, 1, dtypes.uint64)
    buffer.function, buffer.address = name, address
    buffers[uop], names[uop] = buffer.ref(1), name
    if not address:
        start_c(FILES[name])
    return Tensor(uop)


class AddressBuffer(Buffer):
    """Holds a function's address; waits at the first use until the function is compiled."""

    def ensure_allocated(self) -> Buffer:
        if not self.is_initialized():
            address = self.address or load(self.function).addr
            self.memory = np.array([address], np.uint64)
            self.allocate(external_ptr=self.memory.ctypes.data)
        return self


@functools.cache
def load(name: str) -> CPUProgram | None:
    """A compiled C function; None for "sbgemm" on a processor without instructions for bfloat16."""
    macros = {"BFLOAT16": 1, "TILES": int(may_use_tiles())} if name == "sbgemm" else {}
    try:
        return load_c(FILES[name], name, **macros)
    except ValueError as error:
        if "no fast products of bfloat16" not in str(error):  # an #error of gemm.c
            raise
        return None


@functools.cache
def may_use_tiles() -> bool:
    """Asks Linux for AMX's registers, once for all threads and forks of this process."""
    if "amx_bf16" not in processor():
        return False
    return not ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)


@dataclass(frozen=True)
class Blas:
    sgemm: int  # the address of cblas_sgemm; 0: gemm.c
    integer: DType  # of sizes


@functools.cache
def blas() -> Blas | None:
    """The BLAS that numpy was built with (OpenBLAS, MKL or Accelerate), or gemm.c where gemm.c is
    faster or numpy has none; None with BLAS=0."""
    if os.environ.get("BLAS") == "0":
        return None
    ours, flags = Blas(0, dtypes.int64), set(processor().split())
    if any(has <= flags and lacks not in flags for has, lacks in GEMM_IS_FASTER.values()):
        return ours
    # the loader finds symbols of a module's libraries through the module, except on Windows
    module = np._core._multiarray_umath.__file__
    if sys.platform == "win32":
        module = next(Path(np.__file__).parents[1].glob("numpy.libs/*openblas*.dll"), module)
    library = ctypes.CDLL(str(module))
    for name in ("scipy_{}64_", "{}64_", "scipy_{}", "{}"):
        if sgemm := getattr(library, name.format("cblas_sgemm"), None):
            # one thread: every core calls BLAS for a chunk
            for setter in (name.format("openblas_set_num_threads"), "MKL_Set_Num_Threads"):
                if hasattr(library, setter):
                    getattr(library, setter)(1)
            address = ctypes.cast(sgemm, ctypes.c_void_p).value
            return Blas(address, dtypes.int64 if "64" in name else dtypes.int32)
    return ours
