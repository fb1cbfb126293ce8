"""The worker for gpt-tiny; bench.py starts it, with the project's folder on its path."""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
from tinygrad import Device
from tinygrad.helpers import GlobalCounters
from worker import peak_memory, serve

from backend.arrays import copy_out
from data.ids import Corpus
from gpt_tiny import GPT, GPTConfig, initial_weights
from inference.generator import Generator, quantize
from tokenizers import CharTokenizer
from training.batches import capture_training, make_plan
from training.checkpoint import Checkpoint
from training.config import Files, TrainingConfig, changed
from training.trainer import Trainer
from training.workers import World

WORLD = World()
WORLD.take_device()


def train(config: GPTConfig, n: int, **settings):
    """Batches of train.py on made-up ids."""
    config = changed(TrainingConfig(model=config, files=Files(no_save=True)), settings)
    rng = np.random.default_rng(0)
    ids = rng.integers(config.model.vocab_size, size=500_000).astype(np.uint16)
    corpus = Corpus("made up", CharTokenizer(), 0, ids)
    trainer = Trainer(config, corpus, Checkpoint(config), None, WORLD)
    train_batch = capture_training(config, trainer.model, trainer.optimizer, trainer.losses, WORLD)
    plan = make_plan(config, corpus, trainer.optimizer, 0, rng, WORLD)

    def work() -> None:
        for number in range(n):
            train_batch(*plan, batch=number % config.batches_per_step)
        copy_out(trainer.losses)  # waits for the last batch

    return work


def generate(
    config: GPTConfig,
    n: int,
    n_prompt: int,
    stride: int = 1,
    weights: str | None = None,
    stored: str = "float32",
):
    """Greedy tokens; the weights are `stored` in a type, and rounded to another with `weights`."""
    arrays = initial_weights(config, 0)
    arrays = {name: values.astype(stored, copy=False) for name, values in arrays.items()}
    model = GPT(config, arrays)
    if weights:
        quantize(model, weights)
    generator = Generator(model, stride=stride)
    prompt = np.zeros((1, n_prompt), np.int32)

    def work() -> None:
        for _ in generator(prompt, n, lambda logits: logits.argmax(-1)):
            pass

    return work


def prepare(work: str, config: dict, workers: int = 1, **job):
    versions = {name: version(name) for name in ("tinygrad", "numpy")}
    work = {"train": train, "generate": generate}[work](GPTConfig(**config), **job)
    work()  # captures its jits

    def work_of_all() -> None:
        for rank in range(1, workers):
            WORLD.ranks.send("work", rank)
        work()

    return work_of_all, {**versions, "tinygrad's device": Device.DEFAULT}


def follow() -> None:
    """Works whenever rank 0 does, and waits without taking a core."""
    work, _ = prepare(**json.loads(sys.argv[1]) | {"workers": 1})
    while True:
        while not WORLD.ranks.iprobe():
            time.sleep(0.001)
        if WORLD.ranks.recv() == "end":
            return
        work()


def memory() -> int:
    """Bytes of the process on a CPU, or of the device, where a jit keeps its buffers."""
    return peak_memory() if Device.DEFAULT.startswith("CPU") else GlobalCounters.mem_used


if __name__ == "__main__":
    if WORLD.rank == 0:
        serve(prepare, memory)
        for rank in range(1, WORLD.size):
            WORLD.ranks.send("end", rank)
    else:
        follow()
