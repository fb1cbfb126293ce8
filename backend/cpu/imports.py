"""tinygrad's CPU device, `ops_cpu`, without two renderers that take a tenth of a start."""

import sys
from types import SimpleNamespace

from tinygrad.helpers import getenv

RENDERERS = {"tinygrad.renderer.nir": "LVPRenderer", "tinygrad.renderer.isa.x86": "X86Renderer"}

absent = [] if getenv("HCQ2") else RENDERERS.keys() - sys.modules.keys()
for module in absent:
    sys.modules[module] = SimpleNamespace(**{RENDERERS[module]: None})

import tinygrad.runtime.ops_cpu as ops_cpu  # noqa: E402

for module in absent:
    del sys.modules[module]

__all__ = ["ops_cpu"]
