"""The C compiler: `CC`, a clang on the PATH, or the clang of the package ziglang.

tinygrad calls `compile_cached` for a kernel, and `load_c` for a file of this folder; processes.py
calls `compile_together` for a batch of kernels. tinygrad's cache of kernels stores the objects.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from tinygrad import Device, helpers
from tinygrad.device import TinyELF
from tinygrad.helpers import ContextVar
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.autogen import libc
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

from backend.errors import UserError

# tinygrad 0.14.0's CPU device imports two renderers that this backend never uses: a tenth of a
# start. This can go when tinygrad imports renderers on demand.
RENDERERS = {"tinygrad.renderer.nir": "LVPRenderer", "tinygrad.renderer.isa.x86": "X86Renderer"}
absent = [] if helpers.getenv("HCQ2") else RENDERERS.keys() - sys.modules.keys()
for module in absent:
    sys.modules[module] = SimpleNamespace(**{RENDERERS[module]: None})
import tinygrad.runtime.ops_cpu as ops_cpu  # noqa: E402

for module in absent:
    del sys.modules[module]

# Clang vectorises a sum only if it may reorder the terms. -ffast-math as a whole would also exclude
# infinities and NaN. -O3 compiles for longer, and the code is no faster.
FLAGS = (
    "-O2 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
)
FREESTANDING = "-c -x c -fPIC -ffreestanding -nostdlib -fno-ident"
# ABI is the system's calling convention, as in the kernels that tinygrad renders.
DEFINITIONS = [f"-DABI={ClangRenderer.abi}"]
if sys.platform == "win32":  # Windows grows a stack only page by page
    DEFINITIONS += ["-Xclang", "-fstack-clash-protection"]
RENDER_ONLY = ContextVar("RENDER_ONLY", 0)  # 1: C is rendered and not compiled
WARNED = "GPT_TINY_SAID"  # environment variable: the warnings printed by this process and parents
# tinygrad renders C with clang's vector extensions
PROBE = "typedef float f4 __attribute__((ext_vector_type(4))); f4 f(f4 x) { return x + x.wzyx; }"


class CPUCompiler(ClangCompiler):
    """tinygrad's ClangCompiler with other flags, any clang, and a cache with checksums."""

    def __init__(self, arch: Sequence[str]):
        super().__init__(arch)
        self.started: dict[str, subprocess.Popen] = {}  # by source
        self.command = self.find()
        # tinygrad's cache, which checkouts and machines may share, is keyed by the source; objects
        # also depend on the compiler, the processor and this file
        form = repr((self.command, processor(), Path(__file__).read_bytes()))
        key = hashlib.sha256(form.encode()).hexdigest()[:16]
        self.cachekey = f"{self.cachekey}_{key}" if self.cachekey else None

    def find(self) -> list[str]:
        """The command of a working compiler: CC, a clang on the PATH, or ziglang's."""
        for command in (os.environ.get("CC"), shutil.which("clang")):
            try:
                if command:
                    words = [command] if os.path.isfile(command) else shlex.split(command)
                    self.compile(PROBE, words)
                    return words
            except (OSError, ValueError):
                warn_once(f"warning: {command} can't compile what tinygrad writes")
        try:
            import ziglang
        except ImportError:
            reason = "no C compiler: pip install ziglang, or put a clang on the PATH"
            raise UserError(reason) from None
        return [str(Path(ziglang.__file__).parent / "zig"), "clang"]

    def compile(self, src: str, command: Sequence[str] = ()) -> bytes:
        process = self.started.pop(src, None) or self.spawn(src, command or self.command)
        code, errors = process.communicate()
        if process.returncode:
            raise ValueError(f"{process.args[0]} does not compile: {errors.decode()[:300]}")
        return code

    def spawn(self, source: str, command: Sequence[str]) -> subprocess.Popen:
        flags = f"{FREESTANDING} --target={self.arch}-none-unknown-elf {FLAGS} - -o -"
        command = [*command, *self.args, *DEFINITIONS, *flags.split()]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # a new session: Ctrl-C is for this process, which may have to finish a batch
        process = subprocess.Popen(command, start_new_session=True, **pipes)
        with contextlib.suppress(OSError), process.stdin:  # `compile` says why clang ended
            process.stdin.write(source.encode())
        process.stdin = None  # closed: later forks do not inherit it
        return process

    def start(self, source: str) -> None:
        """Starts to compile in the background; `compile_cached` waits for the object."""
        if not (RENDER_ONLY or source in self.started or self.cached(source)):
            self.started[source] = self.spawn(source, self.command)

    def compile_cached(self, source: str) -> bytes:
        if RENDER_ONLY:
            return b""
        return self.cached(source) or self.cache(source, self.compile(source))

    def compile_together(self, kernels: dict[str, str]) -> dict[str, bytes]:
        """Objects by source, for {source: function's name}: one call of clang compiles all sources
        that are not cached, into objects that differ in the entry point alone."""
        objects = {source: self.cached(source) for source in kernels}
        missing = [source for source in kernels if not objects[source]]
        if not missing:
            return objects
        parts = []
        for i, source in enumerate(missing):  # several may have the same name
            name = kernels[source]
            parts.append(f"#define {name} kernel_{i}\n{source}\n#undef {name}\n")
        code = self.compile("".join(parts))
        offsets = symbol_offsets(code)
        for i, source in enumerate(missing):
            objects[source] = self.cache(source, with_entry(code, offsets[f"kernel_{i}"]))
        return objects

    def cached(self, source: str) -> bytes | None:
        """The object from the cache; None if it is missing or damaged."""
        with contextlib.suppress(Exception):  # a damaged database raises anything
            return self.cachekey and unsealed(helpers.diskcache_get(self.cachekey, source))

    def cache(self, source: str, code: bytes) -> bytes:
        """Writes the object to the cache, and returns it."""
        with contextlib.suppress(sqlite3.Error):  # a full disk: the next start compiles again
            if self.cachekey:
                helpers.diskcache_put(self.cachekey, source, sealed(code))
        return code


