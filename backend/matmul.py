"""Matrix products: `einsum`, on every backend; on the CPU by BLAS or gemm.c, or by gemv.c.

A size may vary with a Variable of a jit, which tinygrad calls symbolic: `sint`.
"""

import functools
import math
from dataclasses import dataclass

from tinygrad import Context, Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import ContextVar
from tinygrad.uop.ops import Ops, sint

from backend.cpu import native
from backend.cpu.compiler import processor
from backend.cpu.native import blas
from backend.cpu.threads import chunk_of, evenness

PRODUCT_DTYPE = ContextVar("PRODUCT_DTYPE", "float32")  # that operands are rounded to
FEW_VECTORS = ContextVar("FEW_VECTORS", 0)  # up to which gemv.c multiplies them, without a gradient


def einsum(spec: str, a: Tensor, b: Tensor) -> Tensor:
    """`Tensor.einsum` for two tensors, in float32; on the CPU by BLAS or gemm.c, unless BLAS=0.

    With PRODUCT_DTYPE "bfloat16" operands are rounded, in the gradients too, and sums stay in
    float32; on the CPU gemm.c multiplies them, if the processor has instructions for bfloat16.
    """
    if not isinstance(b, Tensor):  # a QuantizedMatrix
        return b.product(spec, a)
    if PRODUCT_DTYPE.value != "float32":
        a, b = (x.cast(PRODUCT_DTYPE.value) for x in (a, b))
    operands, letters_c = spec.split("->")
    letters_a, letters_b = operands.split(",")
    sizes = dict(zip(letters_a + letters_b, a.shape + b.shape, strict=True))
    axes = Axes(letters_a, letters_b, letters_c, sizes)
    _, *sides = axes.counts()
    calls_blas = a.device.startswith("CPU") and blas() is not None
    is_matrix = letters_b == letters_c[-1] + letters_a[-1]  # (out, in)
    if calls_blas and FEW_VECTORS and is_matrix and b.dtype in (dtypes.half, dtypes.float32):
        n_vectors = math.prod(a.shape[:-1])
        if n_vectors <= FEW_VECTORS.value or b.dtype == dtypes.half:
            return gemv(b, a.reshape(n_vectors, -1)).reshape(*a.shape[:-1], -1)
    reads_b_once = sides[0] == 1 and sides.count(1) == 1
    is_bfloat16 = a.dtype == b.dtype == dtypes.bfloat16 and not reads_b_once
    if calls_blas and not (is_bfloat16 and native.address("sbgemm")):
        a, b = (x.cast(dtypes.float32) for x in (a, b))
    if reads_b_once:
        # a plain loop does so best; with another side of 1 the product may fold to a constant, and
        # the gradients behind it then have no memory
        return Tensor.einsum(spec, a, b, dtype=dtypes.float32)
    if not calls_blas:  # contiguous: a product reads an operand again and again
        a, b = a.contiguous(), b.contiguous()
        return Tensor.einsum(spec, a, b, dtype=dtypes.float32).contiguous_backward()
    a, b = stored(a), stored(b)
    c = Tensor.empty(*(at_most(sizes[x]) for x in letters_c), device=a.device)
    address = native.address_of("sbgemm" if a.dtype == dtypes.bfloat16 else "sgemm", a.device)
    c = Tensor(blas_product(c.uop, a.uop, b.uop, address.uop, axes))
    return c.shrink(tuple((0, sizes[x]) for x in letters_c))


@dataclass(frozen=True)
class Axes:
    """The letters of a product's operands and of its result, and the size of each."""

    of_a: str
    of_b: str
    of_c: str
    sizes: dict[str, sint]

    def groups(self) -> tuple[list[str], ...]:
        """The letters of the batches, of c's rows and columns, and of the sums."""
        return (
            [x for x in self.of_c if x in self.of_a and x in self.of_b],
            [x for x in self.of_c if x not in self.of_b],
            [x for x in self.of_c if x not in self.of_a],
            [x for x in self.of_a if x in self.of_b and x not in self.of_c],
        )

    def counts(self) -> tuple[sint, ...]:
        """The numbers of batches, of c's rows and columns, and of the terms of a sum."""
        return tuple(math.prod(self.sizes[x] for x in group) for group in self.groups())


def blas_product(c: UOp, a: UOp, b: UOp, address: UOp, axes: Axes) -> UOp:
    """c, with the product of a and b in it. The gradients are two more such products."""

    def gradient(of_c: UOp, call: UOp) -> tuple:
        # The address comes from the call's own sources: one of the closure would be another,
        # empty buffer where tinygrad traces the function.
        _, _, a, b, address = call.src
        of_a, of_b = (
            UOp.new_buffer(x.device, x.numel(), dtypes.float32).reshape(x.shape) for x in (a, b)
        )
        of_c = of_c.cast(a.dtype)
        if 1 in axes.counts()[1:]:  # behind a norm over one value it is a constant: no memory
            of_c = of_c.contiguous()
        axes_a = Axes(axes.of_c, axes.of_b, axes.of_a, axes.sizes)
        axes_b = Axes(axes.of_c, axes.of_a, axes.of_b, axes.sizes)
        of_a = blas_product(of_a, of_c, b, address, axes_a)
        of_b = blas_product(of_b, of_c, a, address, axes_b)
        return None, of_a, of_b, None

    kernel = functools.partial(gemm_kernel, axes=axes)
    return UOp.custom_kernel(c, a, b, address, fxn=kernel, grad_fxn=gradient)[0]


