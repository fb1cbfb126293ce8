"""Sizes that vary with a variable of a captured jit, as tinygrad's symbolic shapes have them."""

from tinygrad import Tensor
from tinygrad.uop.ops import Ops, sint


def at_most(size: sint) -> int:
    return size if isinstance(size, int) else size.vmax


def in_kernel(size: sint) -> sint:
    """A size as kernels have it, to which the variables that it depends on are parameters."""
    if isinstance(size, int):
        return size
    size, values = size.unbind_all()
    return size.substitute({variable: variable.replace(op=Ops.PARAM) for variable in values})


def positions(n: sint) -> Tensor:
    """The numbers from 0 to before n; `Tensor.arange` adds up ones where n varies."""
    return Tensor.arange(at_most(n))[:n]


def stored(x: Tensor) -> Tensor:
    """x in memory; if a size varies, at the beginning of a tensor that is as large as x can be."""
    shape = tuple(at_most(size) for size in x.shape)
    if x.shape == shape:
        return x.contiguous()
    if x.uop.op is Ops.SHRINK and x.uop.src[0].shape == shape:
        return Tensor(x.uop.src[0])  # a cache, as far as it is full
    whole = Tensor.empty(*shape, device=x.device, dtype=x.dtype)
    place = whole.shrink(tuple((0, size) for size in x.shape))
    return Tensor(whole.uop.after(place.uop.store(x.uop)))
