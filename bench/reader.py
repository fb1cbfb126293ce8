"""The worker that only reads memory, as fast as weights could be read; bench.py starts it."""

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
from worker import n_cores, serve


def prepare(n_bytes: int, n: int):
    """Reads n_bytes n times, on all cores."""
    parts = np.array_split(np.ones(n_bytes // 8, np.uint64), n_cores())
    pool = ThreadPoolExecutor(len(parts))

    def work() -> None:
        for _ in range(n):
            list(pool.map(np.bitwise_or.reduce, parts))  # numpy's cheapest full read

    work()
    return work, {"numpy": version("numpy")}


if __name__ == "__main__":
    serve(prepare)
