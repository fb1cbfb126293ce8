"""What the tests share: the reference model, and the command lines called in this process."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import command_line

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> Path:
    """Keeps the jits that the tests capture apart from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def reference():
    """A model that gpt-burn trained, its tokenizer, and what gpt-burn makes of some prompts."""
    folder = DATA / "gpt_burn_114k"
    prompts = json.loads((folder / "expected.json").read_text())
    return *checkpoint.load(folder), prompts


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working folder of a module's command lines."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Calls the `main` of train.py or run.py as their `__main__` would."""

    def call(main, *arguments) -> Result:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command_line.run(main)
        out, err = capsys.readouterr()
        status = end.value.code or 0
        if isinstance(status, str):  # what the interpreter does with it
            return Result(1, out, f"{err}{status}\n")
        return Result(status, out, err)

    return call


def greedy(generator, tokenizer, ids: list[int], n_new_tokens: int) -> str:
    """The likeliest continuation, as run.py chooses it at temperature 0."""

    def choose(logits: np.ndarray) -> np.ndarray:
        logits[:, tokenizer.unknown] = -np.inf
        return logits.argmax(-1)

    prompt = np.array([ids], np.int32)
    return tokenizer.decode(int(new[0]) for new in generator(prompt, n_new_tokens, choose))
