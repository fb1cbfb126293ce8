"""Products of a matrix with few vectors on the CPU, by gemv.c."""

import functools

from tinygrad import Tensor, UOp, dtypes
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo

from backend.cpu.compiler import processor
from backend.cpu.native import address_of
from backend.cpu.threads import chunk_of


def gemv(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (n, k), x (t, k) -> x matrix', float32 (t, n).

    x is float32 and the matrix float32 or float16; or x is int16 and the matrix int8, or float16
    that is rounded to integers. Sums of integers have to fit into 32 bits.
    """
    y = Tensor.empty(x.shape[0], matrix.shape[0], device=x.device)
    address = address_of("gemv", x.device)
    sources = y.uop, matrix.contiguous().uop, x.contiguous().uop, address.uop
    return Tensor(UOp.custom_kernel(*sources, fxn=gemv_kernel)[0])


def gemv_kernel(y: UOp, matrix: UOp, x: UOp, address: UOp) -> UOp:
    (n, k), n_vectors = matrix.shape, x.shape[0]
    chunk, first, size = chunk_of(n, 0, n * k * n_vectors)
    is_integer = x.dtype == dtypes.int16
    integers = n_vectors, first, first + size, n, k, matrix.dtype.itemsize, is_integer
    integers = (UOp.const(0, dtypes.weakint) + integer for integer in integers)
    pointers = (tensor.flatten()[0] for tensor in (y, matrix, x))
    arguments = *pointers, *(integer.cast(dtypes.int32) for integer in integers)
    call = address[0].load().call(*arguments, ret_dtype=dtypes.void)
    info = KernelInfo(name="gemv", opts_to_apply=(), estimates=Estimates())
    return call.end(chunk).sink(arg=info)


@functools.cache
def few_vectors() -> int:
    """The number of vectors up to which gemv is faster than BLAS, which copies the matrix."""
    return 256 if "avx512bw" in processor() else 16
