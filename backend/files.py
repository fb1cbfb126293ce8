"""Folders and files: written whole or not at all, locked, and no more of them than a size."""

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
    """A folder to work in, and to rename when all is done; else it goes away."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    new = beside.with_name(f".gpt-tiny-{uuid.uuid4().hex}")
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file to write, which at the end takes the place of the one that `path` leads to, whole
    or not at all. UserError for what is no regular file."""
    path = regular_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".gpt-tiny-{uuid.uuid4().hex}")
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


def claim(path: Path) -> Path:
    """Makes a folder of this name, or with a number behind it if another training has that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path.name, *(f"{path.name}_{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            path.with_name(name).mkdir()
            return path.with_name(name)
    raise UserError(f"{path} exists, with a thousand others of that name")


def check_file(path: Path) -> None:
    """UserError or OSError unless `replacing_file` can write `path`: to be called before the work
    whose result it is."""
    check_parent(regular_file(path))


def check_parent(path: Path) -> None:
    """UserError unless there can be a new file or folder beside `path`."""
    parent = next(parent for parent in path.parents if parent.exists())
    trial = parent / f".gpt-tiny-{uuid.uuid4().hex}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise UserError(f"cannot save to {path}: {error.strerror} ({parent})") from None


def regular_file(path: Path) -> Path:
    """The file that a path leads to, which need not be there yet."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise UserError(f"{path} is {kind}: name a file")
    return Path(os.path.realpath(path))


def exchange(a: Path, b: Path) -> None:
    """Swaps two folders: at once on Linux, in three steps elsewhere."""
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


def sync(path: Path) -> None:
    is_windows = sys.platform == "win32"
    if is_windows and path.is_dir():  # it opens none, and syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Takes the lock of that name, a file, and says whether this process has it: False if another
    one has it now, unless it is to `wait` for that.

    It ends with the process, whatever ends that. The file goes away with the lock, but not on
    Windows. Where the file system knows no locks, each process has it.
    """
    while True:
        with path.open("a") as file:
            is_ours = take(file, wait)
            if is_ours and not is_at(path, file):  # the one before has just removed it
                continue
            try:
                yield is_ours
            finally:
                if is_ours and sys.platform != "win32":  # where no open file can be removed
                    path.unlink(missing_ok=True)  # while it is locked: who waits sees that
                    fcntl.flock(file, fcntl.LOCK_UN)  # forks may have it open, too
            return


def take(file: IO, wait: bool) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def is_at(path: Path, file: IO) -> bool:
    """Whether the open file is the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


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
