"""Functions with custom gradients: attention and layer norm in C, on the CPU; embedding and
erf in tinygrad, on every backend."""

import functools
import math
from collections.abc import Callable

from tinygrad import Tensor, UOp, dtypes
from tinygrad.helpers import ContextVar, polyN
from tinygrad.uop.ops import AxisType, KernelInfo

from backend.cpu import native
from backend.cpu.native import address_of, blas, stored, stored_gradient
from backend.cpu.threads import CHUNKS_PER_CORE, chunk_of

ATTENTION_BLOCKS = ContextVar("ATTENTION_BLOCKS", 1)  # 0: the plain formula
NORM_OF_ROWS = ContextVar("NORM_OF_ROWS", 1)  # 0: the plain formula
MAX_D = 128  # of a head, in attention.c
Epsilons = tuple[float, float]


def has_attention_kernel(device: str, d: int) -> bool:
    """Whether attention.c computes attention with heads of size d."""
    is_on_cpu = device.startswith("CPU") and blas() is not None
    return is_on_cpu and bool(ATTENTION_BLOCKS) and d <= MAX_D


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: Callable) -> Tensor | None:
    """Causal attention, dropout(softmax(query key' / sqrt(d))) value, of float32 (b, t, h, d) each;
    None where there is no kernel.

    `dropout` is gpt_tiny's `no_dropout` or a Dropout, with a `rate` and a `next_key`. attention.c
    goes through blocks of rows, and keeps no scores in memory.
    """
    (b, t, h, d), device, rate = query.shape, query.device, getattr(dropout, "rate", 0)
    if not has_attention_kernel(device, d):
        return None
    address = address_of("attention", device)
    dropout_key = dropout.next_key() if rate else address  # without dropout it is not read
    results = (Tensor.empty(*shape, device=device) for shape in (query.shape, (b, h, 2, t)))
    tensors = *results, *map(stored, (query, key, value)), dropout_key, address
    kernel = functools.partial(attention_kernel, name="attention", rate=rate)
    gradient = functools.partial(attention_gradient, rate=rate)
    return Tensor.custom_kernel(*tensors, fxn=kernel, grad_fxn=gradient)[0]


def attention_gradient(grad_output: UOp, call: UOp, rate: float) -> tuple:
    output, statistics, *operands, dropout_key, _ = call.src[1:]
    grads = [x.empty_like() for x in operands]
    results = stored_gradient(grad_output), output.after(call), statistics.after(call)
    address = address_of("attention_gradients", output.device).uop
    kernel = functools.partial(attention_kernel, name="attention_gradients", rate=rate)
    tensors = *grads, *results, *operands, dropout_key, address
    return None, None, *UOp.custom_kernel(*tensors, fxn=kernel)[:3], None, None


