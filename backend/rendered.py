"""The kernels of a function as C, for a compiler of any processor."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from tinygrad import Context, Tensor, UOp, Variable
from tinygrad.device import Buffer
from tinygrad.engine.jit import jit_lower
from tinygrad.engine.realize import capturing, get_call_arg_uops
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops, buffers

N_CHUNKS = 24  # shared equally by 2, 3, 4, 6, 8, 12 or 24 cores


@dataclass(frozen=True)
class Call:
    """A call of a kernel: the source of one C function, its name, and its arguments.

    The arguments are buffers, each with an offset in bytes, and then variables by name. In a kernel
    with several chunks the variable `core_id` is the index of the chunk.
    """

    source: str
    name: str
    n_chunks: int
    buffers: list[tuple[Buffer, int]]
    variables: list[str]


def rendered(function: Callable, *tensors: Tensor, **variables: range) -> list[Call]:
    """The calls of kernels by which `function` runs on the CPU, in chunks for up to N_CHUNKS cores.

    The function takes realised tensors, and by name integers within the ranges in `variables`.
    gemv.c does every product that it can. Nothing is compiled or run.
    """
    bound = {
        name: Variable(name, numbers[0], numbers[-1]).bind(numbers[0])
        for name, numbers in variables.items()
    }
    kernels = []
    # tinygrad adds kernels here in place of running them, as when it captures a jit
    recorder = SimpleNamespace(add_linear=lambda linear, _: kernels.extend(linear.src))
    chunks = {"NUM_CPU_THREADS": N_CHUNKS, "CHUNKS_PER_CORE": 1}
    with Context(RENDER_ONLY=1, SPEC=0, PARALLEL=0, JIT=2, FEW_VECTORS=2**31 - 1, **chunks):
        capturing.append(recorder)
        try:
            function(*tensors, **bound)
        finally:
            capturing.clear()
        linear = jit_lower(UOp(Ops.LINEAR, src=tuple(kernels)), set(buffers), [])
    return [to_call(kernel) for kernel in linear.src]


def to_call(kernel: UOp) -> Call:
    program, info = kernel.src[0], kernel.src[0].arg
    source = next(part.arg for part in program.src if part.op is Ops.SOURCE)
    arguments = [argument.buffer for argument in get_call_arg_uops(kernel)]
    return Call(
        source.replace(ClangRenderer.abi, ""),  # without this system's calling convention
        info.function_name,
        info.global_size[0],
        [(buffer.base, buffer.offset) for buffer in arguments],
        [variable.expr for variable in info.vars],
    )
