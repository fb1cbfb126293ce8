"""gpt-tiny beside other software: python bench/bench.py; README.md says more.

A ratio counts and not a time, for a machine's speed drifts: ours and the peers take turns, each in
a process of its own that stands still while another's turn lasts, and each turn gives one ratio.
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUSY = "while True: pass"
OUR_SCRIPTS, SCRIPTS_OF_PEERS = ("ours.py", "exported.py"), ("peers.py", "engines.py")
SIZES = ("context_length", "d_model", "n_layers", "n_heads", "vocab_size")
TRAININGS = {  # the batch size, SIZES, the number of batches in a turn
    "default": (32, 64, 64, 2, 2, 104, 40),
    "nanogpt-cpu": (12, 64, 128, 4, 4, 65, 20),  # nanoGPT's for a CPU
    "nanogpt": (8, 256, 384, 6, 6, 65, 2),  # nanoGPT's baby GPT, in a smaller batch
    "nanogpt-64": (64, 256, 384, 6, 6, 65, 1),
    "context-1024": (4, 1024, 384, 6, 6, 104, 1),
    "83m": (8, 128, 768, 12, 12, 104, 2),
    "gpt2": (1, 1024, 768, 12, 12, 50257, 1),
    "vocabulary": (16, 64, 256, 2, 4, 50257, 4),
}


@dataclass
class Row:
    """A piece of work and who does it, ours first: name -> (script, job, environment)."""

    name: str
    title: str
    contestants: dict[str, tuple[str, dict, dict]]
    amount: float = 0  # of what is counted per second; 0: the seconds themselves count
    n_busy: int = 0  # loops that take a core each from whoever works
    runs: dict[str, list[dict]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[dict]:
        """The row in the table: ours beside each peer. A ratio is how many times as fast we are."""
        ours, *peers = self.contestants
        for peer in peers or [None]:
            pairs = zip(self.runs.get(ours, []), self.runs.get(peer, []), strict=False)
            ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]
            yield {
                "row": self.name,
                "work": self.title,
                "ours": self.summary(ours),
                "peer": peer and self.summary(peer),
                "ratio": statistics.median(ratios) if ratios else None,
                "ratios": ratios,
            }

    def summary(self, who: str) -> dict:
        if not (runs := self.runs.get(who)):
            return {"name": who, "figure": None, "memory": None, "note": self.notes.get(who)}
        seconds = statistics.median(run["seconds"] for run in runs)
        figure = self.amount / seconds if self.amount else seconds
        return {"name": who, "figure": figure, "memory": max(run["memory"] for run in runs)}


class Worker:
    """The bench's end of a worker (worker.py); it stands still but when it is asked."""

    def __init__(self, python: str, script: str, job: dict, environment: dict):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        # peers must not find the project's tokenizers.py, which would hide Hugging Face's
        path = {"PYTHONPATH": str(ROOT) if script in OUR_SCRIPTS else ""}
        command = [python, str(HERE / script), json.dumps(job)]
        if workers := job.get("workers"):
            sys.path.append(str(ROOT))
            from training.workers import mpiexec  # as --workers starts them

            command = [*mpiexec(workers), *command]
        self.process = subprocess.Popen(
            command,
            env=os.environ | path | environment,
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
        """A worker ends when there is nothing more to read."""
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
        for who, (script, job, environment) in row.contestants.items():
            print(f"{row.name}: preparing {who}", file=sys.stderr)
            python = peer_python if script in SCRIPTS_OF_PEERS else sys.executable
            workers[who] = Worker(python, script, job, environment)
            versions |= workers[who].prepared.get("versions", {})
        loops += [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(row.n_busy)]
        for turn in range(n_turns):
            for who, worker in list(workers.items())[:: -1 if turn % 2 else 1]:
                answer = worker.run()
                if "note" in answer:
                    row.notes[who] = answer["note"]
                else:
                    row.runs.setdefault(who, []).append(answer)
                    done = f"{row.name}: turn {turn + 1} of {n_turns}"
                    print(f"{done}: {who} {answer['seconds']:.3g} s", file=sys.stderr)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        for worker in workers.values():
            worker.stop()
    return versions


def all_rows(small: bool, peer_python: str) -> Iterator[Row]:
    yield from training_rows(small, peer_python)
    yield from generation_rows(large_config(small))
    gpt2 = config(context_length=1024, d_model=768, n_layers=12, n_heads=12)
    if small:  # 32: llama.cpp rounds as many weights together
        gpt2 = config(context_length=16, d_model=32, n_layers=1, n_heads=2)
    gpt2 |= {"vocab_size": 50257, "dropout": 0.1, "gpt2": True}
    for weights in ("float32", "float16", "int8"):
        yield from gpt2_rows(gpt2, weights, 8 if small else 100, 15 if small else 127)
    yield finetune_row(gpt2 | {"context_length": 8 if small else 256})
    yield run_row("8" if small else "200")
    yield from exported_rows(large_config(small), 8 if small else 200)


def large_config(small: bool) -> dict:
    if small:
        return config(context_length=16, d_model=16, n_layers=1, n_heads=2)
    return config(context_length=128, d_model=768, n_layers=12, n_heads=12)


def training_rows(small: bool, peer_python: str) -> Iterator[Row]:
    trainings = {"small": (4, 16, 16, 1, 2, 104, 4)} if small else TRAININGS
    for name, (batch_size, *sizes, n) in trainings.items():
        sizes = dict(zip(SIZES, sizes, strict=True))
        job = {"work": "train", "config": config(**sizes), "batch_size": batch_size, "n": n}
        for prefix, dtype in {"train": "float32", "bfloat16": "bfloat16"}.items():
            for suffix, rate in {"dropout": 0.2, "no-dropout": 0.0}.items():
                mine = job | {"config": config(**sizes, dropout=rate), "dtype": dtype}
                contestants = {
                    "gpt-tiny": ("ours.py", mine, {}),
                    "PyTorch eager": ("peers.py", mine, {}),
                    "torch.compile": ("peers.py", mine | {"compile": True}, {}),
                }
                title = f"training, {name}, {dtype}, {suffix.replace('-', ' ')}, batches/s"
                yield Row(f"{prefix}-{name}-{suffix}", title, contestants, n)
        if name in ("default", "83m", "small"):
            yield from further_training_rows(name, job, peer_python)


def further_training_rows(name: str, job: dict, peer_python: str) -> Iterator[Row]:
    """Training on busy cores, with Muon, with workers, and its start."""
    n, ours = job["n"], {"gpt-tiny": ("ours.py", job, {})}
    pair = ours | {"PyTorch eager": ("peers.py", job, {})}
    for loops in (1, 2):
        beside = f"training, {name}, beside {loops} busy loop{'s' * (loops > 1)}, batches/s"
        yield Row(f"busy-{loops}-{name}", beside, pair, n, loops)
    contestants = {
        "gpt-tiny, Muon": ("ours.py", job | {"algorithm": "muon"}, {}),
        "gpt-tiny, AdamW": ("ours.py", job, {}),
    }
    yield Row(f"muon-{name}", f"training with Muon, {name}, batches/s", contestants, n)
    for workers in (2, 4, 8, 16):
        if workers <= max(2, os.cpu_count() or 1):
            several = {f"gpt-tiny, {workers} workers": ("ours.py", job | {"workers": workers}, {})}
            title = f"training with {workers} workers, {name}, batches/s"
            yield Row(f"workers-{workers}-{name}", title, several | pair, n)
    yield from start_rows(name, job, peer_python)


def start_rows(name: str, job: dict, peer_python: str) -> Iterator[Row]:
    flags = ["train.py", "--no-save", "--n-steps", "1", "--batch-size", str(job["batch_size"])]
    for key in ("context_length", "d_model", "n_layers", "n_heads"):
        flags += [f"--{key.replace('_', '-')}", str(job["config"][key])]
    ours = [sys.executable, str(HERE / "launch.py"), *flags]
    theirs = [peer_python, str(HERE / "peers.py"), json.dumps(job | {"n": 1})]
    for caches in ("empty", "warm"):
        title = f"start to the end of the first batch, {name}, {caches} caches, s"
        contestants = {
            "gpt-tiny": launched(ours, "first batch done", caches),
            "PyTorch eager": launched(theirs, '"versions"', caches),
        }
        yield Row(f"start-{name}-{caches}", title, contestants)


def generation_rows(large: dict) -> Iterator[Row]:
    context, stride = large["context_length"], large["context_length"] // 4
    job = {"work": "generate", "config": large}
    within = job | {"n": context - 1, "n_prompt": 1}
    hugging_face = {"Hugging Face, cached": ("peers.py", within, {})}
    for name, ours in {"float32": within, "half": within | {"stored": "float16"}}.items():
        contestants = {"gpt-tiny": ("ours.py", ours, {}), **hugging_face}
        title = f"generation within the window, {name} weights, tokens/s"
        yield Row(f"generate-{name}", title, contestants, context - 1)

    contestants = {
        "gpt-tiny": ("ours.py", job | {"n": 8, "n_prompt": context}, {}),
        "PyTorch, whole window": ("peers.py", job | {"work": "forward", "n": 8}, {}),
    }
    yield Row("generate-past", "generation past the window, exact, tokens/s", contestants, 8)

    n = 3 * stride  # each refill of the cache and the tokens that it serves, three times
    past = job | {"n": n, "n_prompt": context - stride + 1, "stride": stride}
    contestants = {
        "gpt-tiny": ("ours.py", past, {}),
        "gpt-tiny, within the window": ("ours.py", within | {"n": n}, {}),
    }
    title = f"generation past the window, --stride {stride}, tokens/s"
    yield Row("generate-stride", title, contestants, n)

    first = job | {"n": 1, "n_prompt": context - 1}
    contestants = {
        "gpt-tiny": ("ours.py", first, {}),
        "Hugging Face": ("peers.py", first, {}),
    }
    yield Row("first-token", f"the first token after {context - 1}, s", contestants)


def gpt2_rows(gpt2: dict, weights: str, n: int, n_prompt: int) -> Iterator[Row]:
    """GPT-2 with its weights in float32, float16 or int8."""
    job = {"work": "generate", "config": gpt2, "n": n, "n_prompt": 1}
    contestants = gpt2_contestants(job, weights)
    title = f"generation, GPT-2 124M, {weights}, tokens/s"
    yield Row(f"gpt2-generate-{weights}", title, contestants, n)

    first = gpt2_contestants(job | {"n": 1, "n_prompt": n_prompt}, weights)
    title = f"the first token after {n_prompt}, GPT-2 124M, {weights}, s"
    yield Row(f"gpt2-prompt-{weights}", title, first)

    n_bytes = n_weights_read(gpt2) * {"float32": 4, "float16": 2, "int8": 1}[weights]
    contestants = {
        "gpt-tiny": contestants["gpt-tiny"],
        "a plain read of memory": ("reader.py", {"n_bytes": n_bytes, "n": n}, {}),
    }
    title = f"reading the weights, GPT-2 124M, {weights}, GB/s"
    yield Row(f"gpt2-read-{weights}", title, contestants, n * n_bytes / 1e9)


def gpt2_contestants(job: dict, weights: str) -> dict[str, tuple[str, dict, dict]]:
    ours = job | {"weights": None if weights == "float32" else weights}
    theirs = job | {"weights": weights}
    contestants = {
        "gpt-tiny": ("ours.py", ours, {}),
        "llama.cpp": ("engines.py", theirs | {"engine": "llama"}, {}),
    }
    if weights != "float16":  # which CTranslate2 has on GPUs alone
        contestants["CTranslate2"] = ("engines.py", theirs | {"engine": "ctranslate2"}, {})
    if weights == "float32":
        contestants["Hugging Face, cached"] = ("peers.py", job, {})
    return contestants


def n_weights_read(gpt2: dict) -> int:
    """That a token needs: all but the positions. The token embedding is the head as well."""
    d_model, d_hidden = gpt2["d_model"], gpt2["d_hidden"]
    block = 4 * d_model**2 + 2 * d_model * d_hidden + 9 * d_model + d_hidden
    return (gpt2["vocab_size"] + 2) * d_model + gpt2["n_layers"] * block


def finetune_row(gpt2: dict) -> Row:
    job = {"work": "train", "config": gpt2, "batch_size": 4, "n": 1}
    contestants = {
        "gpt-tiny": ("ours.py", job, {}),
        "Hugging Face": ("peers.py", job | {"work": "finetune"}, {}),
    }
    return Row("gpt2-finetune", "fine-tuning, GPT-2 124M, batches/s", contestants, 1)


def run_row(n_tokens: str) -> Row:
    model = ROOT / "tests/data/gpt_burn_114k"
    ours = launched([sys.executable, str(ROOT / "run.py"), str(model), "-n", n_tokens])
    title = f"python run.py, 114k model, {n_tokens} tokens, warm caches, s"
    return Row("run", title, {"gpt-tiny": ours})


def exported_rows(large: dict, n: int) -> Iterator[Row]:
    """Exported models: a program, and a page within the window and past it."""
    small = {"model": str(ROOT / "tests/data/gpt_burn_114k"), "n": n}
    run_py = next(iter(run_row(str(n)).contestants.values()))
    contestants = {"program": ("exported.py", small | {"kind": "program"}, {}), "run.py": run_py}
    yield Row("program", f"an exported program, 114k model, {n} tokens, s", contestants)

    within = large["context_length"] - 1
    job = {"config": large, "n": within, "stored": "float16"}
    contestants = {
        "program": ("exported.py", job | {"kind": "tokens"}, {}),
        "gpt-tiny": ("ours.py", job | {"work": "generate", "n_prompt": 1}, {}),
    }
    yield Row(
        "program-large", "an exported program, 83M, half weights, tokens/s", contestants, within
    )
    pages = {"within": small | {"n": 63}, "past": small | {"n": 10 * n}, "large": job}
    for name, job in pages.items():
        contestants = {"page": ("exported.py", job | {"kind": "page"}, {})}
        titles = {"within": "114k, within the window", "past": "114k, past it", "large": "83M"}
        title = f"an exported page, {titles[name]}, tokens/s"
        yield Row(f"page-{name}", title, contestants, job["n"])


def config(**settings: float) -> dict:
    """All that both GPTs ask for, by default with gpt-burn's characters and dropout."""
    return {"vocab_size": 104, "d_hidden": 4 * settings["d_model"], "dropout": 0.2, **settings}


def launched(command: list[str], until: str = "", caches: str = "warm") -> tuple[str, dict, dict]:
    return "launch.py", {"command": command, "until": until, "caches": caches}, {}


def measure_all(rows: list[Row], n_turns: int, peer_python: str) -> dict:
    versions = {"python": platform.python_version()}
    start, others = time.time(), seconds_of_others()
    for row in rows:
        versions |= measure(row, n_turns, peer_python)
    others = others and (seconds_of_others() - others) / (time.time() - start)
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "turns": n_turns,
        "cores_used_by_others": others,
        "lines": [line for row in rows for line in row.lines()],
    }


