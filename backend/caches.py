"""What is kept for the next start: whole, and no more than a size."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

N_DIGEST = hashlib.sha256().digest_size


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
