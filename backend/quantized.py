"""Quantized matrices, of 8 or 16 bits a number: generation is as fast as memory is read."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.helpers import NUM_CPU_THREADS

from backend.arrays import as_numpy, from_numpy
from backend.cpu.native import blas
from backend.functional import embedding
from backend.matmul import einsum, gemv

# the greatest value of a quantized matrix: of float16, the greatest integer that 11 bits hold
QMAX = {"int8": 127, "float16": 2047}


@dataclass
class QuantizedMatrix:
    """A matrix `values * scales` (n, k), which `einsum` and `embedding` take in place of a tensor.

    values (n, k) are int8, or float16 up to 2047; scales (n, 1) are float32. On the CPU gemv.c
    reads the values as they are. The vectors that it multiplies by int8, or several by float16, are
    quantized to int16, as far as sums of 32 bits allow.
    """

    values: Tensor
    scales: Tensor
    kind: str

    @staticmethod
    def of(matrix: Tensor, kind: str) -> "QuantizedMatrix":
        """Quantizes a realised matrix (n, k) to "int8" or "float16"."""
        matrix = as_numpy(matrix)
        values, scales = np.empty(matrix.shape, kind), np.empty((len(matrix), 1), np.float32)
        n_rows = max(1, 2**18 // matrix.shape[1])  # at once: what a core's cache holds

        def quantize_rows(start: int) -> None:
            rows = matrix[start : start + n_rows].astype(np.float32, copy=False)
            scale = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-30) / QMAX[kind]
            if kind == "float16":  # a power of 2, with which float16 stays what it was
                scale = np.exp2(np.ceil(np.log2(scale)))
            rows = rows / scale
            values[start : start + n_rows] = rows if kind == "float16" else np.rint(rows)
            scales[start : start + n_rows] = scale

        with ThreadPoolExecutor(NUM_CPU_THREADS.value) as threads:
            list(threads.map(quantize_rows, range(0, len(matrix), n_rows)))
        return QuantizedMatrix(from_numpy(values), from_numpy(scales), kind)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def product(self, spec: str, x: Tensor) -> Tensor:
        """einsum(spec, x, self)"""
        letters_x, letters, letters_y = spec.replace("->", ",").split(",")
        if letters != letters_y[-1] + letters_x[-1]:
            return einsum(spec, x, self.values.cast(dtypes.float32) * self.scales)
        flat = x.reshape(-1, x.shape[-1])  # (t, k)
        if not (x.device.startswith("CPU") and blas()):
            y = einsum("tk,nk->tn", flat, self.values.cast(dtypes.float32))
        elif self.kind == "float16" and flat.shape[0] == 1:  # as fast as integers, and exact
            y = gemv(self.values, flat)
        else:
            if flat.shape[0] > 1:
                flat = flat.contiguous()  # read three times
            # clang vectorises a maximum of integers; among floats there may be NaN
            greatest = flat.abs().bitcast(dtypes.int32).max(-1, keepdim=True)  # (t, 1)
            scales = greatest.bitcast(dtypes.float32).maximum(1e-30) / self.qmax_of_vectors()
            y = gemv(self.values, (flat / scales).round().cast(dtypes.int16)) * scales
        return (y * self.scales.reshape(-1)).reshape(*x.shape[:-1], -1)

    def qmax_of_vectors(self) -> int:
        """The greatest integer that a vector may hold for no sum of gemv.c to overflow: each of its
        sums of 32 bits takes every eighth product, or fewer."""
        n_summed = math.ceil(self.shape[1] / 8)
        return min(32767, (2**31 - 1) // (QMAX[self.kind] * n_summed))

    def rows(self, ids: Tensor) -> Tensor:
        """embedding(ids, self)"""
        return embedding(ids, self.values) * embedding(ids, self.scales)
