"""The worker for gpt-tiny; bench.py starts it, with the project's folder on its path."""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
from tinygrad import Device
from tinygrad.helpers import GlobalCounters
from worker import peak_memory, serve

import steps
from distributed import World
from generation import Generator
from gpt_tiny import GPT, AdamW, GPTConfig, initial_weights
from memory import get, zeros
from train import parse_arguments

WORLD = World()
N_BATCHES = steps.BATCHES_PER_STEP


def train(config: GPTConfig, n: int, batch_size: int, dtype: str = "float32"):
    """train.py's batches on made-up ids."""
    words = ["--batch-size", str(batch_size), "--context-length", str(config.context_length)]
    words += ["--dropout", str(config.dropout), "--dtype", dtype]
    arguments = parse_arguments(words)
    model = GPT(config)
    parameters = steps.flat_parameters(model)
    parameters.write(list(initial_weights(config, 0).values()))
    optimizer = AdamW(parameters.whole)
    rng = np.random.default_rng(0)
    ids = rng.integers(config.vocab_size, size=500_000).astype(np.uint16)
    losses = zeros(N_BATCHES)
    train_batch = steps.capture_training(
        model, optimizer, parameters, ids, losses, arguments, WORLD
    )
    plan = steps.make_plan(arguments, optimizer, 0, len(ids), rng, WORLD)

    def work() -> None:
        for number in range(n):
            train_batch(*plan, batch=number % N_BATCHES)
        get(losses)  # waits for the last one

    return work


def generate(config: GPTConfig, n: int, n_prompt: int, stride: int = 1, half: bool = False):
    weights = initial_weights(config, 0)
    if half:
        weights = {name: values.astype(np.float16) for name, values in weights.items()}
    generator = Generator(GPT(config, weights), stride=stride)
    prompt = np.zeros((1, n_prompt), np.int32)

    def work() -> None:
        for _ in generator(prompt, n, lambda logits: logits.argmax(-1)):
            pass

    return work


def prepare(work: str, config: dict, workers: int = 1, **job):
    versions = {name: version(name) for name in ("tinygrad", "numpy")}
    work = {"train": train, "generate": generate}[work](GPTConfig(**config), **job)
    work()  # captures it

    def work_of_all() -> None:
        for rank in range(1, workers):
            WORLD.ranks.send("work", rank)
        work()

    return work_of_all, {**versions, "tinygrad's device": Device.DEFAULT}


def follow() -> None:
    """Does what rank 0 does, and waits for that without taking a core."""
    work, _ = prepare(**json.loads(sys.argv[1]) | {"workers": 1})
    while True:
        while not WORLD.ranks.iprobe():
            time.sleep(0.001)
        if WORLD.ranks.recv() == "end":
            return
        work()


def memory() -> int:
    """Of the process on a CPU, of the device elsewhere; a captured step keeps all that it needs."""
    return peak_memory() if Device.DEFAULT.startswith("CPU") else GlobalCounters.mem_used


if __name__ == "__main__":
    if WORLD.rank == 0:
        serve(prepare, memory)
        for rank in range(1, WORLD.size):
            WORLD.ranks.send("end", rank)
    else:
        follow()
