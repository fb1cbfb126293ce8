"""The machine: cores, memory, and the cache folder of the user.

Import this module before tinygrad, which reads variables and opens its cache at import.
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

MINIMA = {"NUM_CPU_THREADS": 1, "PARALLEL": 0}  # of tinygrad's variables


def check_variables() -> None:
    """UserError for a number of cores that is too small or no number."""
    for name, minimum in MINIMA.items():
        text = os.environ.get(name, str(minimum))
        if not text.strip().isdecimal() or int(text) < minimum:
            raise UserError(f"{name}={text}: give a whole number of at least {minimum}")


def usable_cores() -> set[int]:
    """The cores in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def n_cores() -> int:
    """The number of usable cores, or a container's share of the processor if that is less."""
    return max(1, int(min(len(usable_cores()), share_of_processor())))


def n_threads() -> int:
    """NUM_CPU_THREADS where the user has set it, or one thread for each core."""
    return int(os.environ.get("NUM_CPU_THREADS") or n_cores())


def share_of_processor(root: Path = Path("/")) -> float:
    """The limit of Linux's control groups for this process, in cores."""
    files = ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    quotas = (numbers for group in groups("cpu", root) for numbers in limits(group, *files))
    return min((time / period for time, period in quotas if time > 0), default=math.inf)


def groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the process's control groups, version 1 or 2, outermost first."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            folder = root / "sys/fs/cgroup" / (controller if controllers else "")
            yield folder  # in a container the process's group may be mounted here
            for name in filter(None, path.split("/")):
                folder /= name
                yield folder


def limits(group: Path, *files: list[str]) -> Iterator[list[int]]:
    """The numbers in a group's files, for each version of control groups with such files."""
    for names in files:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
            texts = [(group / name).read_text(encoding="utf-8") for name in names]
            yield [int(number) for number in " ".join(texts).split()]


def memory(root: Path = Path("/")) -> int:
    """The bytes of memory that the process may have: the machine's, or the limit of a container or
    of `ulimit`."""
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
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: the second number
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
    return status[1]


def find_cache() -> Path:
    """The user's cache folder or, if not writable, a temporary folder and a warning; OSError if
    there is neither."""
    places = {
        "darwin": "~/Library/Caches",
        "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local",
    }
    place = os.environ.get("XDG_CACHE_HOME") or places.get(sys.platform, "~/.cache")
    folder = Path(os.path.expanduser(place))
    if is_writable(folder):
        return folder
    print(
        f"warning: {folder} can't be written, so what is compiled is not kept for the next start: "
        "XDG_CACHE_HOME can name another folder",
        file=sys.stderr,
    )
    temporary = tempfile.mkdtemp(prefix="gpt-tiny-")
    atexit.register(delete_cache, temporary)
    os.environ["XDG_CACHE_HOME"] = temporary  # for processes started by this one, too
    if sys.platform == "win32":  # where zig ignores XDG_CACHE_HOME
        os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", temporary)
    return Path(temporary)


def is_writable(cache: Path) -> bool:
    """Whether gpt-tiny, tinygrad and ziglang's compiler can write to folders in the cache."""
    folders = {"gpt-tiny": "", "tinygrad": "CACHEDB", "zig": "ZIG_GLOBAL_CACHE_DIR"}
    if cache.parts[0] == "~":  # a user without a home, as containers run with
        return False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        used = [cache / name for name, variable in folders.items() if variable not in os.environ]
        return all(os.access(x if x.exists() else cache, os.W_OK) for x in used)
    except OSError:
        return False


def delete_cache(folder: str) -> None:
    helpers = sys.modules.get("tinygrad.helpers")
    if helpers and helpers._db_connection:  # Windows deletes no open file
        helpers._db_connection.close()
    shutil.rmtree(folder, ignore_errors=True)


check_variables()
CACHE = find_cache()
