"""The kernels of a function as C, which a compiler for any processor can make a program of."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

from tinygrad import Context, Device, Tensor, UOp, Variable
from tinygrad.device import Buffer
from tinygrad.engine.jit import jit_lower
from tinygrad.engine.realize import capturing, get_call_arg_uops
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops, buffers

from backend.cpu import native
from backend.jit_cache import kernels_of

N_CHUNKS = 24  # equal numbers of chunks for each of 2, 3, 4, 6, 8, 12 or 24 cores


@dataclass(frozen=True)
class Call:
    """A call of a kernel: C of one function, its name there, and what it is called with.

    That is buffers, each with the place in it, in bytes, and then variables by name. `core_id` is
    one of these if the kernel comes in chunks: the number of the chunk.
    """

    source: str
    name: str
    n_chunks: int
    buffers: list[tuple[Buffer, int]]
    variables: list[str]


class Recorder:
    def __init__(self):
        self.kernels: list[UOp] = []

    def add_linear(self, linear: UOp, _) -> None:
        self.kernels += linear.src


def rendered(function: Callable, *tensors: Tensor, **values: range) -> list[Call]:
    """What `function` would run on the CPU, in chunks for up to N_CHUNKS cores.

    It takes realised tensors, and by name numbers, each of its `values`. All that gemv.c can
    multiply it does. Nothing is compiled, and nothing is run.
    """
    variables = {
        name: Variable(name, numbers[0], numbers[-1]).bind(numbers[0])
        for name, numbers in values.items()
    }
    recorder, compiler = Recorder(), Device["CPU"].renderer.compiler
    chunks = {"NUM_CPU_THREADS": N_CHUNKS, "CHUNKS_PER_CORE": 1}
    with (
        Context(SPEC=0, PARALLEL=0, FEW_VECTORS=2**31 - 1, **chunks),
        patch.object(compiler, "compile_cached", lambda source: b""),
        patch.object(native, "address", lambda name: 0),
    ):
        capturing.append(recorder)
        try:
            function(*tensors, **variables)
        finally:
            capturing.clear()
        held = set(buffers)
        linear = jit_lower(UOp(Ops.LINEAR, src=tuple(recorder.kernels)), held, [])
    return [call_of(kernel) for kernel in kernels_of(linear)]


def call_of(kernel: UOp) -> Call:
    program, info = kernel.src[0], kernel.src[0].arg
    source = next(part.arg for part in program.src if part.op is Ops.SOURCE)
    arguments = [argument.buffer for argument in get_call_arg_uops(kernel)]
    return Call(
        source.replace(ClangRenderer.abi, ""),  # this system's way to call is not every target's
        info.function_name,
        info.global_size[0],
        [(buffer.base, buffer.offset) for buffer in arguments],
        [variable.expr for variable in info.vars],
    )
