"""The C compiler: `CC`, a clang on the PATH, or the one that the package ziglang carries."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from tinygrad import Device, helpers
from tinygrad.device import TinyELF
from tinygrad.helpers import ContextVar
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

from backend.errors import UserError

# tinygrad 0.14.0's CPU device imports two renderers that nothing here uses: a tenth of a start.
# This can go when it imports them on demand.
RENDERERS = {"tinygrad.renderer.nir": "LVPRenderer", "tinygrad.renderer.isa.x86": "X86Renderer"}
absent = [] if helpers.getenv("HCQ2") else RENDERERS.keys() - sys.modules.keys()
for module in absent:
    sys.modules[module] = SimpleNamespace(**{RENDERERS[module]: None})
import tinygrad.runtime.ops_cpu as ops_cpu  # noqa: E402

for module in absent:
    del sys.modules[module]

# Clang vectorises a sum only with leave to reorder it. -ffast-math as a whole would also take
# infinities and NaN for impossible. -O3 takes longer to compile, for code that is no faster.
FLAGS = (
    "-O2 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
)
ELF, ENTRY, SHT_SYMTAB = b"\x7fELF", 24, 2  # how a file begins, and where in it is the start
FREESTANDING = "-c -x c -fPIC -ffreestanding -nostdlib -fno-ident"
# How this system's programs call functions: what tinygrad renders does so, too.
DEFINITIONS = [f"-DABI={ClangRenderer.abi}"]
if sys.platform == "win32":  # it gives a stack its memory page by page, in their order
    DEFINITIONS += ["-Xclang", "-fstack-clash-protection"]
RENDER_ONLY = ContextVar("RENDER_ONLY", 0)  # kernels are not compiled, nor what they call
SAID = "GPT_TINY_SAID"  # a variable for the processes that this one starts
# What tinygrad writes is C with clang's vectors.
PROBE = "typedef float f4 __attribute__((ext_vector_type(4))); f4 f(f4 x) { return x + x.wzyx; }"


class CPUCompiler(ClangCompiler):
    """tinygrad's ClangCompiler, with flags of our own and any clang that there is."""

    def __init__(self, arch: Sequence[str]):
        super().__init__(arch)
        self.begun = {}  # source -> the process that compiles it
        self.command = self.find()
        # tinygrad's cache of compiled kernels, which checkouts and machines may share, knows only
        # their source; what an object is like, and where it begins, is up to this file
        form = repr((self.command, processor(), Path(__file__).read_bytes()))
        key = hashlib.sha256(form.encode()).hexdigest()[:16]
        self.cachekey = f"{self.cachekey}_{key}" if self.cachekey else None

    def compile(self, src: str) -> bytes:
        return self.call(self.command, src)

    def call(self, command: list[str], source: str) -> bytes:
        process = self.begun.pop(source, None) or self.start(command, source)
        code, errors = process.communicate()
        if process.returncode:
            raise ValueError(f"{command[0]} does not compile: {errors.decode()[:300]}")
        return code

    def start(self, command: list[str], source: str) -> subprocess.Popen:
        flags = f"{FREESTANDING} --target={self.arch}-none-unknown-elf {FLAGS} - -o -"
        command = [*command, *self.args, *DEFINITIONS, *flags.split()]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # in a session of its own: Ctrl-C is for this process, which may have to end a batch first
        process = subprocess.Popen(command, start_new_session=True, **pipes)
        with contextlib.suppress(OSError), process.stdin:  # `call` says why it has ended
            process.stdin.write(source.encode())
        process.stdin = None  # closed, or processes forked later would keep it open
        return process

    def begin(self, source: str) -> None:
        """Starts, if need be, what `compile_cached` waits for."""
        if not (RENDER_ONLY or source in self.begun or self.cached(source)):
            self.begun[source] = self.start(self.command, source)

    def compile_cached(self, source: str) -> bytes:
        if RENDER_ONLY:
            return b""
        return self.cached(source) or self.keep(source, self.compile(source))

    def cached_or_source(self, source: str) -> bytes:
        return self.cached(source) or source.encode()

    def cached(self, source: str) -> bytes | None:
        """Its object as it was kept, whole; None if there is none, or it is damaged."""
        with contextlib.suppress(Exception):  # whatever a damaged database raises
            return self.cachekey and unsealed(helpers.diskcache_get(self.cachekey, source))

    def keep(self, source: str, lib: bytes) -> bytes:
        with contextlib.suppress(sqlite3.Error):  # a full disk, say: nothing is lost but time
            if self.cachekey:
                helpers.diskcache_put(self.cachekey, source, sealed(lib))
        return lib

    def compile_together(self, sources: list[str]) -> dict[bytes, bytes]:
        """Source -> object, for sources of one function: the same but for where that begins."""
        renamed, names = [], []
        for number, source in enumerate(sources):
            name = re.search(r"^(?:\S+ )?void (\w+)\(", source, re.MULTILINE)[1]
            names.append(f"{name}_{number}")  # each process numbers its kernels by itself
            renamed.append(re.sub(rf"\b{name}\b", names[-1], source))
        code = self.compile("\n".join(renamed))
        places, libs = symbols(code), {}
        for source, name in zip(sources, names, strict=True):
            libs[source.encode()] = self.keep(source, beginning_at(places[name], code))
        return libs

    def find(self) -> list[str]:
        """The command of a working compiler: CC, a clang on the PATH, or ziglang's."""
        for command in (os.environ.get("CC"), shutil.which("clang")):
            try:
                if command:
                    words = [command] if os.path.isfile(command) else shlex.split(command)
                    self.call(words, PROBE)
                    return words
            except (OSError, ValueError):
                warn_once(f"warning: {command} can't compile what tinygrad writes")
        try:
            import ziglang
        except ImportError:
            reason = "no C compiler: pip install ziglang, or put a clang on the PATH"
            raise UserError(reason) from None
        return [str(Path(ziglang.__file__).parent / "zig"), "clang"]