def sealed(data: bytes) -> bytes:
    """The data after a SHA-256 checksum."""
    return hashlib.sha256(data).digest() + data


def unsealed(stored: bytes) -> bytes:
    """The data without the checksum; ValueError if the checksum differs."""
    data = stored[hashlib.sha256().digest_size :]
    if sealed(data) != stored:
        raise ValueError("the checksum differs")
    return data


def warn_once(line: str) -> None:
    """Prints a warning that neither this process nor a parent process has printed."""
    warned = os.environ.get(WARNED, "").splitlines()
    if line not in warned:
        print(line, file=sys.stderr)
        os.environ[WARNED] = "\n".join([*warned, line])


def symbol_offsets(code: bytes) -> dict[str, int]:
    """The offset of each symbol of a 64-bit ELF file in the symbol's section, by name."""
    header = libc.Elf64_Ehdr.from_buffer_copy(code)
    sections = (libc.Elf64_Shdr * header.e_shnum).from_buffer_copy(code, header.e_shoff)
    table = next(section for section in sections if section.sh_type == libc.SHT_SYMTAB)
    n_symbols, names = table.sh_size // table.sh_entsize, sections[table.sh_link].sh_offset
    symbols = (libc.Elf64_Sym * n_symbols).from_buffer_copy(code, table.sh_offset)
    return {
        code[names + symbol.st_name :].partition(b"\0")[0].decode(): symbol.st_value
        for symbol in symbols
    }


def with_entry(code: bytes, offset: int) -> bytes:
    """The ELF file with this offset as the entry point in its header."""
    header = libc.Elf64_Ehdr.from_buffer_copy(code)
    header.e_entry = offset
    return bytes(header) + code[header.SIZE :]


class CPUProgram(ops_cpu.CPUProgram):
    """tinygrad's program, started at the entry point of the ELF file, not at offset 0."""

    def __init__(self, dev, obj: TinyELF):
        super().__init__(dev, obj)
        if obj.lib.startswith(libc.ELFMAG.encode()):
            self.addr += libc.Elf64_Ehdr.from_buffer_copy(obj.lib).e_entry
            self.fxn = ctypes.CFUNCTYPE(None)(self.addr)


def source_of(file: str, **macros: object) -> str:
    lines = [f"#define {name} {text}\n" for name, text in macros.items()]
    return "".join(lines) + Path(__file__).with_name(file).read_text(encoding="utf-8")


def start_c(file: str, **macros: object) -> None:
    """Starts to compile a C file of this folder in the background, for `load_c`."""
    Device["CPU"].renderer.compiler.start(source_of(file, **macros))


def load_c(file: str, function: str, **macros: object) -> CPUProgram:
    """Compiles a C file of this folder. The function's address is the program's `addr`, until the
    program is deleted."""
    device = Device["CPU"]
    code = device.renderer.compiler.compile_cached(source_of(file, **macros))
    code = with_entry(code, symbol_offsets(code)[function])
    return CPUProgram(device, TinyELF(code, "", device.renderer.target, ()))


@functools.cache
def processor() -> str:
    """Model name and instruction sets of the processor; part of the key of cached machine code."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = "model name", "flags", "CPU part", "Features"  # the latter two of Arm
        return " ".join(sorted({line for line in lines if line.startswith(fields)}))
    return platform.processor()
