"""Matrix products: `einsum`, on every backend; on the CPU by BLAS or gemm.c, or by gemv.c.

A size may vary with a Variable of a jit, which tinygrad calls symbolic: `sint`.
"""

import functools
import math
from dataclasses import dataclass

from tinygrad import Context, Tensor, UOp, dtypes
from tinygrad.helpers import ContextVar
from tinygrad.uop.ops import Ops, sint

from backend.cpu import native
from backend.cpu.compiler import processor
from backend.cpu.native import blas, stored, stored_gradient
from backend.cpu.threads import chunk_of, evenness

PRODUCT_DTYPE = ContextVar("PRODUCT_DTYPE", "float32")  # of the rounded operands
FEW_VECTORS = ContextVar("FEW_VECTORS", 0)  # most vectors for gemv.c, which has no gradient
ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE = 101, 111, 112  # cblas_sgemm's


def einsum(spec: str, a: Tensor, b: Tensor) -> Tensor:
    """`Tensor.einsum` of two tensors, in float32; on the CPU by BLAS or gemm.c, unless BLAS=0.

    With PRODUCT_DTYPE "bfloat16" operands are rounded, in the gradients too, and sums stay in
    float32; on the CPU gemm.c multiplies them, if the processor has instructions for bfloat16.
    """
    if not isinstance(b, Tensor):  # a QuantizedMatrix
        return b.product(spec, a)
    if PRODUCT_DTYPE.value != "float32":
        a, b = (x.cast(PRODUCT_DTYPE.value) for x in (a, b))
    letters_a, letters_b, letters_c = spec.replace("->", ",").split(",")
    sizes = dict(zip(letters_a + letters_b, a.shape + b.shape, strict=True))
    axes = Axes(letters_a, letters_b, letters_c, sizes)
    calls_blas = a.device.startswith("CPU") and blas() is not None
    is_matrix = letters_b == letters_c[-1] + letters_a[-1]  # (out, in)
    if calls_blas and FEW_VECTORS and is_matrix and b.dtype in (dtypes.half, dtypes.float32):
        n_vectors = math.prod(a.shape[:-1])
        if n_vectors <= FEW_VECTORS.value or b.dtype == dtypes.half:
            return gemv(b, a.reshape(n_vectors, -1)).reshape(*a.shape[:-1], -1)
    _, *mnk = axes.counts()
    is_vector = mnk[0] == 1 and mnk.count(1) == 1  # times a matrix
    is_bfloat16 = a.dtype == b.dtype == dtypes.bfloat16 and not is_vector
    if calls_blas and not (is_bfloat16 and native.load("sbgemm")):
        a, b = (x.cast(dtypes.float32) for x in (a, b))
    if is_vector:  # b is read once: a plain loop is fastest
        return Tensor.einsum(spec, a, b, dtype=dtypes.float32)
    if not calls_blas:  # contiguous: a product reads an operand again and again
        a, b = a.contiguous(), b.contiguous()
        return Tensor.einsum(spec, a, b, dtype=dtypes.float32).contiguous_backward()
    c = Tensor.empty(*(max_size(sizes[x]) for x in letters_c), device=a.device)
    address = native.address_of("sbgemm" if a.dtype == dtypes.bfloat16 else "sgemm", a.device)
    c = Tensor(gemm(c.uop, stored(a).uop, stored(b).uop, address.uop, axes))
    return c.shrink(tuple((0, sizes[x]) for x in letters_c))


@dataclass(frozen=True)
class Axes:
    """The letters of the operands a and b and of the result c, and the size of each letter."""

    a: str
    b: str
    c: str
    sizes: dict[str, sint]

    def groups(self) -> tuple[list[str], ...]:
        """The letters of the batches, of c's rows, of c's columns, and of the sums."""
        return (
            [x for x in self.c if x in self.a and x in self.b],
            [x for x in self.c if x not in self.b],
            [x for x in self.c if x not in self.a],
            [x for x in self.a if x in self.b and x not in self.c],
        )

    def counts(self) -> tuple[sint, ...]:
        """The numbers of batches, of c's rows, of c's columns, and of the terms of a sum."""
        return tuple(math.prod(self.sizes[x] for x in group) for group in self.groups())


def gemm(c: UOp, a: UOp, b: UOp, address: UOp, axes: Axes) -> UOp:
    """c after the product of a and b is written to it."""
    kernel, gradient = (functools.partial(f, axes=axes) for f in (gemm_kernel, gemm_gradient))
    return UOp.custom_kernel(c, a, b, address, fxn=kernel, grad_fxn=gradient)[0]


def gemm_gradient(grad_c: UOp, call: UOp, axes: Axes) -> tuple:
    _, _, a, b, address = call.src
    grad_a, grad_b = (x.empty_like(dtypes.float32) for x in (a, b))
    grad_c = stored_gradient(grad_c.cast(a.dtype))
    grad_a = gemm(grad_a, grad_c, b, address, Axes(axes.c, axes.b, axes.a, axes.sizes))
    grad_b = gemm(grad_b, grad_c, a, address, Axes(axes.c, axes.a, axes.b, axes.sizes))
    return None, grad_a, grad_b, None


