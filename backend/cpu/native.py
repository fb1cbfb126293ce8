"""Functions in C that kernels call: gemv.c, gemm.c, attention.c, norm.c, and sgemm of numpy's BLAS.

A kernel reads a function's address from a buffer: kernels are kept, and an address differs from run
to run. `names` tells these buffers from others: a kept jit holds the name of the function instead.
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
from tinygrad.uop.ops import KernelInfo, buffers

from backend.cpu.compiler import RENDER_ONLY, CPUProgram, begin_c, load_c, processor

FILES = {"gemv": "gemv.c", "sgemm": "gemm.c", "sbgemm": "gemm.c"}  # by function
FILES |= {"attention": "attention.c", "attention_gradients": "attention.c"}
FILES |= {"layer_norm": "norm.c", "layer_norm_gradients": "norm.c"}
MACROS = {"sbgemm": {"BFLOAT16": 1}}
# Linux's system call on x86-64 for leave to use a processor's large registers, and AMX's among them
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18
# The flags of processors whose float32 gemm.c multiplies faster than numpy's BLAS, as was measured
# (bench/README.md), and a flag that they lack; the others keep BLAS.
GEMM_IS_FASTER = {"AMD Zen 3": ({"sse4a", "vaes"}, "avx512f")}
names: dict[UOp, str] = {}  # of functions, by the buffer with the address


def address_of(name: str, device: str) -> Tensor:
    """The address of the function `name` in a buffer (1,) of uint64."""
    return address_buffer(name, device, blas(), RENDER_ONLY.value)


@functools.cache
def address_buffer(name: str, device: str, *_: object) -> Tensor:
    uop, buffer = UOp.new_buffer(device, 1, dtypes.uint64), AddressBuffer(device, 1, dtypes.uint64)
    buffers[uop], names[uop], buffer.name = buffer.ref(1), name, name
    # sbgemm's has been asked for, to see whether it compiles
    if name != "sbgemm" and not (name == "sgemm" and blas().sgemm):
        begin_c(FILES[name])
    return Tensor(uop)


class AddressBuffer(Buffer):
    """Holds a function's address from its first use on: till then the function is compiled."""

    def ensure_allocated(self) -> Buffer:
        if not self.is_initialized():
            self.memory = np.array([address(self.name)], np.uint64)
            self.allocate(external_ptr=self.memory.ctypes.data)
        return self


def address(name: str) -> int | None:
    """The address of "sgemm", BLAS's or ours, or of another function of ours, compiled when it is
    first asked for; None with BLAS=0, or where the processor is no faster with "sbgemm"."""
    if RENDER_ONLY:
        return 0
    if name == "sgemm" and (blas() is None or blas().sgemm):
        return blas() and blas().sgemm
    program = load(name)
    return program and program.addr


@functools.cache
def load(name: str) -> CPUProgram | None:
    macros = dict(MACROS.get(name, {}))
    if name == "sbgemm" and may_use_tiles():
        macros["TILES"] = 1
    try:
        return load_c(FILES[name], name, **macros)
    except ValueError as error:
        if "no fast products of bfloat16" not in str(error):  # as gemm.c says
            raise
        return None


def calling(name: str, address: UOp, arguments: Iterable[UOp], *ranges: UOp) -> UOp:
    """A kernel that calls the function at the address, once for each number of the ranges."""
    call = address[0].load().call(*arguments, ret_dtype=dtypes.void)
    info = KernelInfo(name=name, opts_to_apply=(), estimates=Estimates())
    return call.end(*ranges).sink(arg=info)


@functools.cache
def may_use_tiles() -> bool:
    """AMX's registers: a process asks Linux before it uses them, for its threads and forks, too."""
    if "amx_bf16" not in processor():
        return False
    return not ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)


@dataclass(frozen=True)
class Blas:
    sgemm: int  # the address of cblas_sgemm; 0 for gemm.c's
    integer: DType  # of its sizes


@functools.cache
def blas() -> Blas | None:
    """The BLAS that numpy was built with (OpenBLAS, MKL or Accelerate), or gemm.c where that is
    faster, or is all there is; None with BLAS=0."""
    if os.environ.get("BLAS") == "0":
        return None
    ours, flags = Blas(0, dtypes.int64), set(processor().split())
    if any(has <= flags and lacks not in flags for has, lacks in GEMM_IS_FASTER.values()):
        return ours
    # Symbols are looked for in what this module was linked with, too, except by Windows.
    module = np._core._multiarray_umath.__file__
    if sys.platform == "win32":
        module = next(Path(np.__file__).parents[1].glob("numpy.libs/*openblas*.dll"), module)
    library = ctypes.CDLL(str(module))
    for name in ("scipy_{}64_", "{}64_", "scipy_{}", "{}"):
        if sgemm := getattr(library, name.format("cblas_sgemm"), None):
            # A kernel runs on all cores already, each of which calls BLAS for its chunk.
            for setter in (name.format("openblas_set_num_threads"), "MKL_Set_Num_Threads"):
                if hasattr(library, setter):
                    getattr(library, setter)(1)
            address = ctypes.cast(sgemm, ctypes.c_void_p).value
            return Blas(address, dtypes.int64 if "64" in name else dtypes.int32)
    return ours
