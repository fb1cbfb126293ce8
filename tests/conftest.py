"""Fixtures: reference models, a separate cache folder, and command lines run in this process."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tinygrad import TinyJit, helpers

import command_line
from backend import jit_cache, machine
from backend.cpu import native
from backend.cpu.compiler import load_c
from models import checkpoint

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
REFERENCE = DATA / "gpt_burn_114k"
GPT2 = DATA / "gpt2_tiny"
TINY = ["-d", "8", "-l", "1", "-h", "2", "-c", "8", "-b", "4"]

SLOWEST = ["workers", "train", "resume", "export", "page"]  # test files, the slowest first

os.environ["HF_HUB_OFFLINE"] = "1"  # unknown model names are not looked up
os.environ.setdefault("CACHEDB", helpers.CACHEDB)  # subprocesses reuse compiled kernels


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One per core up to 4: the slowest file bounds the time; 0 (no worker) for a single file."""
    n_files = len({argument.partition("::")[0] for argument in config.args})
    if n_files == 1 and ".py" in config.args[0]:
        return 0
    return min(machine.n_cores(), 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the slowest files first, so that the workers end together."""
    order = {f"test_{name}": number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def not_on_windows(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(sys.platform == "win32", reason=reason)


@pytest.fixture
def signals() -> Iterator[None]:
    """Default handlers of SIGINT and SIGHUP for subprocesses: in the background or under nohup
    pytest would pass ignored signals on."""
    before = {}
    for name in ("SIGINT", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            before[number] = signal.getsignal(number)
            default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
            signal.signal(number, default)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> Path:
    """Cache of captured jits, apart from the user's and shared by the xdist workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))
    os.environ["XDG_CACHE_HOME"] = str(folder)  # for subprocesses
    if os.environ.pop(
        "PYTHONDONTWRITEBYTECODE", None
    ):  # without it each subprocess would compile all modules
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    jit_cache.FOLDER = folder / "gpt-tiny"
    return folder


@pytest.fixture(scope="session")
def reference():
    """A model trained by gpt-burn, its tokenizer, and prompts with gpt-burn's outputs."""
    prompts = json.loads((REFERENCE / "expected.json").read_text())
    return *checkpoint.load(REFERENCE), prompts


@pytest.fixture
def sbgemm(monkeypatch):
    """gemm.c for bfloat16, emulated in float32 on processors without bfloat16 instructions."""
    load = native.load
    program = load("sbgemm") or load_c("gemm.c", "sbgemm", BFLOAT16=1, EMULATED=1)
    monkeypatch.setattr(native, "load", lambda name: program if name == "sbgemm" else load(name))
    return program


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Working folder of the command lines in a module."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Returns a function that runs the `main` of a script in this process, as `__main__` does."""

    def call(main, *arguments) -> Result:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command_line.run(main)
        out, err = capsys.readouterr()
        status = end.value.code or 0
        if isinstance(status, str):  # a message, which the interpreter prints
            return Result(1, out, f"{err}{status}\n")
        return Result(status, out, err)

    return call


@pytest.fixture
def pipe(monkeypatch):
    """Returns a function that replaces standard input by bytes; CRLF stays, as on Linux."""

    def pipe(data: bytes) -> None:
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n")
        monkeypatch.setattr(sys, "stdin", stream)

    return pipe


def assert_error(result: Result, status: int, words: list[str]) -> None:
    assert result.status == status, result
    assert re.fullmatch(r"error: .+\n", result.err), result.err
    for word in words:
        assert word in result.err


def start(folder: Path, *words: str, **options) -> subprocess.Popen:
    """Starts train.py in a subprocess."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def at_once(function) -> TinyJit:
    """Jit captured at its first call; each call overwrites the output of the call before."""
    jit = TinyJit(function)
    jit.cnt = 1
    return jit


def greedy(generator, tokenizer, ids: list[int], n_new_tokens: int) -> str:
    """Greedy continuation, as of run.py at temperature 0."""

    def choose(logits: np.ndarray) -> np.ndarray:
        logits[:, tokenizer.unknown] = -np.inf
        return logits.argmax(-1)

    prompt = np.array([ids], np.int32)
    return tokenizer.decode(int(new[0]) for new in generator(prompt, n_new_tokens, choose))


def parameter_shapes(model: dict) -> dict[str, tuple[int, ...]]:
    vocab_size, context_length = model["vocab_size"], model["context_length"]
    d_model, d_hidden = model["d_model"], model["d_hidden"]
    shapes = {
        "token_embedding.weight": (vocab_size, d_model),
        "positional_embedding.weight": (context_length, d_model),
    }
    for block in (f"blocks.{index}" for index in range(model["n_layers"])):
        for norm in ("norm_1", "norm_2"):
            shapes |= dict.fromkeys((f"{block}.{norm}.gamma", f"{block}.{norm}.beta"), (d_model,))
        for part in ("query", "key", "value", "out"):
            shapes[f"{block}.multi_head.{part}.weight"] = (d_model, d_model)
        shapes[f"{block}.pwff.linear_1.weight"] = (d_hidden, d_model)
        shapes[f"{block}.pwff.linear_1.bias"] = (d_hidden,)
        shapes[f"{block}.pwff.linear_2.weight"] = (d_model, d_hidden)
        shapes[f"{block}.pwff.linear_2.bias"] = (d_model,)
    shapes |= dict.fromkeys(("norm.gamma", "norm.beta"), (d_model,))
    return shapes | {"linear.weight": (vocab_size, d_model), "linear.bias": (vocab_size,)}


CONFIG = json.loads((DATA / "adamw_steps" / "config.json").read_text())
SHAPES = parameter_shapes(CONFIG["model"])


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def model_folder(tmp_path, weights) -> Path:
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    return tmp_path / "model"


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)
