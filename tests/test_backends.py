"""Any backend gives what the CPU gives: DEV=WEBGPU python -m pytest tests/test_backends.py"""

import json
import os
import random
import re

import numpy as np
import pytest
from conftest import DATA, at_once, greedy
from tinygrad import Device, Tensor

import train
from inference.generator import Generator
from inference.scoring import BATCH_TOKENS
from training.config import TrainingConfig

BACKEND = Device.DEFAULT
OPTIONS = ["-c", "32", "-d", "32", "-h", "2", "-l", "1", "-b", "8", "-n", "10", "-x"]


def corpus() -> str:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    return " ".join(rng.choices(words, k=6000))


def test_the_backend_is_the_one_asked_for(reference):
    model, _, _ = reference
    asked = os.environ.get("DEV", BACKEND).split(":")[0]
    assert {p.device.split(":")[0] for p in model.parameters().values()} == {asked}


def test_twenty_training_batches_give_the_losses_of_the_cpu(call, folder, monkeypatch):
    monkeypatch.setattr(train, "DEFAULTS", TrainingConfig(batches_per_step=2))
    monkeypatch.setattr(train, "print_example", lambda *_: None)  # generation is tested below
    (folder / "corpus.txt").write_text(corpus())
    result = call(train.main, *OPTIONS, "-t", "corpus.txt", "--validation-size", "16")
    assert result.status == 0, result.err
    lines = re.findall(r"train loss: (\S+), val loss: (\S+) ", result.out)
    expected = json.loads((DATA / "backends" / "losses.json").read_text())
    assert len(lines) == len(expected) == 10
    np.testing.assert_allclose(np.array(lines, float), expected, rtol=0, atol=1e-3)


def test_greedy_text_with_the_cache_and_past_the_window(reference):
    model, tokenizer, prompts = reference
    prompt = prompts[1]
    text = greedy(Generator(model), tokenizer, prompt["ids"], 70)
    assert (prompt["prompt"] + text) == prompt["greedy"][:74]


@pytest.mark.skipif(BACKEND == "CPU", reason="test_model.py generates all of them on the CPU")
def test_every_token_of_the_greedy_texts_is_the_likeliest(reference):
    """As good as generating them token by token, and quicker: many windows at once."""
    model, tokenizer, prompts = reference
    context_length = model.config.context_length
    batch = BATCH_TOKENS // context_length  # as in test_scoring.py: the kernels are the same
    next_tokens = {}  # by window: where texts repeat themselves, one serves for many
    for prompt in prompts:
        n_prompt, ids = len(prompt["prompt"]), tokenizer.encode(prompt["greedy"]).tolist()
        assert len(ids) == n_prompt + 200
        for position in range(n_prompt, len(ids)):
            window = tuple(ids[max(0, position - context_length) : position])
            assert next_tokens.setdefault(window, ids[position]) == ids[position]

    lengths = np.array([len(window) for window in next_tokens])
    windows = np.zeros((len(lengths) + -len(lengths) % batch, context_length), np.int32)
    for row, window in zip(windows, next_tokens, strict=False):
        row[: len(window)] = window
    compute = at_once(lambda ids: model(ids).realize())
    parts = np.split(windows, len(windows) // batch)
    logits = np.concatenate([np.array(compute(Tensor(part).realize()).numpy()) for part in parts])
    of_last = logits[np.arange(len(lengths)), lengths - 1, : tokenizer.unknown]
    assert of_last.argmax(-1).tolist() == list(next_tokens.values())
