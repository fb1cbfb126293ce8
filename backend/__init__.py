"""Extensions of tinygrad for any program, in effect once this package is imported.

Read `errors`, `machine` (cores, memory, cache folder), `arrays` (memory), `matmul` (einsum),
`functional` (attention, layer norm, embedding, erf), `quantized` (matrices in 8 or 16 bits),
`devices` (the backend), `files` (written whole or not at all), `jit_cache` (jits on disk),
`rendering` (kernels as C), and `cpu`, the CPU as a device. Nothing here knows of a GPT.
"""

import backend.machine  # noqa: F401 - before tinygrad
from backend import devices
from backend.arrays import from_numpy, zeros
from backend.cpu import patches  # noqa: F401 - applies them
from backend.functional import attention, embedding, erf, layer_norm
from backend.matmul import einsum, positions

__all__ = ["attention", "devices", "einsum", "embedding", "erf", "from_numpy", "layer_norm"]
__all__ += ["positions", "zeros"]

devices.set_default()
