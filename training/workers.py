"""Data-parallel training over MPI: each rank computes the gradients of its shard of a batch, one
Allreduce sums them, and every rank makes the same update. Without MPI there is one rank."""

import os
import socket
import sys
import threading
from collections.abc import Callable

import numpy as np
from tinygrad.helpers import DEV, NUM_CPU_THREADS, PARALLEL, Target

from backend import devices, machine
from backend.errors import UserError

# variables that the launchers of MPICH, Intel MPI, Open MPI and Slurm set
UNDER_MPI = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
COLUMNS = "GPT_TINY_COLUMNS"  # the width of the launcher's terminal


class World:
    """The ranks of MPI, and this process's number among them. As a context, it ends all ranks when
    one fails."""

    rank, size, n_on_machine = 0, 1, 1

    def __init__(self, explain: Callable[[BaseException], str] = str):
        """`explain` returns the message for an error of this rank."""
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
            self.machine_ranks = self.ranks.Split_type(MPI.COMM_TYPE_SHARED)
            self.n_on_machine = self.machine_ranks.size

    def take_device(self) -> None:
        """Gives each rank of a machine its share of the cores and one GPU, the only one that the
        rank opens; UserError if the device does not open."""
        # without DEV, finding the backend opens the first GPU, which is the first rank's
        backend = self.broadcast_on_machine(devices.in_use).split(":")[0]
        if self.size > 1:
            cores = set().union(*self.machine_ranks.allgather(machine.usable_cores()))
            n_cores = min(len(cores), machine.share_of_processor()) // self.n_on_machine
            NUM_CPU_THREADS.value = max(1, min(NUM_CPU_THREADS.value, int(n_cores)))
            if backend != "CPU":  # where the first rank compiles for all
                DEV.value = [Target(f"{backend}:{self.machine_ranks.rank}"), *DEV.value]
                PARALLEL.value = NUM_CPU_THREADS.value
        devices.check()

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """Sums the array over all ranks in place, to the same bits on each, and returns it."""
        if self.size > 1:
            self.ranks.Allreduce(self.mpi.IN_PLACE, array)
        return array

    def max(self, number: int) -> int:
        """The greatest of the ranks' numbers."""
        return self.ranks.allreduce(number, self.mpi.MAX) if self.size > 1 else number

    def broadcast_on_machine(self, make: Callable[[], object]) -> object:
        """Calls `make` on the first rank of each machine and broadcasts the result to its other
        ranks."""
        if self.size == 1:
            return make()
        made = make() if self.machine_ranks.rank == 0 else None
        received = self.machine_ranks.bcast(made)
        return received if made is None else made  # `made` may own a temporary file

    def __enter__(self):
        if self.rank > 0:  # rank 0 speaks for all
            sys.stdout = sys.stderr = open(os.devnull, "w")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or self.size == 1 or isinstance(error, SystemExit):
            return
        if self.rank > 0:  # rank 0, which has most errors as well, reports first
            threading.Event().wait(2)
        where = f"rank {self.rank} on {socket.gethostname()}: " if self.rank else ""
        print(f"error: {where}{self.explain(error)}", file=sys.__stderr__, flush=True)
        threading.Event().wait(0.5)  # on Abort, mpiexec drops pending output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # silences MPI
        self.ranks.Abort(1)