def sealed(data: bytes) -> bytes:
    """To be kept: `unsealed` gives it back."""
    return hashlib.sha256(data).digest() + data


def unsealed(kept: bytes) -> bytes:
    """What was sealed; ValueError for anything else, damaged or foreign, be it by one bit."""
    data = kept[hashlib.sha256().digest_size :]
    if sealed(data) != kept:
        raise ValueError("it is not what was kept")
    return data


def warn_once(line: str) -> None:
    """On standard error, in this process and all that it starts."""
    said = os.environ.get(SAID, "").splitlines()
    if line not in said:
        print(line, file=sys.stderr)
        os.environ[SAID] = "\n".join([*said, line])


def symbols(code: bytes) -> dict[str, int]:
    """The names in an ELF file of 64 bits, and where in its section each stands."""
    [start], (step, n) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HH", code, 58)
    headers = [struct.unpack_from("<IIQQQQI", code, start + i * step) for i in range(n)]
    places = {}
    for _, kind, _, _, offset, size, link in headers:
        for at in range(offset, offset + size, 24) if kind == SHT_SYMTAB else ():
            name, _, _, _, place = struct.unpack_from("<IBBHQ", code, at)
            name = code[headers[link][4] + name :].partition(b"\0")[0]
            places[name.decode()] = place
    return places


def beginning_at(place: int, code: bytes) -> bytes:
    """An ELF file whose header says that its function begins there."""
    return code[:ENTRY] + place.to_bytes(8, "little") + code[ENTRY + 8 :]


class CPUProgram(ops_cpu.CPUProgram):
    """tinygrad's, which begins where the ELF file's header says."""

    def __init__(self, dev, obj: TinyELF):
        super().__init__(dev, obj)
        if not obj.lib.startswith(ELF):
            return
        self.addr += int.from_bytes(obj.lib[ENTRY : ENTRY + 8], "little")
        self.fxn = ctypes.CFUNCTYPE(None)(self.addr)


def source_of(file: str, **macros: object) -> str:
    lines = [f"#define {name} {text}\n" for name, text in macros.items()]
    return "".join(lines) + Path(__file__).with_name(file).read_text(encoding="utf-8")


def begin_c(file: str, **macros: object) -> None:
    """Begins to compile what `load_c` will load."""
    Device["CPU"].renderer.compiler.begin(source_of(file, **macros))


def load_c(file: str, function: str = "", **macros: object) -> CPUProgram:
    """The function, or the first one, of C beside this file, with these macros; it is at `addr` as
    long as the program exists."""
    device = Device["CPU"]
    code = device.renderer.compiler.compile_cached(source_of(file, **macros))
    code = beginning_at(symbols(code)[function], code) if function else code
    return CPUProgram(device, TinyELF(code, "", device.renderer.target, ()))


@functools.cache
def processor() -> str:
    """What tells this machine's processor from others that the same code may not run on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        telling = "model name", "flags", "CPU part", "Features"  # the latter two of Arm
        return " ".join(sorted({x for x in lines if x.startswith(telling)}))
    return platform.processor()