def matrix_of(
    tensor: UOp, letters: str, rows: list[str], columns: list[str], indices: dict[str, UOp]
) -> tuple[UOp, int, int]:
    """A matrix in the tensor as BLAS takes it: a pointer to its start, given the indices of the
    other letters; its order, 111 row by row or 112 column by column; and the step from one row, or
    column, to the next."""
    strides = {x: math.prod(tensor.shape[i + 1 :]) for i, x in enumerate(letters)}
    # the letters of a group lie side by side in memory, so that the last one stands for all
    is_transposed = strides[columns[-1]] != 1
    stored, along = (columns, rows) if is_transposed else (rows, columns)
    length = math.prod(tensor.shape[letters.index(x)] for x in along)
    step = max(strides[stored[-1]], length)  # of a single row the stride may be anything
    steps = (index * strides[x] for x, index in indices.items() if x in strides)
    start = sum(steps, UOp.const(0, dtypes.weakint))
    return tensor.flatten()[start], 111 + is_transposed, step


def gemm_kernel(c: UOp, a: UOp, b: UOp, address: UOp, axes: Axes) -> UOp:
    """Calls BLAS or gemm.c once for each batch. The cores divide the batches or, of one batch, the
    rows or the columns, whichever are more: each core packs the other operand."""
    sizes = {letter: in_kernel(size) for letter, size in axes.sizes.items()}
    axes = Axes(axes.of_a, axes.of_b, axes.of_c, sizes)
    batches, rows, columns, summed = axes.groups()
    n_batches, m, n, k = axes.counts()
    letters_a, letters_b, letters_c = axes.of_a, axes.of_b, axes.of_c
    is_bfloat16 = a.dtype == dtypes.bfloat16
    if letters_c[-1] in rows:  # BLAS writes along rows: (a b)' = b' a'
        a, b, letters_a, letters_b = b, a, letters_b, letters_a
        rows, columns, m, n = columns, rows, n, m

    batches.sort(key=lambda x: -evenness(sizes[x]))  # in one text the heads
    are_rows_divided = at_most(m) >= at_most(n)
    divided = sizes[batches[0]] if batches else m if are_rows_divided else n
    chunk, first, chunk_size = chunk_of(divided, 0, at_most(n_batches * m * n * k))
    n_indices = [chunk_size, *(sizes[x] for x in batches[1:])] if batches else []
    ranges = [UOp.range(size, number) for number, size in enumerate(n_indices, 1)]
    indices = dict(zip(batches, ranges, strict=True))
    if batches:
        indices[batches[0]] += first
    elif are_rows_divided:
        indices, m = {rows[-1]: first}, chunk_size
    else:
        indices, n = {columns[-1]: first}, chunk_size

    a, flag_a, lda = matrix_of(a, letters_a, rows, summed, indices)
    b, flag_b, ldb = matrix_of(b, letters_b, summed, columns, indices)
    c, _, ldc = matrix_of(c, letters_c, rows, columns, indices)
    row_major, flag_a, flag_b = constants(dtypes.int32, 101, flag_a, flag_b)
    integer = dtypes.int64 if is_bfloat16 else blas().integer
    m, n, k, lda, ldb, ldc = constants(integer, m, n, k, lda, ldb, ldc)
    alpha, beta = constants(dtypes.float32, 1.0, 0.0)
    arguments = (row_major, flag_a, flag_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)
    name = f"{'sb' if is_bfloat16 else 's'}gemm_{axes.of_a}_{axes.of_b}_{axes.of_c}"
    return native.calling(name, address, arguments, chunk, *ranges)


def constants(dtype: DType, *numbers: float | UOp) -> list[UOp]:
    return [x.cast(dtype) if isinstance(x, UOp) else UOp.const(x, dtype) for x in numbers]


def gemv(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (n, k), x (t, k) -> x matrix', float32 (t, n).

    x is float32 and the matrix float32 or float16; or x is int16 and the matrix int8, or float16
    that is rounded to integers. Sums of integers have to fit into 32 bits.
    """
    y = Tensor.empty(x.shape[0], matrix.shape[0], device=x.device)
    address = native.address_of("gemv", x.device)
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
    return native.calling("gemv", address, arguments, chunk)


def few_vectors() -> Context:
    """A context for what needs no gradient, in which gemv multiplies as many vectors as it is
    faster with than BLAS or gemm.c, which copy the matrix."""
    return Context(FEW_VECTORS=FEW_VECTORS.value or (256 if "avx512bw" in processor() else 16))


def at_most(size: sint) -> int:
    return size if isinstance(size, int) else size.vmax


def in_kernel(size: sint) -> sint:
    """The size as an expression of a kernel's parameters, which the Variables are there."""
    if isinstance(size, int):
        return size
    size, values = size.unbind_all()
    return size.substitute({variable: variable.replace(op=Ops.PARAM) for variable in values})


def positions(n: sint) -> Tensor:
    """The integers (n,) from 0; `Tensor.arange` computes them as sums of ones where n varies."""
    return Tensor.arange(at_most(n))[:n]


def stored(x: Tensor) -> Tensor:
    """x in memory; if a size varies, at the start of a buffer of the largest shape of x."""
    shape = tuple(at_most(size) for size in x.shape)
    if x.shape == shape:  # of what a kernel has stored in another shape tinygrad makes a copy
        return x if x.uop.has_buffer_identity(after_ok=True) else x.contiguous()
    if x.uop.op is Ops.SHRINK and x.uop.src[0].shape == shape:
        return Tensor(x.uop.src[0])  # a KV cache, which x is the filled part of
    whole = Tensor.empty(*shape, device=x.device, dtype=x.dtype)
    filled = whole.shrink(tuple((0, size) for size in x.shape))
    return Tensor(whole.uop.after(filled.uop.store(x.uop)))
