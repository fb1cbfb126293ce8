"""The compiler is CC, a clang on the PATH, or ziglang's; its objects are cached and checked."""

import ctypes
import io
import os
import shlex
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, not_on_windows
from tinygrad import Device, Tensor, helpers
from tinygrad.device import TinyELF

import backend.cpu.compiler
from backend.cpu.compiler import PROBE, CPUCompiler, CPUProgram

pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tests the backend DEV=CPU")
ZIGLANG = "ziglang"


@pytest.fixture
def compiler():
    return Device["CPU"].renderer.compiler


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """An empty folder as the whole PATH, without CC."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def write_program(path: Path, script: str) -> Path:
    if sys.platform == "win32":
        pytest.skip("writes a program for a shell")
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def write_clang(path: Path) -> Path:
    zig = Path(pytest.importorskip(ZIGLANG).__file__).parent / "zig"
    return write_program(path, f'exec {shlex.quote(str(zig))} clang "$@"')


def test_ziglang_serves_where_there_is_no_clang(compiler, path, capfd):
    command = compiler.find()
    assert ZIGLANG in command[0]
    assert compiler.compile(PROBE, command).startswith(b"\x7fELF")
    assert capfd.readouterr() == ("", "")


def test_a_clang_on_the_path_wins(compiler, path, capfd):
    clang = write_clang(path / "clang")
    assert compiler.find() == [str(clang)]
    assert capfd.readouterr() == ("", "")


def test_a_clang_may_be_in_a_folder_with_a_space(compiler, path, monkeypatch, capfd):
    (path / "my programs").mkdir()
    clang = write_clang(path / "my programs" / "clang")
    monkeypatch.setenv("PATH", str(clang.parent))
    assert compiler.find() == [str(clang)]
    monkeypatch.setenv("CC", str(clang))
    assert compiler.find() == [str(clang)]
    assert capfd.readouterr() == ("", "")


def test_a_clang_that_does_not_compile_is_left_with_a_warning(compiler, path, capfd):
    clang = write_program(path / "clang", "exit 1")
    assert ZIGLANG in compiler.find()[0]
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"warning: {clang}")


@pytest.mark.parametrize("forks", [True, False])
def test_the_warning_is_printed_once_whatever_processes_compile(path, forks):
    code = f"""
import backend, numpy as np
from tinygrad import Tensor
from backend.cpu import processes
if not {forks}:
    processes.can_fork = lambda: False
x = Tensor(np.ones(7, np.float32)).realize()
Tensor.realize(x.sum(), (x * 2).contiguous())
"""
    gcc = write_program(path / "gcc", "exit 1")
    environment = os.environ | {"DEV": "CPU", "CC": str(gcc), "CACHEDB": str(path / "cache.db")}
    command = [sys.executable, "-c", code]
    options = {"env": environment | {"PARALLEL": "2"}, "capture_output": True, "text": True}
    process = subprocess.run(command, cwd=ROOT, **options)
    assert process.returncode == 0
    assert process.stderr == f"warning: {gcc} can't compile what tinygrad writes\n"


def test_cc_wins_and_may_hold_options(compiler, path, monkeypatch):
    write_clang(path / "clang")
    mine = write_clang(path / "my clang")
    monkeypatch.setenv("CC", f"{shlex.quote(str(mine))} -Wall")
    assert compiler.find() == [str(mine), "-Wall"]


def test_on_a_machine_without_a_compiler_the_backend_works(path, tmp_path):
    code = "import backend; from tinygrad import Tensor; print((Tensor([2.0]) * 3).tolist())"
    environment = {**os.environ, "DEV": "CPU", "CACHEDB": str(tmp_path / "cache.db")}
    assert shutil.which("clang") is None
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (process.stdout, process.stderr) == ("[6.0]\n", "")


def test_a_terminal_shows_a_bar_while_kernels_are_compiled_and_none_after(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    x = Tensor(np.ones(7, np.float32)).realize()
    Tensor.realize(x.sum(), (x * 2).contiguous())
    *bars, erased = terminal.getvalue().split("\r")[1:]
    assert all(bar.startswith("compiling: ") for bar in bars) and " 2/2 [" in bars[-1]
    assert erased == "\x1b[K"


def test_kernels_of_one_name_compiled_together_keep_their_code(compiler):
    loop = "for (int i = 0; i < 8; i++) x[i] = i / 3.0f;"
    bodies = {"x[0] += 1;": 5, loop: 0, "x[0] *= x[0];": 16}
    sources = [f"ABI void f(float *x) {{ {body} }}" for body in bodies]
    compiler.compile_cached(sources[0])
    objects = compiler.compile_together(dict.fromkeys(sources, "f"))
    for source, expected in zip(sources, bodies.values(), strict=True):
        assert compiler.cached(source) == objects[source]
        target = Device["CPU"].renderer.target
        program = CPUProgram(Device["CPU"], TinyELF(objects[source], "", target, ()))
        x = np.full(8, 4, np.float32)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(program.addr)(x.ctypes.data)
        assert x[0] == expected


def test_a_started_compilation_is_waited_for(compiler, monkeypatch):
    source = "ABI void f(float *x) { x[0] += 3; }"
    monkeypatch.setattr(compiler, "cachekey", None)  # nothing is kept
    compiler.start(source)
    monkeypatch.setattr(compiler, "spawn", None)  # nor started
    compiler.start(source)
    assert compiler.compile_cached(source).startswith(b"\x7fELF")


KILLED = """
import os, signal, sys
import backend, numpy as np
from tinygrad import Tensor
from backend.cpu import processes
if sys.argv[1] == "forks":
    processes.init_fork = os.abort
