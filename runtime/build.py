"""Compiles the sources of an exported model, for any platform, with ziglang's compiler."""

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
from backend.files import replacing_file, write_file

ZIG = Path(ziglang.__file__).parent / "zig"
RUNTIME = Path(__file__).parent
GEMV = RUNTIME.parent / "backend" / "cpu"  # the folder of gemv.c
SHARED_FILES = [RUNTIME / name for name in ("generation.c", "tokenizer.c", "sampling.c")]
PROGRAM_FILES = [RUNTIME / name for name in ("program.c", "system.c", "whole.c")]
X86 = {"sse2": "x86_64", "avx2": "x86_64_v3", "avx512": "x86_64_v4+avx512vnni"}
# whole.c comes first in a Linux program's file, and runs first.
WHOLE_FIRST = ("-static", "-Wl,-e,start", "-Wl,-z,norelro", "-T", RUNTIME / "program.ld")
ALIGNMENT = 64  # bytes: of the model in a program's file
MAX_MODEL_BYTES = (4 << 30) - (32 << 20)  # in a program for Windows and macOS
# macOS signs a program's whole file, so the model is linked in instead of appended.
LINKED = """.section __MODEL,__model
.globl _linked
.p2align 6
_linked: .incbin "model.bin"
"""


@dataclass(frozen=True)
class Target:
    """A platform by zig's name. `processors`: suffix of kernels in system.c -> zig's processor."""

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


def zig(*arguments: str | Path, folder: Path | None = None) -> None:
    run = subprocess.run([ZIG, *arguments], capture_output=True, text=True, cwd=folder)
    if run.returncode:
        raise UserError(f"zig can't compile this model: {run.stderr[:300]}")


def compile_c(sources: Path, output: Path, *arguments: str | Path) -> Path:
    """Compiles or links C, which includes files of the folder `sources`; returns `output`."""
    integer = "int" if blas() is None or blas().integer.itemsize == 4 else "long long"
    options = ["cc", *FLAGS.split(), "-fno-strict-aliasing", "-s", "-DABI=static"]
    options += [f"-DBLAS_INTEGER={integer}", "-I", sources, "-I", RUNTIME, "-I", GEMV]
    zig(*options, *arguments, "-o", output)
    return output


def write_program(target: Target, sources: Path, output: Path) -> None:
    """Writes a program of the C and of `model.bin` in the folder `sources`, whole or not at all."""
    model = sources / "model.bin"
    if (n_bytes := model.stat().st_size) > MAX_MODEL_BYTES and "linux" not in target.triple:
        need = f"the program would need {n_bytes / 1e9:.1f} GB, and its system allows 4.3"
        raise UserError(f"{need}: try --weights int8")

    def compile_kernels(name: str) -> Path:
        flags = [f"-mcpu={target.processors[name]}", "-target", target.triple]
        flags += [f"-DKERNELS=kernels_{name}", f"-DHALVES_ARE_SINGLE={int(name == 'sse2')}"]
        return compile_c(sources, sources / f"{name}.o", "-c", *flags, RUNTIME / "steps.c")

    with ThreadPoolExecutor(NUM_CPU_THREADS.value) as threads:
        objects = list(threads.map(compile_kernels, target.processors))
    files = ["-target", target.triple, *target.flags, *PROGRAM_FILES, *SHARED_FILES, *objects]
    if target.links_model:
        seal(model, 0)
        files.append(model_object(target, sources))
    program = compile_c(sources, sources / "program", *files)
    with replacing_file(output) as new:
        shutil.copyfile(program, new)
        if not target.links_model:
            append(model, new)
        new.chmod(0o755)


def model_object(target: Target, sources: Path) -> Path:
    """An object file of `model.bin` in the folder `sources`; `zig cc` would cache a copy of it."""
    (sources / "model.s").write_text(LINKED, encoding="utf-8")
    triple = target.triple.replace("-", "-apple-")
    zig("clang", "-c", f"--target={triple}", "model.s", "-o", "model.o", folder=sources)
    return sources / "model.o"


def append(model: Path, program: Path) -> None:
    with program.open("ab") as file, model.open("rb") as weights:
        file.write(bytes(-file.tell() % ALIGNMENT))
        offset = file.tell()
        shutil.copyfileobj(weights, file, 1 << 24)
    seal(program, offset)


def seal(path: Path, offset: int) -> None:
    """Appends the model's offset, 8 letters, and the checksum of the file, for whole.c."""
    with path.open("ab") as file:
        file.write(offset.to_bytes(8, "little") + b"gpt-tiny")
        file.flush()
        file.write(checksum(path).to_bytes(8, "little"))


def checksum(path: Path) -> int:
    """The sum over i of (2 i + 1) times a file's i-th integer of 64 bits, modulo 2^64."""
    words, total = np.memmap(path, "<u8", "r"), 0
    for start in range(0, len(words), 1 << 20):
        part = words[start : start + (1 << 20)]
        factors = np.arange(start, start + len(part), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        total += int((part * factors).sum(dtype=np.uint64))
    return total % (1 << 64)


def write_page(title: str, sources: Path, index: Path, weights: Path | None = None) -> None:
    """Writes a page of the C and of `model.bin` in the folder `sources`; with a path `weights`, in
    the page's folder, the page fetches `model.bin` from there."""
    text = page_text(title, sources, weights.name if weights else "")
    if weights:
        with replacing_file(weights) as new:
            shutil.copyfile(sources / "model.bin", new)
    write_file(index, text.encode())


def page_text(title: str, sources: Path, address: str) -> str:
    """The page in HTML, with `model.bin` in it or, unless it is empty, at the relative address."""
    files = [RUNTIME / "page.c", RUNTIME / "steps.c", *SHARED_FILES]
    code = compile_c(sources, sources / "model.wasm", *WASM, *files).read_bytes()
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
    """The hash of a script or a style in a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
