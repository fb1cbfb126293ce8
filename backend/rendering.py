"""A function's kernels as C, which a compiler makes into a program for any processor."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from tinygrad import Context, Tensor, UOp, Variable
from tinygrad.codegen import to_program
from tinygrad.device import Buffer
from tinygrad.engine.realize import capturing, get_call_arg_uops
from tinygrad.helpers import Target
from tinygrad.renderer import Renderer
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import Ops, buffers

N_CHUNKS = 24  # 2, 3, 4, 6, 8, 12 or 24 cores take equal numbers of them


@dataclass(frozen=True)
class Call:
    """A call of a kernel: a C function's source and name, and the arguments: buffers, each with an
    offset in bytes, then names of variables. The variable `core_id` is the index of the chunk."""

    source: str
    name: str
    n_chunks: int
    buffers: list[tuple[Buffer, int]]
    variables: list[str]


class SourceRenderer(ClangRenderer):
    """Renders C with every system's own calling convention, and calls no compiler."""

    abi, kernel_typedef = "", "void"

    def __init__(self):
        Renderer.__init__(self, Target("CPU", arch="x86_64"))  # only tells that bfloat16 exists


def render_kernels(function: Callable, *tensors: Tensor, **variables: range) -> list[Call]:
    """The kernels that `function` runs on the CPU, in chunks for up to N_CHUNKS cores.

    The function takes realised tensors, and by name integers, each from the range in `variables`.
    gemv.c multiplies all matrices that it can. Nothing is compiled, and nothing is run.
    """
    bound = {
        name: Variable(name, numbers[0], numbers[-1]).bind(numbers[0])
        for name, numbers in variables.items()
    }
    kernels, renderer = [], SourceRenderer()
    # tinygrad gives kernels to a recorder in place of running them, as it does to capture a jit
    recorder = SimpleNamespace(add_linear=lambda linear, _: kernels.extend(linear.src))
    plain = {"RENDER_ONLY": 1, "NORM_OF_ROWS": 0, "FEW_VECTORS": 2**31 - 1, "SPEC": 0}
    with Context(NUM_CPU_THREADS=N_CHUNKS, CHUNKS_PER_CORE=1, **plain):
        capturing.append(recorder)
        try:
            function(*tensors, **bound)
        finally:
            capturing.clear()
        linear = memory_plan_rewrite(UOp(Ops.LINEAR, src=tuple(kernels)), set(buffers))
        return [call_of(kernel, to_program(kernel.src[0], renderer)) for kernel in linear.src]


def call_of(kernel: UOp, program: UOp) -> Call:
    source = next(part.arg for part in program.src if part.op is Ops.SOURCE)
    arguments = [argument.buffer for argument in get_call_arg_uops(kernel)]
    return Call(
        source,
        program.arg.function_name,
        program.arg.global_size[0],
        [(buffer.base, buffer.offset) for buffer in arguments],
        [variable.expr for variable in program.arg.vars],
    )
