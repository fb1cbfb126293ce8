"""tinygrad's CPU device, `ops_cpu`, imported without two renderers that it does not use here.

tinygrad 0.14.0 imports them in any case, a tenth of a start; this can go when it does so on demand.
"""

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
