"""Renders every kernel of a training run, and without options of generation, for a backend that is
not installed.

    python tests/render.py CUDA|METAL|AMD FOLDER [OPTION OF TRAIN.PY ...]

tinygrad's device NULL executes nothing and accepts the renderer of any backend. Compilers that are
not installed are replaced by ones that return the source. Each kernel is written to FOLDER:
NAME.txt is the source, NAME.bin the binary.
"""

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

TARGETS = {"CUDA": "NULL:CUDA:sm_80", "METAL": "NULL:METAL:Apple7", "AMD": "NULL:HIP:gfx1100"}
LARGEST = ["-c", "64", "-d", "64", "-h", "2", "-l", "1", "-b", "32", "-n", "1"]


def find_nvidia_file(variable: str, pattern: str) -> None:
    """Sets an unset variable to the path in NVIDIA's PyPI packages that matches the pattern."""
    spec = find_spec("nvidia")
    folders = map(Path, spec.submodule_search_locations if spec else [])
    for path in [path for folder in folders for path in sorted(folder.glob(pattern))][:1]:
        os.environ.setdefault(variable, str(path))


def render(backend: str, folder: Path, options: list[str]) -> None:
    os.environ["DEV"] = TARGETS[backend]
    os.environ["PARALLEL"] = "0"  # worker processes would lack the patches below
    if backend == "METAL":
        os.environ["MAX_KERNEL_BUFFERS"] = "31"  # tinygrad's limit for Metal; NULL has none
    find_nvidia_file("NVRTC_PATH", "*/lib/libnvrtc.so.*")
    find_nvidia_file("CUDA_PATH", "cuda_runtime")  # cuda_bf16.h

    from tinygrad import Device
    from tinygrad.device import Compiler
    from tinygrad.runtime.ops_null import NullAllocator
    from tinygrad.runtime.support import compiler_amd, compiler_cuda

    def copy_out(allocator, to: memoryview, buffer) -> None:
        to.cast("B")[:] = bytes(to.nbytes)  # zeros: garbage may be a loss that is not finite

    NullAllocator._copyout = copy_out
    sys.modules["tinygrad.runtime.ops_metal"] = SimpleNamespace(MetalCompiler=Compiler)
    compiler_amd.HIPCompiler = lambda arch: Compiler()
    if "NVRTC_PATH" not in os.environ:
        compiler_cuda.NVRTCCompiler = lambda arch, ptx, cache_key: Compiler()

    from tinygrad.codegen import to_program_cache
    from tinygrad.uop.ops import Ops

    import run
    import train

    renderer = Device[Device.DEFAULT].renderer  # a CUDA target without TF32
    renderer.target = replace(renderer.target, device=backend)

    model = str(folder / "model")
    commands = [(train.main, [*LARGEST, *options, "-o", model]), (run.main, [model, "-n", "2"])]
    if options:  # of training alone: generation is rendered without options
        train.print_example = lambda *_: None
        commands.pop()
    for main, arguments in commands:
        sys.argv = [f"{main.__module__}.py", *arguments]
        main()
    for number, program in enumerate(to_program_cache.values()):
        parts = {part.op: part.arg for part in program.src}
        (folder / f"{number:03}.txt").write_text(parts[Ops.SOURCE])
        (folder / f"{number:03}.bin").write_bytes(parts[Ops.BINARY])


if __name__ == "__main__":
    render(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
