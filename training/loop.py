"""The loop of a training: for each step a validation, a hundred batches, and what is kept."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from backend.memory import get
from training import resume
from training.batches import capture_training, capture_validation, make_plan
from training.distributed import World
from training.metrics import append_metrics, begin_metrics, progress, step_line
from training.state import Training


def train(training: Training, world: World, announce: Callable[[str], None]) -> int:
    """Trains to the end, or to a signal that asks to stop, whose number it returns, or else 0.

    `announce` is told of each checkpoint. ValueError when the loss is no longer finite.
    """
    config, position = training.config, training.position
    train_batch, validate = capture_training(training, world), capture_validation(training, world)
    if training.is_kept:
        begin_metrics(training)
    started = time.time() - position.seconds
    with Interrupt(world) as interrupt:
        for step in range(position.step, config.n_steps):
            # All random numbers come from the seed and the step: they have no state to be kept.
            rng = np.random.default_rng([config.seed, step])
            plan = make_plan(training, rng, world)
            if position.batch == 0:
                position.validation_loss = validate(rng)
                keep_if_best(training)

            first, step_started, signal_number = position.batch, time.time(), 0
            for batch in progress(training, world):
                train_batch(*plan, batch=batch)
                position.batch = batch + 1
                if signal_number := world.any(interrupt.signal):
                    break
            position.seconds = time.time() - started
            losses = world.sum(get(training.losses))[: position.batch]
            if signal_number:
                position.losses = losses.tolist()
                if training.is_kept:
                    resume.save(resume.new_folder(step), training)
                return signal_number

            train_loss = float(losses.mean())
            if not math.isfinite(train_loss):
                raise training.diverged()
            print(step_line(training, train_loss), flush=True)
            if training.is_kept:
                n_tokens = (config.batches_per_step - first) * config.tokens_per_batch
                append_metrics(training, train_loss, n_tokens / (time.time() - step_started))
            position.step, position.batch, position.losses = step + 1, 0, []
            if (step + 6) % config.files.checkpoint_every == 0 and training.is_kept:
                folder = resume.new_folder(step)
                announce(f"store checkpoint model to: {folder}")
                resume.save(folder, training)
    return 0


def keep_if_best(training: Training) -> None:
    """Keeps the model, as `best`, if its validation loss is lower than at any step before."""
    position = training.position
    is_lower = not position.validation_loss >= position.best_loss  # one that is NaN fails to save
    if training.is_kept and position.step > 0 and is_lower:
        position.best_loss = position.validation_loss
        training.save_model(Path(position.output_path) / "best")


class Interrupt:
    """Notes Ctrl-C and SIGTERM, for the batch in flight to end first; a second one ends at once,
    but for workers, whom only all together can end."""

    def __init__(self, world: World):
        self.world = world

    def __enter__(self):
        self.signal = 0
        self.previous = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.signal = number
        if self.world.size == 1:
            self.__exit__()

    def __exit__(self, *exception) -> None:
        for interrupt, handler in self.previous.items():
            signal.signal(interrupt, handler)
