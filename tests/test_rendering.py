"""The kernels for backends that are not here: as source and, for CUDA, compiled.

It takes 40 s a backend, so the variable GPT_TINY_RENDER=METAL,CUDA,AMD has to ask for it. CUDA
needs its compiler: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RENDERED = os.environ.get("GPT_TINY_RENDER", "").split(",")


def only_if_asked(backend: str):
    return pytest.mark.skipif(
        backend not in RENDERED, reason=f"takes 40 s; GPT_TINY_RENDER={backend} asks for it"
    )


@pytest.fixture
def kernels(request, tmp_path) -> list[tuple[str, bytes]]:
    """Every kernel of a training and of a generation, as source and as compiled."""
    backend, *options = request.param.split()
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("render.py"), backend, tmp_path, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    pairs = [(p.read_text(), p.with_suffix(".bin").read_bytes()) for p in tmp_path.glob("*.txt")]
    assert len(pairs) > 50  # forward, backward, optimizer, windows, and generation
    return pairs


@only_if_asked("METAL")
@pytest.mark.parametrize("kernels", ["METAL"], indirect=True)
def test_every_kernel_is_rendered_for_metal_within_its_limits(kernels):
    for source, _ in kernels:
        buffers = re.search(r"kernel void \w+\((.*)\)", source)[1].count("device ")
        assert 1 <= buffers <= 31
        assert "double" not in source  # Metal has none
        shared = re.findall(r"threadgroup __attribute__\S* (\w+) \w+\[(\d+)\]", source)
        assert all(kind in ("float", "int", "uint") for kind, _ in shared)
        assert sum(4 * int(size) for _, size in shared) <= 32 << 10


@only_if_asked("CUDA")
@pytest.mark.parametrize("kernels", ["CUDA", "CUDA --dtype bfloat16"], indirect=True)
def test_every_kernel_compiles_for_cuda(kernels, request):
    for source, binary in kernels:
        name = re.search(r"__launch_bounds__\(\d+\) (\w+)\(", source)[1]
        assert binary.startswith(b"\x7fELF"), "NVRTC is not installed"
        assert f".text.{name}".encode() in binary
    use_tensor_cores = any("mma.sync" in source for source, _ in kernels)
    assert use_tensor_cores == ("bfloat16" in request.node.name)  # float32 is exact


@only_if_asked("AMD")
@pytest.mark.parametrize("kernels", ["AMD"], indirect=True)
def test_every_kernel_is_rendered_for_amd(kernels):
    for source, _ in kernels:
        assert re.search(r'extern "C".* void .*\w+\(.*\) *\{', source)
