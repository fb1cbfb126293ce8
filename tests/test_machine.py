"""A number of cores, a share of them, and a place for the cache, as machines and containers have
them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GPT2, REFERENCE, ROOT, TINY
from tinygrad.helpers import NUM_CPU_THREADS, PARALLEL, Context

import tokenizers
from backend import machine
from backend.cpu import threads


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, float("inf")),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "900000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "25000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
    ],
    ids=["none", "of a container", "unlimited", "nested", "version 1"],
)
def test_the_control_groups_of_linux_say_what_share_of_the_cores_is_ours(tmp_path, files, share):
    assert machine.share_of_processor(write(tmp_path, files)) == share


@pytest.mark.parametrize(("share", "expected"), [(1.5, 1), (0.2, 1), (10_000, 12)])
def test_as_many_cores_are_used_as_the_share_allows(monkeypatch, share, expected):
    monkeypatch.setattr(machine, "share_of_processor", lambda: share)
    monkeypatch.setattr(machine, "usable_cores", lambda: set(range(12)))
    for name in ("NUM_CPU_THREADS", "PARALLEL"):
        monkeypatch.delenv(name, raising=False)
    with Context(NUM_CPU_THREADS=64, PARALLEL=64):  # as tinygrad counts them
        threads.set_core_counts()
        assert (NUM_CPU_THREADS.value, PARALLEL.value) == (expected, expected)


@pytest.mark.parametrize(("given", "expected"), [(None, 3), ("5", 5), (" 1 ", 1)])
def test_texts_are_encoded_on_as_many_threads_as_the_user_or_the_share_allows(
    monkeypatch, given, expected
):
    monkeypatch.setattr(machine, "share_of_processor", lambda: 3.5)
    monkeypatch.setattr(machine, "usable_cores", lambda: set(range(12)))
    monkeypatch.delenv("NUM_CPU_THREADS", raising=False)
    if given:
        monkeypatch.setenv("NUM_CPU_THREADS", given)
    pools = []
    monkeypatch.setattr(tokenizers, "ThreadPoolExecutor", lambda n: pools.append(n) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(tokenizers.BytePairTokenizer.load(GPT2).encode_chunks(["a"], tokenizers.Unknown()))
    assert pools == [expected]


def test_a_number_of_cores_that_the_user_gives_stays(monkeypatch):
    monkeypatch.setattr(machine, "share_of_processor", lambda: 1)
    monkeypatch.setenv("NUM_CPU_THREADS", "5")
    with Context(NUM_CPU_THREADS=5):
        threads.set_core_counts()
        assert NUM_CPU_THREADS.value == 5


@pytest.mark.parametrize(
    ("script", "name", "text", "least"),
    [
        ("train.py", "NUM_CPU_THREADS", "0", 1),
        ("run.py", "NUM_CPU_THREADS", "many", 1),
        ("export.py", "PARALLEL", "-1", 0),
    ],
)
def test_a_number_of_cores_that_is_none_is_an_error_of_one_line(script, name, text, least):
    command, environment = [sys.executable, ROOT / script], os.environ | {name: text}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    error = f"error: {name}={text}: give a whole number of at least {least}\n"
    assert (process.returncode, process.stdout, process.stderr) == (1, "", error)


def test_memory_is_counted_in_bytes():
    assert 1 << 28 < machine.physical_memory() < 1 << 50
    assert 0 < machine.memory() <= machine.physical_memory()


@pytest.mark.parametrize(
    ("files", "n_bytes"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000000\n"}, 1_000_000),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "2000000\n",
                "sys/fs/cgroup/a/b/memory.max": "9000000\n",
            },
            2_000_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/b\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3000000\n",
                "sys/fs/cgroup/memory/b/memory.limit_in_bytes": "1000000\n",
            },
            3_000_000,
        ),
    ],
    ids=["of a container", "unlimited", "nested", "version 1"],
)
def test_the_memory_of_a_container_is_what_its_control_groups_leave(tmp_path, files, n_bytes):
    assert machine.memory(write(tmp_path, files)) == (n_bytes or machine.memory(tmp_path))


def test_the_memory_is_no_more_than_ulimit_allows(monkeypatch, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no ulimit")
    limits = {resource.RLIMIT_AS: (1 << 20, -1), resource.RLIMIT_DATA: (resource.RLIM_INFINITY, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    assert machine.memory(tmp_path) == 1 << 20


@pytest.mark.parametrize(
    ("words", "elsewhere"),  # where variables name other places for some of it
    [
        (["train.py", *TINY, "-n", "1", "-x"], ["CACHEDB", "ZIG_GLOBAL_CACHE_DIR"]),
        (["run.py", REFERENCE], []),
    ],
)
def test_where_the_cache_cannot_be_written_a_command_works_without_and_says_so(
    tmp_path, words, elsewhere
):
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    place = tmp_path / "file" / "cache"
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in elsewhere or name not in ("CACHEDB", "ZIG_GLOBAL_CACHE_DIR")
    }
    environment |= {"XDG_CACHE_HOME": str(place), "TMPDIR": str(tmp_path / "temporary")}
    script, *words = words
    process = subprocess.run(
        [sys.executable, ROOT / script, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    warning, *others = process.stderr.splitlines()
    assert warning.startswith(f"warning: {place} can't be written") and "XDG_CACHE_HOME" in warning
    about_the_text = "is missing: using", "of Python's own help is not in the vocabulary"
    assert all(any(words in line for words in about_the_text) for line in others)
    assert process.stdout and sorted(os.listdir(tmp_path)) == ["file", "temporary"]
    assert os.listdir(tmp_path / "temporary") == []
