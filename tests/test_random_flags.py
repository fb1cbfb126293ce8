"""Random flags of both commands, at tiny sizes: a result, or an error of one line.

GPT_TINY_FLAGS=1000 python -m pytest -k random_flags tries a thousand of each.
"""

import gzip
import io
import os
import random
import re
import sys

import pytest
from conftest import GPT2, REFERENCE

import run
import train
from training.config import TrainingConfig

N_DRAWS = int(os.environ.get("GPT_TINY_FLAGS", "4"))
MODELS = ["model", "other", REFERENCE, GPT2, "nowhere"]
NOTES = "^warning: |is missing: using the text|the vocabulary is its own"
TRAINING = {
    **{"-c": [1, 2, 3, 8, 64, 65], "-d": [1, 3, 4, 8, 48], "-l": [1, 2], "-h": [1, 2, 3, 4]},
    **{"-b": [1, 2, 3, 8], "--accumulate": [1, 2, 3], "-n": [1, 2, 3], "-s": [0, 2**62]},
    **{"-r": [0, 0.003, 1, 1e30], "--warmup": [0, 3, 1000], "--decay": ["none", "cosine", "x"]},
    **{"--optimizer": ["adamw", "muon"], "--muon-learning-rate": [0, 0.02, 1e30]},
    **{"--min-learning-rate": [0, 0.1], "--weight-decay": [0, 1, 1e30]},
    **{"--grad-clip": [0, 1e-9, 1], "--dropout": [0, 0.1, 0.99, 1]},
    **{"--dtype": ["float32", "bfloat16"], "--validation-size": [1, 3, 8]},
    **{"--tokenizer": ["char", "vowel", "bpe", "x", GPT2], "--vocab-size": [1, 2, 50]},
    **{"-t": ["text.txt", "short.txt", "empty.txt", ".", "-", "b.gz", "c.jsonl"], "-m": [1, 2000]},
    **{"-x": [None], "-o": ["model", "other", "text.txt"], "--format": ["tiny", "burn"]},
    **{"--no-special": [None], "--sample-every": [1, 2]},
    **{"--checkpoint-every": [1, 2], "--resume": [".data/checkpoints", "model"]},
    **{"--init-from": MODELS, "--workers": [1]},
}
GENERATION = {
    **{"-p": ["The ", "-", "", "日", "x" * 100], "-n": [1, 5, 70], "-s": [0, 2**70]},
    **{"--n-samples": [1, 3], "--stop": ["e", "", "\n"], "-i": [None]},
    **{"--temperature": [0, 1e-300, 0.5, 1e30], "--top-k": [1, 5, 10**9]},
    **{"--top-p": [0, 0.5, 2], "--stride": [1, 2, 24, 64, 65], "--no-special": [None]},
}


SCORING = {
    **{"--score": ["text.txt", "short.txt", "empty.txt", "-", ".", "nowhere"]},
    **{"--weights": ["int8", "float16", "x"], "-s": [0, 1]},
}


def drawn(draw: random.Random, flags: dict) -> list[str]:
    words = []
    for flag in draw.sample(list(flags), min(draw.choice([0, 2, 4, 8]), len(flags))):
        value = draw.choice(flags[flag])
        words += [flag] if value is None else [flag, str(value)]
    return words


@pytest.fixture(scope="module", autouse=True)
def texts(folder):
    (folder / "text.txt").write_text("The context of the context of the containers. " * 100)
    (folder / "short.txt").write_text("x" * 30)
    (folder / "empty.txt").write_text("")
    (folder / "c.jsonl").write_text('{"text": "The context."}\n' * 200)
    (folder / "b.gz").write_bytes(gzip.compress(b"The containers of the context. " * 100))


@pytest.mark.parametrize("number", range(N_DRAWS))
def test_random_flags_give_a_result_or_an_error_of_one_line(call, monkeypatch, number):
    pytest.importorskip("tiktoken")
    draw = random.Random(number)
    monkeypatch.setattr(train, "DEFAULTS", TrainingConfig(batches_per_step=2))
    small = ["-b", 2, "-n", 1, "-t", "text.txt", "-o", "model"]
    if "--resume" in (flags := drawn(draw, TRAINING)):
        small = []
    elif "--init-from" not in flags:
        small += ["-d", 8, "-h", 2, "-c", 8, "-l", 1]
    commands = [(train.main, [*small, *flags])]
    for model in draw.sample(MODELS, 2):
        flags = draw.choice([GENERATION, GENERATION, SCORING])
        commands.append((run.main, [model, *drawn(draw, flags)]))
    for main, words in commands:
        text = "The context\n\n日\n" * 20
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))
        result = call(main, *words)
        lines = [line for line in result.err.splitlines() if not re.search(NOTES, line)]
        if result.status == 0:
            assert lines == [], words
        else:
            assert len(lines) == 1 and re.fullmatch("error: .+", lines[0]), (words, result)