def attention_kernel(*tensors: UOp, name: str, rate: float) -> UOp:
    """The cores divide the heads of all texts."""
    *tensors, address = tensors
    b, t, h, d = tensors[0].shape
    chunk, start, size = chunk_of(b * h, 0, b * h * t * t * d, CHUNKS_PER_CORE.value)
    threshold = UOp.const(int(rate * 2**32), dtypes.uint32)
    return native.call(name, address, [*tensors, start, start + size, h, t, d, threshold], chunk)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilons: Epsilons) -> Tensor | None:
    """(x - mean) / (sqrt(variance + epsilons[0]) + epsilons[1]) * gamma + beta of the rows of x
    (..., d); None where there is no kernel."""
    is_fixed = all(isinstance(size, int) for size in x.shape) and x.shape[-1] > 1
    is_float = x.dtype == gamma.dtype == beta.dtype == dtypes.float32
    if not (x.device.startswith("CPU") and is_fixed and is_float and NORM_OF_ROWS):
        return None
    shapes = x.shape, (x.numel() // x.shape[-1], 2)  # y; mean and root of each row
    results = (Tensor.empty(*shape, device=x.device) for shape in shapes)
    tensors = *results, *map(stored, (x, gamma, beta)), address_of("layer_norm", x.device)
    kernel = functools.partial(norm_kernel, name="layer_norm", epsilons=epsilons)
    gradient = functools.partial(norm_gradient, epsilons=epsilons)
    return Tensor.custom_kernel(*tensors, fxn=kernel, grad_fxn=gradient)[0]


def norm_gradient(grad_y: UOp, call: UOp, epsilons: Epsilons) -> tuple:
    _, statistics, x, gamma, *_ = call.src[1:]
    n_chunks = row_chunks(x)[0].vmax + 1
    partial_sums = UOp.empty(n_chunks, 2, x.shape[-1], device=x.device)  # of gamma and beta
    address = address_of("layer_norm_gradients", x.device).uop
    tensors = x.empty_like(), partial_sums, grad_y, statistics.after(call), x, gamma, address
    kernel = functools.partial(norm_kernel, name="layer_norm_gradients", epsilons=epsilons)
    grad_x, partial_sums, *_ = UOp.custom_kernel(*tensors, fxn=kernel)
    grad_gamma, grad_beta = Tensor(partial_sums).sum(0)
    return None, None, grad_x, grad_gamma.uop, grad_beta.uop, None


def norm_kernel(*tensors: UOp, name: str, epsilons: Epsilons) -> UOp:
    *tensors, address = tensors
    chunk, start, size = row_chunks(tensors[0])
    d, epsilons = tensors[0].shape[-1], map(float, epsilons)
    return native.call(name, address, [*tensors, chunk, start, start + size, d, *epsilons], chunk)


def row_chunks(x: UOp) -> tuple[UOp, UOp, UOp]:
    """`chunk_of` the rows."""
    return chunk_of(x.numel() // x.shape[-1], 0, x.numel(), CHUNKS_PER_CORE.value)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """ids of any shape, table (n_rows, d) -> float32 (*ids.shape, d)

    The gradient adds row after row to zeros. tinygrad's compares all ids with all rows, as does a
    product with one-hot rows, which is faster only for small tables on a GPU.
    """
    if not isinstance(table, Tensor):  # a QuantizedMatrix
        return table.rows(ids)
    if table.shape[0] <= 1024 and not table.device.startswith("CPU"):
        one_hot = (ids.unsqueeze(-1) == Tensor.arange(table.shape[0])).cast(dtypes.float32)
        return one_hot @ table
    rows = Tensor.empty(ids.numel(), table.shape[1], device=table.device)
    tensors = rows, table, ids.flatten().cast(dtypes.int32).contiguous()
    kernel = Tensor.custom_kernel(*tensors, fxn=copy_rows, grad_fxn=embedding_gradient)
    return kernel[0].reshape(*ids.shape, -1)


def embedding_gradient(grad_rows: UOp, call: UOp) -> tuple:
    _, _, table, ids = call.src
    zeros = Tensor.zeros(*table.shape, device=table.device).contiguous().uop
    return None, UOp.custom_kernel(zeros, stored_gradient(grad_rows), ids, fxn=add_rows)[0], None


def copy_rows(rows: UOp, table: UOp, ids: UOp) -> UOp:
    i, j = UOp.range(rows.shape[0], 0), UOp.range(rows.shape[1], 1)
    copy = rows[i, j].store(row(table, ids[i])[j].cast(rows.dtype))
    return copy.end(i, j).sink(arg=KernelInfo("copy_rows", opts_to_apply=()))


def add_rows(table: UOp, rows: UOp, ids: UOp) -> UOp:
    # one row at a time, since an id may occur twice; the columns may run in parallel
    i, j = UOp.range(rows.shape[0], 0, AxisType.LOOP), UOp.range(rows.shape[1], 1)
    element = row(table, ids[i])[j]
    add = element.store(element.load() + rows[i, j])
    return add.end(i, j).sink(arg=KernelInfo("add_rows", opts_to_apply=()))


def row(table: UOp, id: UOp) -> UOp:
    # clipped, or else tinygrad would compute the index in 64 bits
    return table[id.clip(0, table.shape[0] - 1).cast(dtypes.weakint)]


# XLA's minimax approximation of erf, x P(x^2) / Q(x^2), up to where float32 rounds erf to 1
ERF_LIMIT = 3.832506856900711
P = 2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 0.18520832239976145
P = *P, 1.128379143519084
Q = -1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3, 1.4070470171167667e-2
Q = *Q, 0.11098505178285362, 0.49746925110067538, 1


def erf(x: Tensor) -> Tensor:
    """The error function of float32, with an error of up to 3e-7, as tinygrad's; exact GELU takes
    half the time, since the gradient has none of the approximation's terms."""
    clipped = x.clip(-ERF_LIMIT, ERF_LIMIT)
    y = clipped * polyN(clipped.square(), P) / polyN(clipped.square(), Q)
    derivative = (-x.square()).exp() * (2 / math.sqrt(math.pi))
    # the last term is 0, and is dropped before it is computed; its gradient is the derivative
    return y.detach() + (x - x.detach()) * derivative.detach()
