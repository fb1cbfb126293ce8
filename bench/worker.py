"""A worker: a process that prepares a piece of work once and then does it each time it is asked.

It gets its job as JSON in its first argument and answers in lines of JSON: one when it is prepared,
then one for each line that it reads.
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
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(prepare: Callable, memory: Callable[[], int] = peak_memory) -> None:
    """`prepare(**job)` returns the work, a function, and the versions of the software in it.

    The work is timed here, unless it returns how many seconds it took.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    work, versions = prepare(**json.loads(sys.argv[1]))
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        seconds = work() or time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory": memory()}), file=answers, flush=True)
