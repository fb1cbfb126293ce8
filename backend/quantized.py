"""Matrices quantized to 8 or 16 bits: generation is as fast as memory is read."""

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

QMAX = {"int8": 127, "float16": 2047}  # the largest value; float16 holds integers of 11 bits


@dataclass
class QuantizedMatrix:
    """A matrix `values * scales` (n, k), which `einsum` and `embedding` take in place of a tensor.

    values (n, k) are int8, or float16 up to 2047; scales (n, 1) are float32. On the CPU gemv.c
    reads the values as stored, and multiplies vectors quantized to int16, as far as sums of 32 bits
    allow; a single vector by float16 stays float32.
    """

    values: Tensor
    scales: Tensor
    kind: str

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
            # clang vectorises a maximum of integers, not of floats, which may be NaN
            largest = flat.abs().bitcast(dtypes.int32).max(-1, keepdim=True)  # (t, 1)
            # a sum of 32 bits in gemv.c takes every eighth product, or fewer, and may not overflow
            n_summed = math.ceil(self.shape[1] / 8)
            qmax = min(32767, (2**31 - 1) // (QMAX[self.kind] * n_summed))
            scales = largest.bitcast(dtypes.float32).maximum(1e-30) / qmax
            y = gemv(self.values, (flat / scales).round().cast(dtypes.int16)) * scales
        return (y * self.scales.reshape(-1)).reshape(*x.shape[:-1], -1)

    def rows(self, ids: Tensor) -> Tensor:
        """embedding(ids, self)"""
        return embedding(ids, self.values) * embedding(ids, self.scales)


def quantize_matrix(matrix: Tensor, kind: str) -> QuantizedMatrix:
    """Quantizes a realised matrix (n, k) to "int8" or "float16"."""
    matrix = as_numpy(matrix)
    values, scales = np.empty(matrix.shape, kind), np.empty((len(matrix), 1), np.float32)
    n_rows = max(1, 2**18 // matrix.shape[1])  # at once, to fit into a core's cache

    def quantize_rows(start: int) -> None:
        rows = matrix[start : start + n_rows].astype(np.float32, copy=False)
        scale = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-30) / QMAX[kind]
        if kind == "float16":  # a power of 2, so that float16 weights stay exact
            scale = np.exp2(np.ceil(np.log2(scale)))
        rows = rows / scale
        values[start : start + n_rows] = rows if kind == "float16" else np.rint(rows)
        scales[start : start + n_rows] = scale

    with ThreadPoolExecutor(NUM_CPU_THREADS.value) as threads:
        list(threads.map(quantize_rows, range(0, len(matrix), n_rows)))
    return QuantizedMatrix(from_numpy(values), from_numpy(scales), kind)
