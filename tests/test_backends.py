"""The same results on every backend: run on the one that DEV names, rendered for those not here.

    DEV=WEBGPU python -m pytest tests/test_backends.py

GPT_TINY_REQUIRE=NVRTC makes a missing CUDA compiler a failure.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, greedy
from render import TARGETS, find_nvrtc
from tinygrad import Device, Tensor, TinyJit

import train
from generation import Generator

ROOT = Path(__file__).parent.parent
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
    monkeypatch.setattr(train, "BATCHES_PER_STEP", 2)
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
    context_length, batch = model.config.context_length, 100
    windows, lengths, tokens = [], [], []
    for prompt in prompts:
        n_prompt = len(prompt["prompt"])
        ids = tokenizer.encode(prompt["greedy"])
        for position in range(n_prompt, len(ids)):
            window = ids[max(0, position - context_length) : position]
            windows.append(np.pad(window, (0, context_length - len(window))))
            lengths.append(len(window))
            tokens.append(ids[position])
    assert len(windows) == 200 * len(prompts)

    logits = TinyJit(lambda ids: model(ids).realize())
    logits.cnt = 1  # its first call captures
    likeliest = []
    for first in range(0, len(windows), batch):
        part = np.array(windows[first : first + batch], np.int32)
        last = np.array(lengths[first : first + batch]) - 1
        of_last = logits(Tensor(part).realize()).numpy()[np.arange(batch), last]
        likeliest += of_last[:, : tokenizer.unknown].argmax(-1).tolist()
    assert likeliest == tokens


# --- backends that are not here ---


@pytest.fixture(scope="module")
def rendered(request, tmp_path_factory) -> dict[str, list[tuple[str, bytes]]]:
    """By backend the kernels, each as source and as compiled; of the backends now tested."""
    tests = " ".join(item.name.upper() for item in request.session.items)
    folders = {name: tmp_path_factory.mktemp(name) for name in TARGETS if name in tests}
    processes = {
        name: subprocess.Popen(
            [sys.executable, Path(__file__).with_name("render.py"), name, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, folder in folders.items()
    }
    kernels = {}
    for name, process in processes.items():
        out, _ = process.communicate()
        assert process.returncode == 0, f"{name}: {out}"
        paths = sorted(folders[name].glob("*.txt"))
        kernels[name] = [(p.read_text(), p.with_suffix(".bin").read_bytes()) for p in paths]
    return kernels


def test_every_kernel_is_rendered_for_cuda(rendered):
    check(rendered["CUDA"], r'extern "C" __global__ void __launch_bounds__\((\d+)\) \w+\((.*)\)')


def test_every_kernel_is_rendered_for_metal(rendered):
    check(rendered["METAL"], r"kernel void \w+(\()(.*)\)", n_arguments=31)
    for source, _ in rendered["METAL"]:
        assert "double" not in source  # Metal has none
        shared = re.findall(r"threadgroup __attribute__.* (\w+) \w+\[(\d+)\]", source)
        assert sum(int(size) * 4 for _, size in shared) <= 32 << 10


def test_every_kernel_is_rendered_for_amd(rendered):
    check(rendered["AMD"], r'extern "C".* void .*\b\w+(\()(.*)\) *\{')


def check(kernels: list[tuple[str, bytes]], signature: str, n_arguments: int = 1000) -> None:
    assert len(kernels) > 50  # forward, backward, optimizer, windows and generation
    for source, _ in kernels:
        _, arguments = re.search(signature, source).groups()
        assert len(arguments.split(",")) <= n_arguments + 2  # with the numbers of thread and group


@pytest.mark.skipif(
    not find_nvrtc() and "NVRTC" not in os.environ.get("GPT_TINY_REQUIRE", ""),
    reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12",
)
def test_every_kernel_compiles_for_cuda(rendered):
    for source, binary in rendered["CUDA"]:
        name = re.search(r"__launch_bounds__\(\d+\) (\w+)\(", source)[1]
        assert binary.startswith(b"\x7fELF")
        assert f".text.{name}".encode() in binary
