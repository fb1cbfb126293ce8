"""The loop of a training: for each step a validation, a hundred batches, and what is kept."""

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from backend.arrays import copy_out
from models import folders
from training import resume
from training.batches import capture_training, capture_validation, make_plan
from training.config import TrainingConfig
from training.metrics import append_metrics, begin_metrics, progress, step_line
from training.state import Training
from training.workers import HANGUP, World, stop_signals

HEARD = b"stopping after the batch in flight; a second Ctrl-C or SIGTERM stops at once\n"


def train(training: Training, world: World, announce: Callable[[str], None]) -> int:
    """Trains to the end, or to a signal that asks to stop, whose number it returns, or else 0.

    `announce` is told of each checkpoint. ValueError when the loss is no longer finite.
    """
    config, position = training.config, training.position
    train_batch, validate = capture_training(training, world), capture_validation(training, world)
    if training.is_kept and position.step:
        take_folder(training)
    started = time.time() - position.seconds
    with noted_signals(world) as signals:
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
                if signal_number := world.max(max(signals, default=0)):
                    break
            position.seconds = time.time() - started
            losses = world.sum(copy_out(training.losses))[: position.batch]
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
                if step == 0:  # not before: a training that fails at once changes nothing
                    take_folder(training)
                n_tokens = (config.batches_per_step - first) * config.tokens_per_batch
                append_metrics(training, train_loss, n_tokens / (time.time() - step_started))
            position.step, position.batch, position.losses = step + 1, 0, []
            if training.is_kept and is_checkpoint(step, config):
                folder = resume.new_folder(step)
                announce(f"store checkpoint model to: {folder}")
                resume.save(folder, training)
    return 0


def is_checkpoint(step: int, config: TrainingConfig) -> bool:
    """Whether the training is stored after that step, the last one in any case."""
    every = config.files.checkpoint_every
    offset = 5 if every == 10 else 0  # gpt-burn's, for the default
    return (step + 1 + offset) % every == 0 or step + 1 == config.n_steps


def take_folder(training: Training) -> None:
    """Makes the folder the training's own: what it has kept elsewhere comes along, and nothing of
    an earlier training passes for its."""
    position, best = training.position, training.folder / "best"
    before = Path(position.output_path, "best")
    if position.step and before.exists():
        if before.resolve() != best.resolve():
            with folders.replacing(best) as new:
                shutil.copytree(before, new, dirs_exist_ok=True)
    elif best.exists():
        training.save_model(best)
    begin_metrics(training)


def keep_if_best(training: Training) -> None:
    """Keeps the model, as `best`, if its validation loss is lower than at any step before."""
    position = training.position
    is_lower = not position.validation_loss >= position.best_loss  # one that is NaN fails to save
    if training.is_kept and position.step > 0 and is_lower:
        position.best_loss = position.validation_loss
        training.save_model(training.folder / "best")


@contextlib.contextmanager
def noted_signals(world: World) -> Iterator[list[int]]:
    """Signals to stop as they come, for the batch in flight to end first; a second one ends at
    once, but for workers, whom only all together can end, and for what a terminal sends that goes
    away, which may come twice. The first is answered on stderr."""
    noted, previous = [], {}

    def note(number: int, frame) -> None:
        if world.rank == 0 and not noted:
            is_bar_shown = not world.bar()["disable"]
            with contextlib.suppress(OSError):  # print may be what this interrupts
                os.write(2, b"\n" * is_bar_shown + HEARD)
        noted.append(number)
        if world.size == 1 and number != HANGUP:
            restore(signal.SIGINT, signal.SIGTERM)

    def restore(*numbers: int) -> None:
        for number in numbers:
            signal.signal(number, previous[number])

    for number in stop_signals():
        previous[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore(*previous)
