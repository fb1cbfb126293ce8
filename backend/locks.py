"""Locks between processes."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


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
