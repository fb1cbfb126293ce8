"""What is kept for the next start: by one process at a time, whole, and no more than a size."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

N_DIGEST = hashlib.sha256().digest_size


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """For one process at a time, where files can be locked; nothing is left of the file."""
    lock = locked(path) if fcntl else None
    try:
        yield
    finally:
        if lock:
            with contextlib.suppress(OSError):
                if is_at(path, lock):
                    path.unlink()  # while it is locked: who waits for it then sees that it is gone
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing it is not enough: forks may have it, too
            lock.close()


def locked(path: Path) -> IO | None:
    """The file at `path`, locked; None where that can't be."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            lock = path.open("a")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_at(path, lock):
                return lock
            lock.close()  # the one who had it has removed it
    return None


def is_at(path: Path, file: IO) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def sealed(data: bytes) -> bytes:
    """To be kept: `unsealed` gives it back."""
    return hashlib.sha256(data).digest() + data


def unsealed(kept: bytes) -> bytes:
    """What was sealed; ValueError for anything else, damaged or foreign, be it by one bit."""
    data = kept[N_DIGEST:]
    if sealed(data) != kept:
        raise ValueError("it is not what was kept")
    return data


def drop_oldest(paths: Iterable[Path], n_bytes: int, drop: Callable[[Path], object]) -> None:
    """Leaves the files and folders that were used last, `n_bytes` of them, and always the newest;
    how old one is its own time says."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # another process drops some, too
            files = path.iterdir() if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files)
            found.append((path.stat().st_mtime_ns, size, path))
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        n_bytes -= size
        if number and n_bytes < 0:
            with contextlib.suppress(OSError):  # and what can't be removed stays
                drop(path)
