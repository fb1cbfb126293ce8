"""The worker that reads memory and does no more: as fast as that, a model's weights could be read.

bench.py starts it.
"""

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
from worker import n_cores, serve


def prepare(n_bytes: int, n: int):
    """Reads as much memory n times, by all cores."""
    parts = np.array_split(np.ones(n_bytes // 8, np.uint64), n_cores())
    pool = ThreadPoolExecutor(len(parts))

    def work() -> None:
        for _ in range(n):
            list(pool.map(np.bitwise_or.reduce, parts))  # the cheapest of numpy's that reads all

    work()
    return work, {"numpy": version("numpy")}


if __name__ == "__main__":
    serve(prepare)
