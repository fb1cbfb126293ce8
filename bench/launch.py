"""The worker that times whole processes, from their start; bench.py starts it.

`launch.py train.py ...` runs train.py to the end of its first batch, and prints a line then: a tqdm
of its own ends the process before the second batch.
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
    """Times a command of this Python until a line of its output holds `until`, or to its end.

    With `caches` "empty" each launch has empty caches; else a launch before the first turn fills
    them.
    """
    folder = tempfile.TemporaryDirectory()  # to run in, without a corpus of a user's

    def launch(cache: str) -> float:
        environment = os.environ | {"XDG_CACHE_HOME": cache, "CACHEDB": f"{cache}/tinygrad.db"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed peers have their bytecode
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        streams["stderr"] = subprocess.STDOUT
        words, start = [sys.executable, *command], time.perf_counter()
        with subprocess.Popen(words, cwd=folder.name, env=environment, **streams) as process:
            line = b""
            for line in process.stdout:
                if until and until.encode() in line:
                    break
            if not until:
                process.wait()
            seconds = time.perf_counter() - start
            process.stdout.read()  # to the end, which is not timed
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
