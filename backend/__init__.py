"""What tinygrad lacks, for any program: importing this package is enough to have it.

Read `errors`, `machine` (what differs from one to another), `arrays` (memory), `matmul` (einsum),
`attention`, `norm`, `erf`, `lookup`, `quantized` (matrices in 8 or 16 bits), `devices` (which
backend), `files` (written whole or not at all), `jit_cache` (what is kept for the next start),
`rendered` (kernels as C), and `cpu`, the CPU as a device. Nothing here knows of a GPT.
"""

import backend.machine  # noqa: F401 - before tinygrad
from backend import devices
from backend.arrays import from_numpy, zeros
from backend.attention import attention
from backend.cpu import patches  # noqa: F401 - what tinygrad lacks on the CPU
from backend.erf import erf
from backend.lookup import look_up
from backend.matmul import einsum, positions
from backend.norm import layer_norm

__all__ = ["attention", "devices", "einsum", "erf", "from_numpy", "layer_norm", "look_up"]
__all__ += ["positions", "zeros"]

devices.set_default()