def gemm_kernel(c: UOp, a: UOp, b: UOp, address: UOp, axes: Axes) -> UOp:
    """Calls BLAS or gemm.c once for each batch. The cores divide the batches or, of one batch, the
    rows or the columns, whichever are more: each core packs the other operand."""
    sizes = {letter: kernel_size(size) for letter, size in axes.sizes.items()}
    axes = Axes(axes.a, axes.b, axes.c, sizes)
    batches, rows, columns, summed = axes.groups()
    n_batches, m, n, k = axes.counts()
    letters_a, letters_b = axes.a, axes.b
    is_bfloat16 = a.dtype == dtypes.bfloat16
    if axes.c[-1] in rows:  # BLAS writes along rows: (a b)' = b' a'
        a, b, letters_a, letters_b = b, a, letters_b, letters_a
        rows, columns, m, n = columns, rows, n, m

    batches.sort(key=lambda x: -evenness(sizes[x]))  # in one text the heads
    are_rows_divided = max_size(m) >= max_size(n)
    divided = sizes[batches[0]] if batches else m if are_rows_divided else n
    chunk, start, chunk_size = chunk_of(divided, 0, max_size(n_batches * m * n * k))
    n_indices = [chunk_size, *(sizes[x] for x in batches[1:])] if batches else []
    ranges = [UOp.range(size, number) for number, size in enumerate(n_indices, 1)]
    indices = dict(zip(batches, ranges, strict=True))
    if batches:
        indices[batches[0]] += start
    elif are_rows_divided:
        indices, m = {rows[-1]: start}, chunk_size
    else:
        indices, n = {columns[-1]: start}, chunk_size

    a, flag_a, lda = blas_matrix(a, letters_a, rows, summed, indices)
    b, flag_b, ldb = blas_matrix(b, letters_b, summed, columns, indices)
    c, _, ldc = blas_matrix(c, axes.c, rows, columns, indices)
    flags = (UOp.const(flag, dtypes.int32) for flag in (ROW_MAJOR, flag_a, flag_b))
    arguments = *flags, m, n, k, 1.0, a, lda, b, ldb, 0.0, c, ldc
    name = f"{'sb' if is_bfloat16 else 's'}gemm_{axes.a}_{axes.b}_{axes.c}"
    integer = dtypes.int64 if is_bfloat16 else blas().integer
    return native.call(name, address, arguments, chunk, *ranges, integer=integer)


def blas_matrix(
    tensor: UOp, letters: str, rows: list[str], columns: list[str], indices: dict[str, UOp]
) -> tuple[UOp, int, int]:
    """A matrix in a tensor as BLAS takes it: the first element, at the indices of the other
    letters; the flag, NO_TRANSPOSE or TRANSPOSE; and the stride between rows, or columns."""
    strides = {x: math.prod(tensor.shape[i + 1 :]) for i, x in enumerate(letters)}
    # the letters of a group lie side by side in memory, so that the last one stands for all
    is_transposed = strides[columns[-1]] != 1
    outer, inner = (columns, rows) if is_transposed else (rows, columns)
    length = math.prod(tensor.shape[letters.index(x)] for x in inner)
    stride = max(strides[outer[-1]], length)  # of a single row the stride may be anything
    offsets = (index * strides[x] for x, index in indices.items() if x in strides)
    start = sum(offsets, UOp.const(0, dtypes.weakint))
    return tensor.flatten()[start], TRANSPOSE if is_transposed else NO_TRANSPOSE, stride


def gemv(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (n, k), x (t, k) -> x matrix', float32 (t, n).

    x is float32 and the matrix float32 or float16; or x is int16 and the matrix int8, or float16
    that is rounded to integers. Sums of integers have to fit into 32 bits.
    """
    y = Tensor.empty(x.shape[0], matrix.shape[0], device=x.device)
    tensors = y, matrix.contiguous(), x.contiguous(), native.address_of("gemv", x.device)
    return Tensor.custom_kernel(*tensors, fxn=gemv_kernel)[0]


def gemv_kernel(y: UOp, matrix: UOp, x: UOp, address: UOp) -> UOp:
    """The cores divide the rows of the matrix."""
    (n, k), n_vectors = matrix.shape, x.shape[0]
    chunk, start, size = chunk_of(n, 0, n * k * n_vectors)
    format = matrix.dtype.itemsize, x.dtype == dtypes.int16
    arguments = y, matrix, x, n_vectors, start, start + size, n, k, *format
    return native.call("gemv", address, arguments, chunk)


def few_vectors() -> Context:
    """A context without gradients, where gemv.c multiplies a few vectors: as many as are faster
    than with BLAS or gemm.c, which copy the matrix."""
    return Context(FEW_VECTORS=FEW_VECTORS.value or (256 if "avx512bw" in processor() else 16))


def max_size(size: sint) -> int:
    return size if isinstance(size, int) else size.vmax


def kernel_size(size: sint) -> sint:
    """The size with a kernel's parameters in place of Variables."""
    if isinstance(size, int):
        return size
    size, values = size.unbind_all()
    return size.substitute({variable: variable.replace(op=Ops.PARAM) for variable in values})


def positions(n: sint) -> Tensor:
    """The integers (n,) from 0; `Tensor.arange` computes them as sums of ones where n varies."""
    return Tensor.arange(max_size(n))[:n]
