"""The kernels of a function as C, of which a compiler makes a program for any processor."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from tinygrad import Context, Tensor, UOp, Variable
from tinygrad.device import Buffer
from tinygrad.engine.jit import jit_lower
from tinygrad.engine.realize import capturing, get_call_arg_uops
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops, buffers

N_CHUNKS = 24  # of which 2, 3, 4, 6, 8, 12 or 24 cores have equal numbers


@dataclass(frozen=True)
class Call:
    """A call of a kernel: its C, one function, the function's name, and the arguments.

    The arguments are buffers, each with an offset in bytes, and then variables by name. Of a kernel
    in chunks `core_id` is one of the variables: the number of the chunk.
    """

    source: str
    name: str
    n_chunks: int
    buffers: list[tuple[Buffer, int]]
    variables: list[str]


def rendered(function: Callable, *tensors: Tensor, **variables: range) -> list[Call]:
    """The kernels that `function` runs on the CPU, in chunks for up to N_CHUNKS cores.

    It takes realised tensors, and by name integers, each from the range in `variables`. gemv.c
    multiplies all that it can. Nothing is compiled, and nothing is run.
    """
    bound = {
        name: Variable(name, numbers[0], numbers[-1]).bind(numbers[0])
        for name, numbers in variables.items()
    }
    kernels = []
    # what tinygrad gives kernels to in place of running them, as it does to capture a jit
    recorder = SimpleNamespace(add_linear=lambda linear, _: kernels.extend(linear.src))
    chunks = {"NUM_CPU_THREADS": N_CHUNKS, "CHUNKS_PER_CORE": 1}
    with Context(RENDER_ONLY=1, SPEC=0, PARALLEL=0, JIT=2, FEW_VECTORS=2**31 - 1, **chunks):
        capturing.append(recorder)
        try:
            function(*tensors, **bound)
        finally:
            capturing.clear()
        linear = jit_lower(UOp(Ops.LINEAR, src=tuple(kernels)), set(buffers), [])
    return [call_of(kernel) for kernel in linear.src]


def call_of(kernel: UOp) -> Call:
    program, info = kernel.src[0], kernel.src[0].arg
    source = next(part.arg for part in program.src if part.op is Ops.SOURCE)
    arguments = [argument.buffer for argument in get_call_arg_uops(kernel)]
    return Call(
        source.replace(ClangRenderer.abi, ""),  # this system's calling convention
        info.function_name,
        info.global_size[0],
        [(buffer.base, buffer.offset) for buffer in arguments],
        [variable.expr for variable in info.vars],
    )
