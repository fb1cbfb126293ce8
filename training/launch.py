"""Starts a training with several workers: their number, and mpiexec."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TextIO

from tinygrad.helpers import DEV

from backend import devices, machine
from backend.errors import UserError
from training.trainer import HANGUP, stop_signals
from training.workers import COLUMNS

BANNER = b"\n" + 40 * b"="  # begins mpiexec's report of a killed rank


def count_workers(wanted: int | str) -> int:
    """The number of workers; `auto` is one for each device or physical core."""
    if wanted != "auto":
        return wanted
    backend, n_devices = count_devices()
    if backend != "CPU":
        return n_devices
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    with contextlib.suppress(OSError):
        files = [Path(siblings.format(core)) for core in machine.usable_cores()]
        physical = {file.read_text(encoding="utf-8") for file in files}
        return min(len(physical), machine.n_cores())
    return machine.n_cores()


def count_devices() -> tuple[str, int]:
    """The backend and its number of devices, 1 where it does not open. A child process counts: a
    process that has opened a GPU keeps memory of it, or all of it, from the workers."""
    if DEV.device.startswith("CPU"):
        return "CPU", 1
    code = "from tinygrad import Device; d = Device[Device.DEFAULT]; print(d.device, d.count())"
    process = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    name, number = (process.stdout.split() or [DEV.device, "1"])[-2:]
    return name.split(":")[0], int(number)


def mpiexec(n_workers: int) -> list[str]:
    """The command that starts the ranks, bound to cores if there is one for each; UserError without
    MPI."""
    installed = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    program = installed or shutil.which("mpiexec")
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        program = None
    if sys.platform == "win32":
        raise UserError("training with several workers is for Linux and macOS: omit --workers")
    if program is None:
        raise UserError(f"--workers {n_workers} needs MPI: pip install '.[mpi]'")
    is_full = n_workers == len(machine.usable_cores()) and devices.in_use().startswith("CPU")
    return [program, *(["-bind-to", "core"] if is_full else []), "-n", str(n_workers)]


def split_at_banner(read: Callable[[], bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yields each chunk read, and whether BANNER follows, which several chunks may hold."""
    held = b""  # a line break, already yielded, and the "=" after it, which may begin the banner
    while chunk := read():
        text, banner, _ = (held + chunk).partition(BANNER)
        n_yielded = len(held[:1])
        held = b"" if banner else re.search(rb"(\n=*)?\Z", text)[0]
        yield text[n_yielded : len(text) - len(held[1:])], bool(banner)
    yield held[1:], False


def launch(n_workers: int, argv: list[str]) -> int:
    """Runs the command under mpiexec and returns its exit status; UserError if a rank is killed."""
    command = [*mpiexec(n_workers), sys.executable, *argv]
    environment = dict(os.environ)
    if sys.stderr.isatty():
        environment[COLUMNS] = str(shutil.get_terminal_size().columns)
    # in a new session Ctrl-C reaches the ranks only from here, once
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, **options)
    signals = []

    def forward(number: int, frame) -> None:
        signals.append(number)
        if len(signals) == 1:
            process.send_signal(signal.SIGTERM)
        elif number != HANGUP:  # a hangup may come twice
            process.send_signal(signal.SIGKILL)

    for number in stop_signals():
        signal.signal(number, forward)
    streams = process.stdout, process.stderr
    with ThreadPoolExecutor(len(streams)) as threads:
        was_killed = any(list(threads.map(pass_on, streams, (sys.stdout, sys.stderr))))
    status = process.wait()
    if signals:
        return 128 + signals[0]
    if was_killed:
        raise UserError(
            "a worker was killed, and with it the training; "
            "to go on: python train.py --resume .data/checkpoints"
        )
    return status


def pass_on(stream: BinaryIO, output: TextIO) -> bool:
    """Copies mpiexec's output up to its report of a killed rank; returns whether a rank was killed.
    Without the copy, mpiexec would end with the reader of its output."""
    was_killed = False
    for text, banner in split_at_banner(lambda: os.read(stream.fileno(), 1 << 16)):
        output.buffer.write(b"" if was_killed else text)
        output.buffer.flush()
        was_killed = was_killed or banner
    return was_killed
