"""What differs from one machine to another: its cores, its memory, where a user's cache is.

It is imported before tinygrad, which reads variables and finds its cache when it is imported.
"""

import atexit
import contextlib
import ctypes
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from backend.errors import UserError

LEAST = {"NUM_CPU_THREADS": 1, "PARALLEL": 0}  # that tinygrad's variables may be


def check_variables() -> None:
    """ValueError for a number of cores that is none."""
    for name, least in LEAST.items():
        text = os.environ.get(name, str(least))
        if not text.strip().isdecimal() or int(text) < least:
            raise UserError(f"{name}={text}: give a whole number of at least {least}")


def usable_cores() -> set[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def n_cores() -> int:
    """How many cores' work the process may do: a container's share of them may be less."""
    return max(1, int(min(len(usable_cores()), share_of_processor())))


def n_threads() -> int:
    """How many are of use: NUM_CPU_THREADS, where a user has set it, or one for each core."""
    return int(os.environ.get("NUM_CPU_THREADS") or n_cores())


def share_of_processor(root: Path = Path("/")) -> float:
    """What Linux's control groups leave the process, in cores."""
    files = ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    quotas = (numbers for group in groups("cpu", root) for numbers in limits(group, *files))
    return min((time / period for time, period in quotas if time > 0), default=math.inf)


def groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the process's control groups, of version 2 or 1 and nested."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            folder = root / "sys/fs/cgroup" / (controller if controllers else "")
            yield folder  # its own group's may be mounted there
            for name in filter(None, path.split("/")):
                folder /= name
                yield folder


def limits(group: Path, *files: list[str]) -> Iterator[list[int]]:
    """The numbers in the files of each version, where there are these."""
    for names in files:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            texts = [(group / name).read_text(encoding="utf-8") for name in names]
            yield [int(number) for number in " ".join(texts).split()]


def memory(root: Path = Path("/")) -> int:
    """The bytes of memory that the process may have: a container's limit, or that of `ulimit`, may
    be less than the machine's."""
    files = ["memory.max"], ["memory.limit_in_bytes"]
    numbers = [n for group in groups("memory", root) for [n] in limits(group, *files)]
    if sys.platform != "win32":
        import resource

        numbers += [resource.getrlimit(x)[0] for x in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([physical_memory(), *(n for n in numbers if n >= 0)])  # below 0: no limit


def physical_memory() -> int:
    """The bytes of the machine's memory."""
    if sys.platform != "win32":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX, whose second number is this
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
    return status[1]


def cache_folder() -> Path:
    """Where this user's programs keep what they can make anew."""
    places = {
        "darwin": "~/Library/Caches",
        "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local",
    }
    place = os.environ.get("XDG_CACHE_HOME") or places.get(sys.platform, "~/.cache")
    return Path(os.path.expanduser(place))


def can_be_written(folder: Path) -> bool:
    """Whether our files, tinygrad's and those of ziglang's compiler can."""
    names = {"gpt-tiny": "", "tinygrad": "CACHEDB", "zig": "ZIG_GLOBAL_CACHE_DIR"}
    if folder.parts[0] == "~":  # nobody's home: a number without a name, as containers run with
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        places = [folder / name for name, moves_it in names.items() if moves_it not in os.environ]
        return all(os.access(x if x.exists() else folder, os.W_OK) for x in places)
    except OSError:
        return False


def find_cache() -> Path:
    """The user's cache or, where it can't be written, a folder for this process alone, and a line
    that says so; OSError where there is none either."""
    folder = cache_folder()
    if can_be_written(folder):
        return folder
    print(
        f"warning: {folder} can't be written, so what is compiled is not kept for the next start: "
        "XDG_CACHE_HOME can name another folder",
        file=sys.stderr,
    )
    temporary = tempfile.mkdtemp(prefix="gpt-tiny-")
    atexit.register(remove_cache, temporary)
    os.environ["XDG_CACHE_HOME"] = temporary  # for the processes that this one starts as well
    if sys.platform == "win32":  # where zig does not look at it
        os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", temporary)
    return Path(temporary)


def remove_cache(folder: str) -> None:
    helpers = sys.modules.get("tinygrad.helpers")
    if helpers and helpers._db_connection:  # Windows removes no file that is open
        helpers._db_connection.close()
    shutil.rmtree(folder, ignore_errors=True)


check_variables()
CACHE = find_cache()
