"""A jit that was kept gives what it gave when it was captured, and only the user's own is read."""

import contextlib
import os
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT
from tinygrad import Device, Tensor

from backend import jit_cache
from backend.arrays import copy_in, copy_out, from_numpy, zeros
from backend.cpu import native
from backend.jit_cache import CachedJit
from backend.matmul import einsum, gemv

pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="jits are kept for the CPU")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(jit_cache, "FOLDER", tmp_path / "gpt-tiny")
    return jit_cache.FOLDER


def powers() -> tuple[list[float], int]:
    """Of 3, by a captured function that multiplies by a number in its state; how often it ran."""
    state, n_runs = zeros(1), 0
    copy_in(state, np.ones(1, np.float32))

    def multiply(by: Tensor) -> None:
        nonlocal n_runs
        n_runs += 1
        state.assign(state * by).realize()

    multiply, numbers = jit_cache.CachedJit(multiply, [state], "powers"), []
    for _ in range(3):
        multiply(Tensor([3.0]).realize())
        numbers += copy_out(state).tolist()
    return numbers, n_runs


def test_a_kept_jit_gives_the_same_without_capturing_again(folder):
    assert powers() == ([3, 9, 27], 1)
    [kept] = folder.iterdir()
    assert sys.platform == "win32" or kept.stat().st_mode & 0o777 == 0o600
    assert powers() == ([3, 9, 27], 0)


def product_and_gemv() -> tuple[np.ndarray, int, set[str]]:
    """What a captured function computes by two functions in C, how often it ran, and the names of
    the functions whose addresses it reads."""
    rng, n_runs = np.random.default_rng(0), 0
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((1, 3, 8), (8, 8)))
    x, weight, y = from_numpy(x), from_numpy(weight), zeros(3, 8)

    def multiply(x: Tensor) -> None:
        nonlocal n_runs
        n_runs += 1
        y.assign(gemv(weight, einsum("bti,oi->bto", x, weight)[0])).realize()

    jit = CachedJit(multiply, [weight, y], "product and gemv")
    jit(x)
    read = jit.jit.captured._linear.toposort()
    return copy_out(y), n_runs, {native.names[buffer] for buffer in read if buffer in native.names}


def test_a_kept_jit_finds_functions_in_c_wherever_they_are_now(folder):
    y, *others = product_and_gemv()
    assert others == [1, {"sgemm", "gemv"}]
    native.buffers.clear()  # as in another process
    native.names.clear()
    again, *others = product_and_gemv()
    assert others == [0, {"sgemm", "gemv"}]
    np.testing.assert_array_equal(again, y)


def test_a_worker_takes_what_another_captured_meanwhile(folder, monkeypatch):
    locked = jit_cache.locked

    @contextlib.contextmanager
    def locked_after_another(path):
        monkeypatch.setattr(jit_cache, "locked", locked)
        assert powers() == ([3, 9, 27], 1)
        with locked(path):
            yield

    monkeypatch.setattr(jit_cache, "locked", locked_after_another)
    assert powers() == ([3, 9, 27], 0)


def test_one_captures_at_a_time(folder):
    def capture_another() -> None:
        with jit_cache.locked(folder / "jit"):
            pass

    other = threading.Thread(target=capture_another)
    with jit_cache.locked(folder / "jit"):
        other.start()
        other.join(0.1)
        assert other.is_alive()
    other.join()
    assert not any(folder.iterdir())


def test_one_that_comes_when_another_ends_waits_for_who_has_waited_before(folder):
    holds, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with jit_cache.locked(folder / "jit"):
            holds.set()
            may_end.wait()

    def come() -> None:
        with jit_cache.locked(folder / "jit"):
            pass

    second, third = threading.Thread(target=hold), threading.Thread(target=come)
    with jit_cache.locked(folder / "jit"):
        second.start()
        second.join(0.1)
    assert holds.wait(60)
    third.start()
    third.join(0.1)
    waits = third.is_alive()
    may_end.set()
    second.join()
    third.join()
    assert waits and not any(folder.iterdir())


def test_what_is_damaged_or_not_the_users_alone_is_made_anew(folder):
    powers()
    [kept] = folder.iterdir()
    good = kept.read_bytes()
    for damaged in (good[: len(good) // 2], good.replace(b"restrict", b"Restrict", 1)):
        kept.write_bytes(damaged)
        assert powers() == ([3, 9, 27], 1)
    if sys.platform == "win32":  # where no such mode opens a file to others
        return
    os.chmod(kept, 0o666)
    assert powers() == ([3, 9, 27], 1)
    os.chmod(kept, 0o600)
    os.chmod(folder, 0o777)
    assert powers() == ([3, 9, 27], 1)


def test_the_jits_that_were_used_last_are_kept(folder, monkeypatch):
    folder.mkdir()
    for number in range(4):
        (folder / f"older_{number}").write_bytes(bytes(100_000))
        os.utime(folder / f"older_{number}", (number, number))
    powers()
    [kept] = [path for path in folder.iterdir() if not path.name.startswith("older")]
    os.utime(kept, (0, 0))
    powers()
    assert kept.stat().st_mtime > 4
    monkeypatch.setattr(jit_cache, "KEPT_BYTES", kept.stat().st_size + 250_000)
    jit_cache.drop_oldest(folder)
    assert set(folder.iterdir()) == {kept, folder / "older_2", folder / "older_3"}
    monkeypatch.setattr(jit_cache, "KEPT_BYTES", 100)
    with jit_cache.locked(folder / "older_1"):
        jit_cache.drop_oldest(folder)
        assert set(folder.iterdir()) == {kept, folder / "older_1.lock"}


def test_a_jit_depends_on_every_file_of_the_program_and_on_no_test():
    rooms = ("backend", "backend/cpu", "data", "inference", "models", "runtime", "training")
    folders = [ROOT, *(ROOT / room for room in rooms)]
    paths = [path for folder in folders for path in folder.glob("*.*")]
    assert jit_cache.source_files() == sorted(x for x in paths if x.suffix in (".py", ".c"))
