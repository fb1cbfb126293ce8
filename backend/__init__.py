"""What tinygrad lacks, for any program: importing this package is enough to have it.

Read `errors`, `machine` (what differs from one to another), `blas` (matrix products), `bfloat16`
(those of CPUs that are fast at it), `products` and `rounded` (those of generation), `sizes` (that
vary), `imports`, `cores`, `compiler`, `processes` and `cpu` (the CPU as a device), then `devices`
(which backend), `locks`, `caches` and `capture` (what is kept for the next start), `rendered`
(kernels as C), `memory` and `lookup`.
Nothing here knows of a GPT.
"""

import backend.machine  # noqa: F401 - before tinygrad
from backend import cpu, devices
from backend.blas import einsum
from backend.lookup import look_up
from backend.memory import filled, zeros
from backend.sizes import positions

__all__ = ["cpu", "devices", "einsum", "filled", "look_up", "positions", "zeros"]

devices.choose()
