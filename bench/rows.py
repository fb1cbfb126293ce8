"""The rows of the bench: a piece of work for gpt-tiny and its peers, and their results."""

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODEL = ROOT / "tests/data/gpt_burn_114k"


@dataclass(frozen=True)
class Contestant:
    """A worker's script, its job, and variables of its environment."""

    script: str
    job: dict
    is_peer: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def ours(job: dict, script: str = "ours.py", **environment: str) -> Contestant:
    return Contestant(script, job, environment=environment)


def peer(job: dict, script: str = "peers.py") -> Contestant:
    return Contestant(script, job, is_peer=True)


def launched(*command: str, until="", caches="warm", is_peer=False) -> Contestant:
    """A whole process of ours or of the peers' Python, timed by launch.py."""
    return Contestant("launch.py", {"command": command, "until": until, "caches": caches}, is_peer)


@dataclass
class Row:
    """A piece of work and its contestants by name, ours first."""

    name: str
    title: str
    contestants: dict[str, Contestant]
    amount: float = 0  # units of work, for a figure per second; 0: the figure is the seconds
    n_busy: int = 0  # busy loops beside the work, each on a core
    runs: dict[str, list[dict]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[dict]:
        """Lines of the table: ours beside each peer. A ratio above 1 says that ours is faster."""
        mine, *peers = self.contestants
        for name in peers or [None]:
            pairs = zip(self.runs.get(mine, []), self.runs.get(name, []), strict=False)
            ratios = [theirs["seconds"] / run["seconds"] for run, theirs in pairs]
            yield {
                "row": self.name,
                "work": self.title,
                "ours": self.summary(mine),
                "peer": name and self.summary(name),
                "ratio": statistics.median(ratios) if ratios else None,
                "ratios": ratios,
            }

    def summary(self, name: str) -> dict:
        if not (runs := self.runs.get(name)):
            return {"name": name, "figure": None, "memory": None, "note": self.notes.get(name)}
        seconds = statistics.median(run["seconds"] for run in runs)
        figure = self.amount / seconds if self.amount else seconds
        return {"name": name, "figure": figure, "memory": max(run["memory"] for run in runs)}


def config(context_length: int, d_model: int, n_layers: int, n_heads: int, **others) -> dict:
    """Settings of all GPTs, by default with gpt-burn's characters and dropout."""
    sizes = {"context_length": context_length, "vocab_size": 104, "n_layers": n_layers}
    sizes |= {"n_heads": n_heads, "d_model": d_model, "d_hidden": 4 * d_model}
    return sizes | {"dropout": 0.2} | others


TRAININGS = {  # the batch size, the number of batches in a turn, and the config
    "default": (32, 40, config(64, 64, 2, 2)),
    "nanogpt-cpu": (12, 20, config(64, 128, 4, 4, vocab_size=65)),  # nanoGPT's for a CPU
    "nanogpt": (8, 2, config(256, 384, 6, 6, vocab_size=65)),  # its baby GPT, in a smaller batch
    "nanogpt-64": (64, 1, config(256, 384, 6, 6, vocab_size=65)),
    "context-1024": (4, 1, config(1024, 384, 6, 6)),
    "83m": (8, 2, config(128, 768, 12, 12)),
    "gpt2": (1, 1, config(1024, 768, 12, 12, vocab_size=50257)),
    "vocabulary": (16, 4, config(64, 256, 2, 4, vocab_size=50257)),
}
SMALL_TRAININGS = {"small": (4, 4, config(16, 16, 1, 2))}
GPT2 = {"vocab_size": 50257, "dropout": 0.1, "gpt2": True}


def all_rows(small: bool) -> Iterator[Row]:
    for name, (batch_size, n, sizes) in (SMALL_TRAININGS if small else TRAININGS).items():
        job = {"work": "train", "config": sizes, "batch_size": batch_size, "n": n}
        yield from training_rows(name, job)
        if name in ("default", "83m", "small"):
            yield from busy_rows(name, job)
            yield muon_row(name, job)
            yield from worker_rows(name, job)
            yield from start_rows(name, job)

    large = config(16, 16, 1, 2) if small else config(128, 768, 12, 12)
    yield from generation_rows(large)
    yield from past_rows(large)
    yield first_token_row(large)

    # small: llama.cpp rounds 32 weights together
    gpt2 = config(16, 32, 1, 2, **GPT2) if small else config(1024, 768, 12, 12, **GPT2)
    for weights in ("float32", "float16", "int8"):
        yield from gpt2_rows(gpt2, weights, 8 if small else 100, 15 if small else 127)
    yield finetune_row(gpt2 | {"context_length": 8 if small else 256})

    n = 8 if small else 200
    yield from run_and_program_rows(large, n)
    yield from page_rows(large, n)


def training_rows(name: str, job: dict) -> Iterator[Row]:
    for prefix, dtype in {"train": "float32", "bfloat16": "bfloat16"}.items():
        for suffix, rate in {"dropout": 0.2, "no-dropout": 0.0}.items():
            job = job | {"config": job["config"] | {"dropout": rate}, "dtype": dtype}
            contestants = {
                "gpt-tiny": ours(job),
                "PyTorch eager": peer(job),
                "torch.compile": peer(job | {"compile": True}),
            }
            title = f"training, {name}, {dtype}, {suffix.replace('-', ' ')}, batches/s"
            yield Row(f"{prefix}-{name}-{suffix}", title, contestants, job["n"])


def busy_rows(name: str, job: dict) -> Iterator[Row]:
    contestants = {"gpt-tiny": ours(job), "PyTorch eager": peer(job)}
    for n_busy in (1, 2):
        loops = f"{n_busy} busy loop{'s' * (n_busy > 1)}"
        title = f"training, {name}, beside {loops}, batches/s"
        yield Row(f"busy-{n_busy}-{name}", title, contestants, job["n"], n_busy)


def muon_row(name: str, job: dict) -> Row:
    muon = ours(job | {"algorithm": "muon"})
    contestants = {"gpt-tiny, Muon": muon, "gpt-tiny, AdamW": ours(job)}
    return Row(f"muon-{name}", f"training with Muon, {name}, batches/s", contestants, job["n"])


def worker_rows(name: str, job: dict) -> Iterator[Row]:
    for n in (2, 4, 8, 16):
        if n <= max(2, os.cpu_count() or 1):
            contestants = {
                f"gpt-tiny, {n} workers": ours(job | {"workers": n}),
                "gpt-tiny": ours(job),
                "PyTorch eager": peer(job),
            }
            title = f"training with {n} workers, {name}, batches/s"
            yield Row(f"workers-{n}-{name}", title, contestants, job["n"])


def start_rows(name: str, job: dict) -> Iterator[Row]:
    flags = ["--no-save", "--n-steps", "1", "--batch-size", str(job["batch_size"])]
    for key in ("context_length", "d_model", "n_layers", "n_heads"):
        flags += [f"--{key.replace('_', '-')}", str(job["config"][key])]
    train = str(HERE / "launch.py"), "train.py", *flags
    torch = str(HERE / "peers.py"), json.dumps(job | {"n": 1})
    for caches in ("empty", "warm"):
        contestants = {
            "gpt-tiny": launched(*train, until="first batch done", caches=caches),
            "PyTorch eager": launched(*torch, until='"versions"', caches=caches, is_peer=True),
        }
        title = f"start to the end of the first batch, {name}, {caches} caches, s"
        yield Row(f"start-{name}-{caches}", title, contestants)


def generation_rows(large: dict) -> Iterator[Row]:
    n = large["context_length"] - 1
    job = {"work": "generate", "config": large, "n": n, "n_prompt": 1}
    for name, stored in {"float32": "float32", "half": "float16"}.items():
        mine = ours(job | {"stored": stored})
        contestants = {"gpt-tiny": mine, "Hugging Face, cached": peer(job)}
        title = f"generation within the window, {name} weights, tokens/s"
        yield Row(f"generate-{name}", title, contestants, n)


def past_rows(large: dict) -> Iterator[Row]:
    """Generation past the window: the whole window for each token, and with a stride."""
    context, stride = large["context_length"], large["context_length"] // 4
    job = {"work": "generate", "config": large}
    contestants = {
        "gpt-tiny": ours(job | {"n": 8, "n_prompt": context}),
        "PyTorch, whole window": peer({"work": "forward", "config": large, "n": 8}),
    }
    yield Row("generate-past", "generation past the window, exact, tokens/s", contestants, 8)

    n = 3 * stride  # three times a refill of the cache, and the tokens within it
    contestants = {
        "gpt-tiny": ours(job | {"n": n, "n_prompt": context - stride + 1, "stride": stride}),
        "gpt-tiny, within the window": ours(job | {"n": n, "n_prompt": 1}),
    }
    title = f"generation past the window, --stride {stride}, tokens/s"
    yield Row("generate-stride", title, contestants, n)


def first_token_row(large: dict) -> Row:
    n_prompt = large["context_length"] - 1
    job = {"work": "generate", "config": large, "n": 1, "n_prompt": n_prompt}
    contestants = {"gpt-tiny": ours(job), "Hugging Face": peer(job)}
    return Row("first-token", f"the first token after {n_prompt}, s", contestants)


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
    plain_read = ours({"n_bytes": n_bytes, "n": n}, "reader.py")
    contestants = {"gpt-tiny": contestants["gpt-tiny"], "a plain read of memory": plain_read}
    title = f"reading the weights, GPT-2 124M, {weights}, GB/s"
    yield Row(f"gpt2-read-{weights}", title, contestants, n * n_bytes / 1e9)


def gpt2_contestants(job: dict, weights: str) -> dict[str, Contestant]:
    theirs = job | {"weights": weights}
    contestants = {
        "gpt-tiny": ours(job if weights == "float32" else theirs),
        "llama.cpp": peer(theirs | {"engine": "llama"}, "engines.py"),
    }
    if weights != "float16":  # CTranslate2 has float16 on GPUs alone
        contestants["CTranslate2"] = peer(theirs | {"engine": "ctranslate2"}, "engines.py")
    if weights == "float32":
        contestants["Hugging Face, cached"] = peer(job)
    return contestants


def n_weights_read(gpt2: dict) -> int:
    """The weights that a token needs: all but the positions; the token embedding is the head."""
    d_model, d_hidden = gpt2["d_model"], gpt2["d_hidden"]
    block = 4 * d_model**2 + 2 * d_model * d_hidden + 9 * d_model + d_hidden
    return (gpt2["vocab_size"] + 2) * d_model + gpt2["n_layers"] * block


def finetune_row(gpt2: dict) -> Row:
    job = {"work": "train", "config": gpt2, "batch_size": 4, "n": 1}
    contestants = {"gpt-tiny": ours(job), "Hugging Face": peer(job | {"work": "finetune"})}
    return Row("gpt2-finetune", "fine-tuning, GPT-2 124M, batches/s", contestants, 1)


def run_and_program_rows(large: dict, n: int) -> Iterator[Row]:
    run = launched(str(ROOT / "run.py"), str(MODEL), "-n", str(n))
    title = f"python run.py, 114k model, {n} tokens, warm caches, s"
    yield Row("run", title, {"gpt-tiny": run})

    program = ours({"kind": "program", "model": str(MODEL), "n": n}, "exported.py")
    contestants = {"program": program, "run.py": run}
    yield Row("program", f"an exported program, 114k model, {n} tokens, s", contestants)

    job = {"config": large, "n": large["context_length"] - 1, "stored": "float16"}
    contestants = {
        "program": ours(job | {"kind": "tokens"}, "exported.py"),
        "gpt-tiny": ours(job | {"work": "generate", "n_prompt": 1}),
    }
    title = "an exported program, 83M, half weights, tokens/s"
    yield Row("program-large", title, contestants, job["n"])


def page_rows(large: dict, n: int) -> Iterator[Row]:
    small = {"kind": "page", "model": str(MODEL)}
    large = {"kind": "page", "config": large, "stored": "float16"}
    for name, title, job in (
        ("within", "114k, within the window", small | {"n": 63}),
        ("past", "114k, past it", small | {"n": 10 * n}),
        ("large", "83M", large | {"n": large["config"]["context_length"] - 1}),
    ):
        title = f"an exported page, {title}, tokens/s"
        yield Row(f"page-{name}", title, {"page": ours(job, "exported.py")}, job["n"])
