"""Products of bfloat16 on a CPU that is fast at it, by C of our own: see gemm.c."""

import functools
from pathlib import Path

from tinygrad import Tensor

from backend.cpu.compiler import CPUProgram, addresses, compiled

SOURCE = Path(__file__).with_name("gemm.c").read_text(encoding="utf-8")


@functools.cache
def sbgemm() -> CPUProgram | None:
    """A function that takes what BLAS's cblas_sgemm takes, with operands of bfloat16 and integers
    of 64 bits; None where the processor is no faster so, which the compiler tells."""
    try:
        return compiled(SOURCE)
    except ValueError as error:
        if "no fast products of bfloat16" not in str(error):
            raise
        return None


def functions(dtype: str) -> list[Tensor]:
    """What a captured jit with products of this type reads beside its operands."""
    return addresses(sbgemm) if dtype == "bfloat16" else []
