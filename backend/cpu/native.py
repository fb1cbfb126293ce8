"""Functions in C that kernels call: gemv.c, gemm.c, attention.c, and the matrix product of BLAS.

A kernel reads a function's address from a buffer: kernels are kept, and an address differs from run
to run. `names` tells these buffers from others: a kept jit holds the name of the function instead.
"""

import functools

import numpy as np
from tinygrad import Tensor, UOp

from backend.arrays import from_numpy
from backend.cpu.blas import blas
from backend.cpu.compiler import CPUProgram, load_c

FILES = {"gemv": "gemv.c", "sbgemm": "gemm.c"}  # by function
FILES |= {"attention": "attention.c", "attention_gradients": "attention.c"}
names: dict[UOp, str] = {}  # of functions, by the buffer with the address


def address_of(name: str, device: str) -> Tensor:
    """The address of the function `name` in a buffer (1,) of uint64."""
    return address_buffer(name, address(name), device)


@functools.cache
def address_buffer(name: str, address: int, device: str) -> Tensor:
    buffer = from_numpy(np.array([address], np.uint64), device)
    names[buffer.uop.base] = name
    return buffer


def address(name: str) -> int | None:
    """The address of "sgemm", BLAS's, or of a function of ours, which is compiled when it is first
    asked for; None where there is no BLAS, or where the processor is no faster with "sbgemm"."""
    if name == "sgemm":
        return blas() and blas().sgemm
    program = load(name)
    return program and program.addr


@functools.cache
def load(name: str) -> CPUProgram | None:
    try:
        return load_c(FILES[name], name)
    except ValueError as error:
        if "no fast products of bfloat16" not in str(error):  # as gemm.c says
            raise
        return None
