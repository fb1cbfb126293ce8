"""C to a program or a page, by the compiler that the package ziglang carries, for any platform."""

import base64
import gzip
import hashlib
import html
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import ziglang
from tinygrad.helpers import NUM_CPU_THREADS

from backend.cpu.compiler import FLAGS
from backend.cpu.native import blas
from backend.errors import UserError

ZIG = Path(ziglang.__file__).parent / "zig"
RUNTIME = Path(__file__).parent
PRODUCTS = RUNTIME.parent / "backend" / "cpu"  # where gemv.c is
SHARED = [RUNTIME / name for name in ("generation.c", "tokenizer.c", "sampling.c")]
OF_PROGRAMS = [RUNTIME / name for name in ("program.c", "system.c", "whole.c")]
X86 = {"sse2": "x86_64", "avx2": "x86_64_v3", "avx512": "x86_64_v4+avx512vnni"}
# Of a program on Linux whole.c comes first, in its file and when it runs.
WHOLE_FIRST = ("-static", "-Wl,-e,start", "-Wl,-z,norelro", "-T", RUNTIME / "program.ld")
ALIGNMENT = 64  # bytes: of the model in a program's file
MOST_BYTES = (4 << 30) - (32 << 20)  # of a model in a program for Windows and macOS
# Where a signature covers a program's file, so that nothing can follow it, the model is linked in.
LINKED = """.section __MODEL,__model
.globl _linked
.p2align 6
_linked: .incbin "model.bin"
"""


@dataclass(frozen=True)
class Target:
    """A platform as zig names it, and zig's name of each kind of processor by that in system.c."""

    triple: str
    processors: dict[str, str]
    flags: tuple[str | Path, ...] = ()
    suffix: str = ""
    links_model: bool = False


ARM = {"any": "generic"}
TARGETS = {
    "x86_64-linux": Target("x86_64-linux-musl", X86, WHOLE_FIRST),
    "aarch64-linux": Target("aarch64-linux-musl", ARM, WHOLE_FIRST),
    "x86_64-windows": Target("x86_64-windows-gnu", X86, ("-lshell32",), ".exe"),
    "x86_64-macos": Target("x86_64-macos", X86, links_model=True),
    "aarch64-macos": Target("aarch64-macos", ARM, links_model=True),
}
WASM = ["-target", "wasm32-freestanding", "-msimd128", "-Wl,--no-entry", "-Wl,--export-memory"]
WASM += ["-DKERNELS=kernels_any", "-DHALVES_ARE_SINGLE", "-Wl,-z,stack-size=1048576"]


def zig(*words: str | Path, folder: Path | None = None) -> None:
    run = subprocess.run([ZIG, *words], capture_output=True, text=True, cwd=folder)
    if run.returncode:
        raise UserError(f"zig can't compile this model: {run.stderr[:300]}")


def compiled(sources: Path, output: Path, *arguments: str | Path) -> Path:
    """Calls zig for C of ours and that in the folder `sources`."""
    integer = "int" if blas() is None or blas().integer.itemsize == 4 else "long long"
    words = ["cc", *FLAGS.split(), "-fno-strict-aliasing", "-s", "-DABI="]
    words += [f"-DBLAS_INTEGER={integer}", "-I", sources, "-I", RUNTIME, "-I", PRODUCTS]
    zig(*words, *arguments, "-o", output)
    return output


def program(target: Target, sources: Path, output: Path) -> None:
    """The C in the folder `sources`, and `model.bin` there, as one file that runs on its own."""
    model = sources / "model.bin"
    if (n_bytes := model.stat().st_size) > MOST_BYTES and "linux" not in target.triple:
        need = f"the program would need {n_bytes / 1e9:.1f} GB, and its system allows 4.3"
        raise UserError(f"{need}: try --weights int8")

    def kernels(name: str) -> Path:
        flags = [f"-mcpu={target.processors[name]}", "-target", target.triple]
        flags += [f"-DKERNELS=kernels_{name}", f"-DHALVES_ARE_SINGLE={int(name == 'sse2')}"]
        return compiled(sources, sources / f"{name}.o", "-c", *flags, RUNTIME / "steps.c")

    with ThreadPoolExecutor(NUM_CPU_THREADS.value) as threads:
        objects = list(threads.map(kernels, target.processors))
    files = ["-target", target.triple, *target.flags, *OF_PROGRAMS, *SHARED, *objects]
    if target.links_model:
        seal(model, 0)
        compiled(sources, output, *files, linked(target, sources))
    else:
        code = compiled(sources, sources / "program", *files).read_bytes()
        code += bytes(-len(code) % ALIGNMENT)
        with output.open("wb") as file, model.open("rb") as weights:
            file.write(code)
            shutil.copyfileobj(weights, file, 1 << 24)
        seal(output, len(code))
    output.chmod(0o755)


def linked(target: Target, sources: Path) -> Path:
    """`model.bin` in the folder `sources` as an object. `zig cc` would keep it in its cache."""
    (sources / "model.s").write_text(LINKED, encoding="utf-8")
    triple = target.triple.replace("-", "-apple-")
    zig("clang", "-c", f"--target={triple}", "model.s", "-o", "model.o", folder=sources)
    return sources / "model.o"


def seal(path: Path, place: int) -> None:
    """Has a file end as whole.c expects: where the model is, 8 letters, and a sum of all before."""
    with path.open("ab") as file:
        file.write(place.to_bytes(8, "little") + b"gpt-tiny")
    sum_ = checksum(path)
    with path.open("ab") as file:
        file.write(sum_.to_bytes(8, "little"))


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
