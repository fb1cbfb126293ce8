"""gpt-tiny beside other software: python bench/bench.py; README.md says more.

Ratios count, not times, for a machine's speed drifts: ours and the peers take turns, each in a
process of its own that is stopped during another's turn, and each turn gives one ratio.
"""

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import HERE, ROOT, Contestant, Row, all_rows

BUSY = "while True: pass"


class Worker:
    """The bench's end of a worker (worker.py), which is stopped except while it works."""

    def __init__(self, contestant: Contestant, peer_python: str):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        python = peer_python if contestant.is_peer else sys.executable
        command = [python, str(HERE / contestant.script), json.dumps(contestant.job)]
        # the project's tokenizers.py would hide Hugging Face's package from a peer
        path = {"PYTHONPATH": "" if contestant.is_peer else str(ROOT)}
        if workers := contestant.job.get("workers"):
            sys.path.append(str(ROOT))
            from training.workers import mpiexec  # as --workers starts them

            command = [*mpiexec(workers), *command]
        self.process = subprocess.Popen(
            command,
            env=os.environ | path | contestant.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.prepared = self.read()

    def read(self) -> dict:
        if line := self.process.stdout.readline():
            self.process.send_signal(signal.SIGSTOP)
            return json.loads(line)
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return {"note": lines[-1] if lines else f"ended with {self.process.wait()}"}

    def run(self) -> dict:
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        """Closes the worker's input, which ends it."""
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(row: Row, n_turns: int, peer_python: str) -> dict:
    """Fills the row's runs and notes; returns the versions of the software that ran."""
    workers, versions, loops = {}, {}, []
    try:
        for name, contestant in row.contestants.items():
            print(f"{row.name}: preparing {name}", file=sys.stderr)
            workers[name] = Worker(contestant, peer_python)
            versions |= workers[name].prepared.get("versions", {})
        loops += [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(row.n_busy)]
        for turn in range(n_turns):
            for name, worker in list(workers.items())[:: -1 if turn % 2 else 1]:
                answer = worker.run()
                if "note" in answer:
                    row.notes[name] = answer["note"]
                else:
                    row.runs.setdefault(name, []).append(answer)
                    done = f"{row.name}: turn {turn + 1} of {n_turns}"
                    print(f"{done}: {name} {answer['seconds']:.3g} s", file=sys.stderr)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        for worker in workers.values():
            worker.stop()
    return versions


def measure_all(rows: list[Row], n_turns: int, peer_python: str) -> dict:
    versions = {"python": platform.python_version()}
    start, before = time.time(), seconds_of_others()
    for row in rows:
        versions |= measure(row, n_turns, peer_python)
    others = before and (seconds_of_others() - before) / (time.time() - start)
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "turns": n_turns,
        "cores_used_by_others": others,
        "lines": [line for row in rows for line in row.lines()],
    }


def seconds_of_others() -> float | None:
    """CPU time of other processes and of the host's other guests; None except on Linux."""
    with contextlib.suppress(OSError):
        fields = Path("/proc/stat").read_text().split()[1:9]
        user, nice, system, _, _, irq, soft_irq, stolen = map(int, fields)
        busy = (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return busy - sum(usage.ru_utime + usage.ru_stime for usage in own)


def machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def show(results: dict, as_json: bool) -> None:
    if as_json:
        return print(json.dumps(results, indent=2))

    def cell(number: float | None) -> str:
        return "" if number is None else f"{number:.{max(0, 2 - len(str(int(number))) + 1)}f}"

    print("| work | ours | peer | its figure | ratio (spread) | peak MiB, ours and peer's |")
    print("| --- | --- | --- | --- | --- | --- |")
    notes = {}  # as an ordered set
    for line in results["lines"]:
        pair = ours, peer = line["ours"], line["peer"] or {"name": ""}
        ratios = line["ratios"]
        spread = f" ({cell(min(ratios))} to {cell(max(ratios))})" if ratios else ""
        memory = [f"{x['memory'] / 2**20:.0f}" for x in pair if x.get("memory")]
        cells = [line["work"], cell(ours["figure"]), peer["name"], cell(peer.get("figure"))]
        print("|", " | ".join([*cells, cell(line["ratio"]) + spread, ", ".join(memory)]), "|")
        notes |= {f"No figure of {x['name']}: {x['note']}": True for x in pair if x.get("note")}
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    print(f"\n{results['machine']}; {versions}; {results['turns']} turns; {results['date']}")
    if (others := results["cores_used_by_others"]) and others > 0.1:
        notes[f"Others used {others:.1f} cores meanwhile: trust no figure of this table"] = True
    print(*notes, sep="\n", end="\n" if notes else "")


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--turns", type=int, default=5, help="times that each is measured")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON, with each turn's ratio")
    peer_help = "the Python that has the peers' packages (default: this one)"
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help=peer_help)
    return parser


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no worker is left behind
    parser = argument_parser("Measure gpt-tiny beside other software.")
    names = ", ".join(row.name for row in all_rows(small=False))
    rows_help = f"which rows, * for any characters (default: all): {names}"
    parser.add_argument("rows", nargs="*", default=["*"], help=rows_help)
    arguments = parser.parse_args()
    rows = [
        row
        for row in all_rows(arguments.small)
        if any(fnmatch.fnmatch(row.name, pattern) for pattern in arguments.rows)
    ]
    if not rows:
        parser.error(f"no row has such a name; the rows are {names}")
    n_turns = 1 if arguments.small else arguments.turns
    show(measure_all(rows, n_turns, arguments.peer_python), arguments.json)


if __name__ == "__main__":
    main()
