"""Causal attention in blocks of rows on the CPU, by attention.c: without scores in memory."""

import functools
from collections.abc import Callable

from tinygrad import Tensor, UOp, dtypes
from tinygrad.helpers import ContextVar

from backend.cpu.native import address_of, blas, calling
from backend.cpu.threads import CHUNKS_PER_CORE, chunk_of
from backend.matmul import stored

ATTENTION_BLOCKS = ContextVar("ATTENTION_BLOCKS", 1)  # 0 leaves it to the plain formula
MOST_D = 128  # that attention.c has room for


def is_in_blocks(device: str, d: int) -> bool:
    """Whether attention.c computes the attention of heads of this size."""
    is_on_cpu = device.startswith("CPU") and blas() is not None
    return is_on_cpu and bool(ATTENTION_BLOCKS) and d <= MOST_D


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: Callable) -> Tensor | None:
    """query, key, value (b, t, h, d) -> dropout(softmax(query key' / sqrt(d))) value of the keys up
    to each query: (b, t, h, d), in float32; None where the plain formula has to do.

    `dropout` is one of gpt_tiny's: with a rate and a `next_key`, or none at all.
    """
    if not is_in_blocks(query.device, query.shape[-1]):
        return None
    (b, t, h, _), device, rate = query.shape, query.device, getattr(dropout, "rate", 0)
    address = address_of("attention", device)
    dropout_key = dropout.next_key() if rate else address  # any number: it changes nothing
    results = (Tensor.empty(*x, device=device) for x in (query.shape, (b, h, 2, t)))
    operands = map(stored, (query, key, value))
    sources = [x.uop for x in (*results, *operands, dropout_key, address)]
    kernel, backward = (functools.partial(f, rate=rate) for f in (attention_kernel, gradient))
    return Tensor(UOp.custom_kernel(*sources, fxn=kernel, grad_fxn=backward)[0])


def gradient(of_mixed: UOp, call: UOp, rate: float) -> tuple:
    mixed, statistics, *operands, dropout_key, _ = call.src[1:]
    mixed, statistics = mixed.after(call), statistics.after(call)
    if 1 in mixed.shape[2:]:  # behind a norm over one value it is a constant: no memory
        of_mixed = of_mixed.contiguous()
    of_operands = (UOp.new_buffer(x.device, x.numel(), x.dtype).reshape(x.shape) for x in operands)
    address = address_of("attention_gradients", mixed.device).uop
    sources = *of_operands, of_mixed, mixed, statistics, *operands, dropout_key, address
    kernel = functools.partial(attention_kernel, rate=rate)
    return None, None, *UOp.custom_kernel(*sources, fxn=kernel)[:3], None, None


def attention_kernel(*tensors: UOp, rate: float) -> UOp:
    """Calls the function of attention.c whose arguments these are, and whose address is the last
    one. The cores divide the heads of all texts."""
    *tensors, address = tensors
    b, t, h, d = tensors[0].shape
    chunk, first, size = chunk_of(b * h, 0, b * h * t * t * d, CHUNKS_PER_CORE.value)
    integers = (first, first + size, *(UOp.const(n, dtypes.weakint) for n in (h, t, d)))
    integers = (integer.cast(dtypes.int32) for integer in integers)
    pointers = (tensor.flatten()[0] for tensor in tensors)
    arguments = *pointers, *integers, UOp.const(int(rate * 2**32), dtypes.uint32)
    name = "attention" if len(tensors) == 6 else "attention_gradients"
    return calling(name, address, arguments, chunk)