elif sys.argv[1] == "starts":
    processes.can_fork = lambda: False
    processes.worker._init_worker = os.abort
x = Tensor(np.ones(7, np.float32)).realize()
if sys.argv[1] == "idle":
    Tensor.realize(x.max(), (x * 3).contiguous())
    for process in processes.pool().executor._processes:
        os.kill(process, signal.SIGKILL)
y, z = x.sum(), (x * 2).contiguous()
Tensor.realize(y, z)
print(y.item(), z.tolist()[0])
"""


@pytest.mark.parametrize("kind", ["forks", "starts", "idle"])
def test_kernels_of_a_killed_compiling_process_are_compiled_here(kind, tmp_path):
    environment = os.environ | {"PARALLEL": "2", "CACHEDB": str(tmp_path / "cache.db")}
    command = [sys.executable, "-c", KILLED, kind]
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 60}
    process = subprocess.run(command, cwd=ROOT, **options)
    assert (process.stdout, process.stderr, process.returncode) == ("7.0 2.0\n", "", 0)


@not_on_windows("has no groups of processes")
def test_ctrl_c_in_a_terminal_reaches_no_compiler(compiler):
    leads_a_group = "import os; print(os.getpgrp() == os.getpid())"
    assert compiler.compile("", [sys.executable, "-c", leads_a_group]) == b"True\n"


def test_a_kept_object_that_is_damaged_or_foreign_is_compiled_anew(compiler):
    source = "ABI void f(float *x) { x[0] *= 7; }"
    good = compiler.compile_cached(source)
    kept = helpers.diskcache_get(compiler.cachekey, source)
    entry_beyond = good[:24] + b"\xff" * 8 + good[32:]
    one_bit = kept[:150] + bytes([kept[150] ^ 1]) + kept[151:]
    for damaged in (kept[:-100], one_bit, entry_beyond, good, b"", "text"):
        helpers.diskcache_put(compiler.cachekey, source, damaged)
        assert compiler.cached(source) is None
        assert compiler.compile_cached(source) == good
        assert compiler.cached(source) == good


def test_a_damaged_cache_costs_time_alone(compiler, tmp_path, monkeypatch):
    (tmp_path / "cache.db").write_bytes(b"damaged" * 1000)
    connection = sqlite3.connect(tmp_path / "cache.db")
    monkeypatch.setattr(helpers, "_db_connection", connection)
    assert compiler.compile_cached("void f(void) {}").startswith(b"\x7fELF")
    connection.close()


def test_the_cache_key_depends_on_the_compiler_module_and_the_processor(
    compiler, tmp_path, monkeypatch
):
    def key() -> str:
        return CPUCompiler([compiler.arch, "native"]).cachekey

    assert key() == compiler.cachekey
    monkeypatch.setattr(backend.cpu.compiler, "processor", lambda: "another")
    assert key() != compiler.cachekey
    monkeypatch.undo()
    source = Path(backend.cpu.compiler.__file__).read_bytes()
    (tmp_path / "compiler.py").write_bytes(source.replace(b"e_entry", b"e_shoff"))
    monkeypatch.setattr(backend.cpu.compiler, "__file__", str(tmp_path / "compiler.py"))
    assert key() != compiler.cachekey
