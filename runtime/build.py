"""C to a program or a page, by the compiler that the package ziglang carries, for any platform."""

import base64
import gzip
import hashlib
import html
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import ziglang

from backend.cpu.compiler import FLAGS
from backend.errors import UserError
from backend.matmul import blas

ZIG = Path(ziglang.__file__).parent / "zig"
RUNTIME = Path(__file__).parent
PRODUCTS = RUNTIME.parent / "backend" / "cpu"  # where gemv.c is
SHARED = [RUNTIME / name for name in ("generation.c", "tokenizer.c", "sampling.c")]
X86 = {"sse2": "x86_64", "avx2": "x86_64_v3", "avx512": "x86_64_v4+avx512vnni"}
ALIGNMENT = 64  # bytes: of the model in a program's file


@dataclass(frozen=True)
class Target:
    """A platform as zig names it, and what its processors may be: a step's name, and zig's."""

    triple: str
    processors: dict[str, str]
    flags: tuple[str, ...] = ()
    suffix: str = ""


TARGETS = {
    "x86_64-linux": Target("x86_64-linux-musl", X86, ("-static",)),
    "aarch64-linux": Target("aarch64-linux-musl", {"any": "generic"}, ("-static",)),
    "x86_64-windows": Target("x86_64-windows-gnu", X86, ("-lshell32",), ".exe"),
    "x86_64-macos": Target("x86_64-macos", X86),
}
WASM = ("-target", "wasm32-freestanding", "-msimd128", "-DSTEP=step_any", "-DHALVES_ARE_SINGLE")
WASM += ("-Wl,--no-entry", "-Wl,-z,stack-size=1048576", "-Wl,--export-memory")


def this_machine() -> str:
    """The name of the target that this machine is or, of an Arm Mac, that it can run."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    is_arm = platform.machine().lower() in ("arm64", "aarch64") and system == "linux"
    return f"{'aarch64' if is_arm else 'x86_64'}-{system}"


def compiled(sources: Path, output: Path, *arguments: str | Path) -> Path:
    """Calls zig for C of ours and that in the folder `sources`."""
    integer = "int" if blas() is None or blas().integer.itemsize == 4 else "long long"
    words = [ZIG, "cc", *FLAGS.split(), "-fno-strict-aliasing", "-s", "-DABI="]
    words += [f"-DBLAS_INTEGER={integer}", "-I", sources, "-I", RUNTIME, "-I", PRODUCTS]
    words += [*arguments, "-o", output]
    run = subprocess.run(words, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"zig can't compile this model: {run.stderr[:300]}")
    return output


def program(target: Target, sources: Path, output: Path) -> None:
    """The C in the folder `sources`, and `model.bin` there, as one file that runs on its own."""

    def step(name: str) -> Path:
        flags = f"-mcpu={target.processors[name]}", f"-DSTEP=step_{name}", "-target", target.triple
        flags += (f"-DHALVES_ARE_SINGLE={int(name == 'sse2')}",)
        return compiled(sources, sources / f"{name}.o", "-c", *flags, RUNTIME / "steps.c")

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(step, target.processors))
    files = [RUNTIME / "program.c", RUNTIME / "system.c", *SHARED, *objects]
    code = compiled(
        sources, sources / "program", "-target", target.triple, *target.flags, *files
    ).read_bytes()
    code += bytes(-len(code) % ALIGNMENT)
    with output.open("wb") as file, (sources / "model.bin").open("rb") as model:
        file.write(code)
        while piece := model.read(1 << 24):
            file.write(piece)
        file.write(len(code).to_bytes(8, "little") + b"gpt-tiny")
    sum_ = checksum(output)
    with output.open("ab") as file:
        file.write(sum_.to_bytes(8, "little"))
    output.chmod(0o755)


def checksum(path: Path) -> int:
    """The sum of a file's numbers of 64 bits, each times an odd factor of its own, modulo 2^64."""
    words, total = np.memmap(path, "<u8", "r"), 0
    for start in range(0, len(words), 1 << 20):
        part = words[start : start + (1 << 20)]
        factors = np.arange(start, start + len(part), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        total += int((part * factors).sum(dtype=np.uint64))
    return total % (1 << 64)


def page(title: str, sources: Path, address: str = "") -> str:
    """The C in the folder `sources` as a page, with `model.bin` inside or else at an address."""
    files = [RUNTIME / "page.c", RUNTIME / "steps.c", *SHARED]
    code = compiled(sources, sources / "model.wasm", *WASM, *files).read_bytes()
    weights = "" if address else packed((sources / "model.bin").read_bytes())
    template = (RUNTIME / "page.html").read_text(encoding="utf-8")
    script = (RUNTIME / "page.js").read_text(encoding="utf-8")
    style = template.partition("<style>")[2].partition("</style>")[0]
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; worker-src blob:; "
    policy += f"script-src '{hash_of(script)}' 'wasm-unsafe-eval'; style-src '{hash_of(style)}'"
    return Template(template).substitute(
        policy=policy + ("; connect-src 'self'" if address else ""),
        title=html.escape(title),
        script=script,
        worker=(RUNTIME / "worker.js").read_text(encoding="utf-8"),
        program=packed(code),
        weights=weights,
        address=address,
    )


def packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def hash_of(text: str) -> str:
    """What a Content-Security-Policy names a text by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