def seconds_of_others() -> float | None:
    """CPU time that went to others, also to other guests of the host; None where not Linux."""
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
    notes = {}
    for line in results["lines"]:
        ours, peer, ratios = line["ours"], line["peer"] or {"name": ""}, line["ratios"]
        spread = f" ({cell(min(ratios))} to {cell(max(ratios))})" if ratios else ""
        memory = [f"{who['memory'] / 2**20:.0f}" for who in (ours, peer) if who.get("memory")]
        cells = [line["work"], cell(ours["figure"]), peer["name"], cell(peer.get("figure"))]
        print("|", " | ".join([*cells, cell(line["ratio"]) + spread, ", ".join(memory)]), "|")
        for who in (ours, peer):
            if who.get("note"):
                notes[f"No figure of {who['name']}: {who['note']}"] = True
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
    names = ", ".join(row.name for row in all_rows(False, ""))
    rows_help = f"which rows, * for any characters (default: all): {names}"
    parser.add_argument("rows", nargs="*", default=["*"], help=rows_help)
    arguments = parser.parse_args()
    rows = [
        row
        for row in all_rows(arguments.small, arguments.peer_python)
        if any(fnmatch.fnmatch(row.name, pattern) for pattern in arguments.rows)
    ]
    if not rows:
        parser.error(f"no row has such a name; the rows are {names}")
    n_turns = 1 if arguments.small else arguments.turns
    show(measure_all(rows, n_turns, arguments.peer_python), arguments.json)


if __name__ == "__main__":
    main()
