"""The worker that times whole processes, from their start; bench.py starts it.

A train.py is timed to the end of its first batch, which `launch.py train.py ...` announces: it is
train.py as it stands, but for a tqdm that ends the process when the second batch is about to come.
"""

import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from worker import peak_memory, serve

ROOT = Path(__file__).parent.parent
DONE = "first batch done"


def prepare(command: list[str], until: str = "", caches: str = "warm"):
    """Time goes until a line of the command's output holds `until`, or without it to the end.

    With `caches` "empty" each launch finds them so; else the first one, here, fills them.
    """
    folder = tempfile.TemporaryDirectory()  # to run in: train.py finds no corpus of someone's there

    def launch(cache: str) -> float:
        environment = os.environ | {"XDG_CACHE_HOME": cache, "CACHEDB": f"{cache}/tinygrad.db"}
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=folder.name, env=environment, **pipes) as process:
            line = b""
            for line in process.stdout:
                if until and until.encode() in line:
                    break
            if not until:
                process.wait()
            seconds = time.perf_counter() - start
            process.stdout.read()  # what follows is not timed
        if process.returncode or until.encode() not in line:
            raise RuntimeError(line.decode(errors="replace"))
        return seconds

    def work() -> float:
        if caches == "warm":
            return launch(folder.name)
        with tempfile.TemporaryDirectory() as cache:
            return launch(cache)

    if caches == "warm":
        work()
    return work, {}


def run_until_first_batch(script: str, arguments: list[str]) -> None:
    import tqdm

    class FirstBatch(tqdm.tqdm):
        def __iter__(self):
            yield next(iter(self.iterable))
            from tinygrad import Device

            Device[Device.DEFAULT].synchronize()
            print(DONE, flush=True)
            sys.exit()

    tqdm.tqdm = FirstBatch
    sys.argv = [script, *arguments]
    sys.path[0] = str(ROOT)
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1].endswith(".py"):
        run_until_first_batch(sys.argv[1], sys.argv[2:])
    else:
        serve(prepare, lambda: peak_memory(resource.RUSAGE_CHILDREN))
