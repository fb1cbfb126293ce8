"""Data-parallel training over MPI: the ranks of a world, which divide each batch among themselves,
and the signals that ask them to stop.

A rank computes the gradients of its share; one Allreduce sums them, and every rank makes the same
update. Without MPI there is a world of one, through the same code.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
from tinygrad.helpers import DEV, NUM_CPU_THREADS, PARALLEL, Target

from backend import devices, machine
from backend.arrays import copy_in, copy_out
from backend.errors import UserError

# what the launchers of MPICH, Intel MPI, Open MPI and Slurm tell a rank
UNDER_MPI = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
HANGUP = getattr(signal, "SIGHUP", None)  # which Windows lacks
HEARD = b"stopping after the batch in flight; a second Ctrl-C or SIGTERM stops at once\n"
COLUMNS = "GPT_TINY_COLUMNS"  # the width of the terminal that a launcher's output goes to


class World:
    """All ranks, and which one this is. As a context it ends them all with the one that fails."""

    rank, size, n_on_machine = 0, 1, 1

    def __init__(self, explain: Callable[[BaseException], str] = str):
        """`explain` says in words what an error of this rank is."""
        self.explain = explain
        self.columns = int(os.environ.get(COLUMNS, 0)) or None
        # options of tqdm's bars; None shows them where standard error is a terminal
        self.bar = {"leave": False, "dynamic_ncols": True, "disable": None}
        self.is_under_mpi = any(name in os.environ for name in UNDER_MPI)
        if not self.is_under_mpi:
            return
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError("training with mpiexec needs: pip install '.[mpi]'") from error
        self.mpi, self.ranks = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.ranks.rank, self.ranks.size
        if self.columns:  # of a terminal, through mpiexec
            self.bar |= {"dynamic_ncols": False, "ncols": self.columns, "disable": self.rank > 0}
        if self.size > 1:
            self.of_machine = self.ranks.Split_type(MPI.COMM_TYPE_SHARED)
            self.n_on_machine = self.of_machine.size

    def take_device(self) -> None:
        """For each rank of a machine its share of the cores, and a GPU of its own, which is the
        only one that it opens; UserError if that does not open."""
        if self.size > 1:
            # without DEV, finding the backend opens the first GPU, which is the first rank's
            backend = self.broadcast_on_machine(devices.in_use).split(":")[0]
            cores = set().union(*self.of_machine.allgather(machine.usable_cores()))
            n_cores = min(len(cores), machine.share_of_processor()) // self.n_on_machine
            NUM_CPU_THREADS.value = max(1, min(NUM_CPU_THREADS.value, int(n_cores)))
            if backend != "CPU":  # there, one compiles for all
                DEV.value = [Target(f"{backend}:{self.of_machine.rank}"), *DEV.value]
                PARALLEL.value = NUM_CPU_THREADS.value
        devices.check()

    def check_same(self, **facts: object) -> None:
        """ValueError, with its name, if one of the facts is not the same on every rank."""
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

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """The sum over all ranks, the same bits on each, in place of the array."""
        if self.size > 1:
            self.ranks.Allreduce(self.mpi.IN_PLACE, array)
        return array

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
        return received if made is None else made  # which may hold a temporary file

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


def stop_signals() -> list[int]:
    """Ctrl-C, SIGTERM, and the hangup of a terminal, unless nohup has it ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
        numbers.append(HANGUP)
    return numbers


@contextlib.contextmanager
def noted_signals(world: World) -> Iterator[list[int]]:
    """The signals to stop that have come so far, for the batch in flight to end first.

    The first is answered on stderr. A second one ends the process at once, but for workers, which
    only all together can end, and but for a hangup, which may come twice.
    """
    noted, previous = [], {}

    def note(number: int, frame) -> None:
        if world.rank == 0 and not noted:
            is_bar_shown = bool(sys.stderr.isatty() or world.columns)
            with contextlib.suppress(OSError):  # print may be what this interrupts
                os.write(2, b"\n" * is_bar_shown + HEARD)
        noted.append(number)
        if world.size == 1 and number != HANGUP:
            restore(signal.SIGINT, signal.SIGTERM)

    def restore(*numbers: int) -> None:
        for number in numbers:
            signal.signal(number, previous[number])

    for number in stop_signals():
        previous[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore(*previous)
