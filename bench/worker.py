"""A worker: a process that prepares a piece of work, and does the work for each line of its input.

The first argument is the job in JSON. The worker answers in lines of JSON: the versions when it is
prepared, then the seconds and the peak memory of each run.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable


def peak_memory(who: int = resource.RUSAGE_SELF) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def n_cores() -> int:
    """The number of cores in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(prepare: Callable, memory: Callable[[], int] = peak_memory) -> None:
    """Serves the work that `prepare(**job)` returns, a function, with versions of its software.

    The function may return the seconds that count; else the whole call is timed.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for the prints of libraries
    work, versions = prepare(**json.loads(sys.argv[1]))
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        seconds = work() or time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory": memory()}), file=answers, flush=True)
