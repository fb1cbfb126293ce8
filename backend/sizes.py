"""Sizes that vary with a Variable of a jit, which tinygrad calls symbolic: `sint`."""

from tinygrad import Tensor
from tinygrad.uop.ops import Ops, sint


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
    if x.shape == shape:
        return x.contiguous()
    if x.uop.op is Ops.SHRINK and x.uop.src[0].shape == shape:
        return Tensor(x.uop.src[0])  # a KV cache, which x is the filled part of
    whole = Tensor.empty(*shape, device=x.device, dtype=x.dtype)
    filled = whole.shrink(tuple((0, size) for size in x.shape))
    return Tensor(whole.uop.after(filled.uop.store(x.uop)))
