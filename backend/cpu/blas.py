"""The BLAS that numpy brings, in this process already."""

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tinygrad import dtypes
from tinygrad.dtype import DType


@dataclass(frozen=True)
class Blas:
    sgemm: int  # the address of cblas_sgemm
    integer: DType  # of its sizes


@functools.cache
def blas() -> Blas | None:
    """The BLAS that numpy was built with (OpenBLAS, MKL or Accelerate), unless BLAS=0."""
    if os.environ.get("BLAS") == "0":
        return None
    # Symbols are looked for in what this module was linked with, too, except by Windows.
    module = np._core._multiarray_umath.__file__
    if sys.platform == "win32":
        module = next(Path(np.__file__).parents[1].glob("numpy.libs/*openblas*.dll"), module)
    library = ctypes.CDLL(str(module))
    for name in ("scipy_{}64_", "{}64_", "scipy_{}", "{}"):
        if sgemm := getattr(library, name.format("cblas_sgemm"), None):
            # A kernel runs on all cores already, each of which calls BLAS for its chunk.
            for setter in (name.format("openblas_set_num_threads"), "MKL_Set_Num_Threads"):
                if hasattr(library, setter):
                    getattr(library, setter)(1)
            address = ctypes.cast(sgemm, ctypes.c_void_p).value
            return Blas(address, dtypes.int64 if "64" in name else dtypes.int32)
    return None
