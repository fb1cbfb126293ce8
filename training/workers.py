"""Data-parallel training over MPI: the ranks of a world, which divide each batch among themselves.

A rank computes the gradients of its share; one Allreduce sums them, and every rank makes the same
update. Without MPI there is a world of one, through the same code.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tinygrad import Device
from tinygrad.helpers import DEV, NUM_CPU_THREADS, PARALLEL, Target

from backend import devices, machine
from backend.arrays import Flat, copy_in, copy_out
from backend.errors import UserError

# what the launchers of MPICH, Intel MPI, Open MPI and Slurm tell a rank
UNDER_MPI = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
COLUMNS = "GPT_TINY_COLUMNS"  # the width of the terminal that a launcher's output goes to
HANGUP = getattr(signal, "SIGHUP", None)  # which Windows lacks
BANNER = b"\n" + 40 * b"="  # begins what mpiexec tells of a rank that was killed


class World:
    """All ranks, and which one this is. As a context it ends them all with the one that fails."""

    rank, size = 0, 1

    def __init__(self, explain: Callable[[BaseException], str] = str):
        """`explain` says in words what an error of this rank is."""
        self.explain = explain
        self.columns = int(os.environ.get(COLUMNS, 0)) or None
        self.is_under_mpi = any(name in os.environ for name in UNDER_MPI)
        if not self.is_under_mpi:
            return
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError("training with mpiexec needs: pip install '.[mpi]'") from error
        self.mpi, self.ranks = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.ranks.rank, self.ranks.size
        if self.size > 1:
            self.of_machine = self.ranks.Split_type(MPI.COMM_TYPE_SHARED)
            self.take_device(self.of_machine)

    def take_device(self, of_machine) -> None:
        """For each rank of a machine its share of the cores, and a GPU of its own."""
        backend = devices.in_use().split(":")[0]
        cores = set().union(*of_machine.allgather(machine.usable_cores()))
        n_cores = min(len(cores), machine.share_of_processor()) // of_machine.size
        NUM_CPU_THREADS.value = max(1, min(NUM_CPU_THREADS.value, int(n_cores)))
        if backend != "CPU":  # there, one compiles for all
            DEV.value = [Target(f"{backend}:{of_machine.rank}"), *DEV.value]
            PARALLEL.value = NUM_CPU_THREADS.value

    def check_same(self, **facts: object) -> None:
        """ValueError, with its name, if one of the facts is not the same on every rank."""
        if self.size == 1:
            return
        gathered = self.ranks.allgather((socket.gethostname(), facts))
        for rank, (host, others) in enumerate(gathered):
            for name, fact in gathered[0][1].items():
                if others[name] != fact:
                    raise UserError(f"rank {rank} on {host} has another {name} than rank 0")

    def share(self, n: int, name: str, parts: int = 1) -> int:
        """What each rank gets of n, in so many parts; ValueError if it does not come out even."""
        unit = self.size * parts
        if n % unit:
            fitting = " or ".join(str(m) for m in (n // unit * unit, (n // unit + 1) * unit) if m)
            raise UserError(f"{name} {n} can't be shared by {self.size} workers: try {fitting}")
        return n // self.size

    def shard(self, rows: np.ndarray) -> np.ndarray:
        """This rank's share of the columns."""
        width = rows.shape[1] // self.size
        return rows[:, self.rank * width : (self.rank + 1) * width]

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum over all ranks, the same bits on each, in place of the array."""
        if self.size > 1:
            self.ranks.Allreduce(self.mpi.IN_PLACE, array)
        return array

    def all_reduce(self, flat: Flat) -> None:
        """`sum` of tensors: one message, on the CPU from and to their own memory."""
        if self.size == 1:
            return
        if flat.is_one:
            self.sum(flat.array)
        else:
            message = self.sum(np.concatenate([part.ravel() for part in flat.read()]))
            ends = np.cumsum([part.numel() for part in flat.parts])
            flat.write(np.split(message, ends[:-1]))

    def max(self, number: int) -> int:
        """The greatest of the ranks' numbers."""
        return self.ranks.allreduce(number, self.mpi.MAX) if self.size > 1 else number

    def broadcast(self, thing: object) -> object:
        """Rank 0's, on every rank."""
        return self.ranks.bcast(thing) if self.size > 1 else thing

    def broadcast_on_machine(self, make: Callable[[], object]) -> object:
        """What it makes on the first rank of each machine, on all of them."""
        if self.size == 1:
            return make()
        made = make() if self.of_machine.rank == 0 else None
        received = self.of_machine.bcast(made)
        return received if made is None else made  # itself: what it made may end with it

    def bar(self) -> dict[str, object]:
        """Options of a tqdm bar: it is shown by rank 0 on a terminal, also through mpiexec."""
        is_shown = self.rank == 0 and (sys.stderr.isatty() or self.columns)
        width = {"ncols": self.columns, "dynamic_ncols": not self.columns}
        return {"disable": not is_shown, "leave": False, **width}

    def broadcast_tensors(self, tensors: list) -> None:
        """Gives every rank the bits that rank 0 has in its tensors."""
        for tensor in tensors if self.size > 1 else ():
            array = copy_out(tensor)
            self.ranks.Bcast(array)
            copy_in(tensor, array)

    def __enter__(self):
        if self.rank > 0:  # rank 0 speaks for all
            sys.stdout = sys.stderr = open(os.devnull, "w")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or self.size == 1 or isinstance(error, SystemExit):
            return
        if self.rank > 0:  # rank 0 has most errors, too, and the first say
            threading.Event().wait(2)
        where = f"rank {self.rank} on {socket.gethostname()}: " if self.rank else ""
        print(f"error: {where}{self.explain(error)}", file=sys.__stderr__, flush=True)
        threading.Event().wait(0.5)  # mpiexec drops what it has not passed on when it is to end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI would say more
        self.ranks.Abort(1)


