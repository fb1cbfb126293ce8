"""Files and folders: written whole or not at all, locked, and deleted when too many are kept."""

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from backend.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


@contextlib.contextmanager
def new_folder(beside: Path) -> Iterator[Path]:
    """A new folder in the parent of `beside`, to be renamed when complete; deleted otherwise."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_path(beside.parent)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file to write, which replaces the file at `path` at the end, whole or not at all; links
    are followed. UserError unless `path` is a regular file or free."""
    path = regular_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_path(path.parent)
    try:
        yield new
        sync(new)
        os.replace(new, path)
        sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    with replacing_file(path) as new:
        new.write_bytes(data)


def temporary_path(folder: Path) -> Path:
    return folder / f".gpt-tiny-{uuid.uuid4().hex}"


def claim(path: Path) -> Path:
    """Creates the folder, with a number appended if the name is taken by another training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path.name, *(f"{path.name}_{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            path.with_name(name).mkdir()
            return path.with_name(name)
    raise UserError(f"{path} exists, with a thousand others of that name")


def check_file(path: Path) -> None:
    """UserError or OSError unless `replacing_file` can write `path`; called before long work."""
    check_parent(regular_file(path))


def check_parent(path: Path) -> None:
    """UserError unless a file or folder can be created in the parent of `path`."""
    parent = next(parent for parent in path.parents if parent.exists())
    try:
        with new_folder(parent / path.name):
            pass
    except OSError as error:
        raise UserError(f"cannot save to {path}: {error.strerror} ({parent})") from None


def regular_file(path: Path) -> Path:
    """The real path of a file, which need not exist; UserError if it is not a regular file."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise UserError(f"{path} is {kind}: name a file")
    return Path(os.path.realpath(path))


def exchange(a: Path, b: Path) -> None:
    """Swaps two folders: atomically on Linux, in three steps elsewhere."""
    rename = None
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_folder, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(at_folder, os.fsencode(a), at_folder, os.fsencode(b), swap) != 0:
        aside = a.with_name(f"{a.name}-old")
        os.rename(b, aside)
        try:
            os.rename(a, b)
        except BaseException:
            os.rename(aside, b)
            raise
        os.rename(aside, a)


def sync(*paths: Path) -> None:
    """Waits until files, or the names in folders, are on the disk."""
    is_windows = sys.platform == "win32"
    for path in paths:
        if is_windows and path.is_dir():  # Windows opens no folder
            continue
        descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Locks the file `path`; False if another process has the lock, unless told to `wait`.

    The lock ends with the process, even a killed one, and the file is deleted with the lock, except
    on Windows. True for every process where the file system has no locks.
    """
    while True:
        with path.open("a") as file:
            has_lock = lock(file, wait)
            if has_lock and not is_at(path, file):  # the process before has just deleted it
                continue
            try:
                yield has_lock
            finally:
                if has_lock and sys.platform != "win32":  # Windows deletes no open file
                    path.unlink(missing_ok=True)  # before it is unlocked: see `is_at`
                    fcntl.flock(file, fcntl.LOCK_UN)  # forks may have it open, too
            return


def lock(file: IO, wait: bool) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def is_at(path: Path, file: IO) -> bool:
    """Whether the path still leads to the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def drop_oldest(paths: Iterable[Path], n_bytes: int, drop: Callable[[Path], object]) -> None:
    """Calls `drop` with the least recently modified files and folders until the others have at most
    `n_bytes`; the newest always stays."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # dropped by another process meanwhile
            files = path.iterdir() if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files)
            found.append((path.stat().st_mtime_ns, size, path))
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        n_bytes -= size
        if number and n_bytes < 0:
            with contextlib.suppress(OSError):  # in use on Windows, say
                drop(path)
