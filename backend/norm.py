"""Layer norm on the CPU, by norm.c: a kernel forward and one backward in place of a dozen."""

import functools
import math

from tinygrad import Tensor, UOp, dtypes
from tinygrad.helpers import ContextVar

from backend.cpu.native import address_of, calling
from backend.cpu.threads import CHUNKS_PER_CORE, chunk_of
from backend.matmul import stored

NORM_OF_ROWS = ContextVar("NORM_OF_ROWS", 1)  # 0 leaves it to the plain formula
Epsilons = tuple[float, float]


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilons: Epsilons) -> Tensor | None:
    """(x - mean) / (sqrt(variance + epsilons[0]) + epsilons[1]) * gamma + beta of the rows of x
    (..., d); None where the plain formula has to do."""
    is_fixed = all(isinstance(size, int) for size in x.shape) and x.shape[-1] > 1
    is_float = x.dtype == gamma.dtype == beta.dtype == dtypes.float32
    if not (x.device.startswith("CPU") and is_fixed and is_float and NORM_OF_ROWS):
        return None
    shapes = x.shape, (x.numel() // x.shape[-1], 2)
    results = (Tensor.empty(*shape, device=x.device) for shape in shapes)
    operands = *results, *map(stored, (x, gamma, beta)), address_of("layer_norm", x.device)
    kernel = functools.partial(norm_kernel, name="layer_norm", epsilons=epsilons)
    backward = functools.partial(gradients, epsilons=epsilons)
    sources = (operand.uop for operand in operands)
    return Tensor(UOp.custom_kernel(*sources, fxn=kernel, grad_fxn=backward)[0])


def gradients(of_y: UOp, call: UOp, epsilons: Epsilons) -> tuple:
    _, statistics, x, gamma, *_ = call.src[1:]
    shapes = x.shape, (chunks(x)[0].vmax + 1, 2, x.shape[-1])
    of_x, sums = (
        UOp.new_buffer(x.device, math.prod(shape), dtypes.float32).reshape(shape)
        for shape in shapes
    )
    address = address_of("layer_norm_gradients", x.device).uop
    sources = of_x, sums, of_y, statistics.after(call), x, gamma, address
    kernel = functools.partial(norm_kernel, name="layer_norm_gradients", epsilons=epsilons)
    of_x, sums, *_ = UOp.custom_kernel(*sources, fxn=kernel)
    of_gamma, of_beta = Tensor(sums).sum(0)
    return None, None, of_x, of_gamma.uop, of_beta.uop, None


def chunks(x: UOp) -> tuple[UOp, UOp, UOp]:
    """`chunk_of` the rows."""
    return chunk_of(x.numel() // x.shape[-1], 0, x.numel(), CHUNKS_PER_CORE.value)


def norm_kernel(*tensors: UOp, name: str, epsilons: Epsilons) -> UOp:
    """Calls a function of norm.c, whose arguments these are, and whose address is the last one."""
    *tensors, address = tensors
    chunk, first, size = chunks(tensors[0])
    d = UOp.const(tensors[0].shape[-1], dtypes.weakint)
    pointers = (tensor.flatten()[0] for tensor in tensors)
    integers = (integer.cast(dtypes.int32) for integer in (chunk, first, first + size, d))
    floats = (UOp.const(epsilon, dtypes.float32) for epsilon in epsilons)
    return calling(name, address, (*pointers, *integers, *floats), chunk)