def count_workers(text: str) -> int:
    """The number that --workers names; `auto` is one for each device or physical core."""
    if text != "auto":
        return int(text)
    backend = devices.in_use().split(":")[0]
    if backend == "CPU":
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        with contextlib.suppress(OSError):
            files = [Path(siblings.format(core)) for core in machine.usable_cores()]
            physical = {file.read_text(encoding="utf-8") for file in files}
            return min(len(physical), machine.n_cores())
        return machine.n_cores()
    number = 0
    with contextlib.suppress(Exception):  # whatever a driver raises past the last one
        while True:
            Device[f"{backend}:{number}"]
            number += 1
    return max(1, number)


def mpiexec(n_workers: int) -> list[str]:
    """What starts so many ranks, bound to cores if there are as many; ValueError without MPI."""
    beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    program = beside or shutil.which("mpiexec")
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


def stop_signals() -> list[int]:
    """Ctrl-C, SIGTERM, and what a terminal that goes away sends, unless nohup has that ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
        numbers.append(HANGUP)
    return numbers


def parted_by_banner(read: Callable[[], bytes]) -> Iterator[tuple[bytes, bool]]:
    """What is read, as it comes, and whether BANNER follows, which may come in several parts."""
    begun = b""  # a line break, passed on already, and what may begin the banner behind it
    while chunk := read():
        text, banner, _ = (begun + chunk).partition(BANNER)
        n_passed_on = len(begun[:1])
        begun = b"" if banner else re.search(rb"(\n=*)?\Z", text)[0]
        yield text[n_passed_on : len(text) - len(begun[1:])], bool(banner)
    yield begun[1:], False


def launch(n_workers: int, words: list[str]) -> int:
    """Runs the command under mpiexec, with one clear line if a rank is killed; its exit status."""
    command = [*mpiexec(n_workers), sys.executable, *words]
    environment = dict(os.environ)
    if sys.stderr.isatty():
        environment[COLUMNS] = str(shutil.get_terminal_size().columns)
    # a session of its own: Ctrl-C reaches the ranks once, from here
    options = {"stdout": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, **options)
    signals = []

    def forward(number: int, frame) -> None:
        signals.append(number)
        if len(signals) == 1:
            process.send_signal(signal.SIGTERM)
        elif number != HANGUP:  # which may come twice
            process.send_signal(signal.SIGKILL)

    for number in stop_signals():
        signal.signal(number, forward)
    was_killed = False
    for text, banner in parted_by_banner(lambda: os.read(process.stdout.fileno(), 1 << 16)):
        sys.stdout.buffer.write(b"" if was_killed else text)
        sys.stdout.buffer.flush()
        was_killed = was_killed or banner
    status = process.wait()
    if signals:
        return 128 + signals[0]
    if was_killed:
        raise UserError(
            "a worker was killed, and with it the training; "
            "to go on: python train.py --resume .data/checkpoints"
        )
    return status
