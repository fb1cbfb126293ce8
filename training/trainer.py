"""The training loop: a step is a validation, a hundred batches, a report, and files saved."""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, UOp, Variable
from tinygrad.uop.ops import Ops
from tqdm import tqdm

from backend import files
from backend.arrays import copy_out, from_numpy
from backend.errors import UserError
from backend.jit_cache import CachedJit
from data.ids import Corpus
from gpt_tiny import GPT, Dropout, initial_weights, shapes
from models import checkpoint as models
from models import folders
from training import checkpoint, metrics
from training.checkpoint import Checkpoint
from training.config import TRAINING, TrainingConfig, changed
from training.optimizers import OPTIMIZERS, learning_rate
from training.workers import World

CHECKPOINTS = Path(".data/checkpoints")
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
HEARD = b"stopping after the batch in flight; a second Ctrl-C or SIGTERM stops at once\n"


class Trainer:
    """A model in training, with its optimizer and its progress.

    Takes the arrays out of `start`, to free their memory. `folder` is for the model; with None
    nothing is saved. UserError for another corpus than the one that the training began with.
    """

    def __init__(
        self,
        config: TrainingConfig,
        corpus: Corpus,
        start: Checkpoint,
        folder: Path | None,
        world: World,
    ):
        self.config, self.corpus, self.folder, self.world = config, corpus, folder, world
        self.progress, self.latest = start.progress, start.folder
        self.tokens_per_batch = config.batch_size * config.model.context_length
        self.previous_folder = start.config.files.output_path
        if start.folder and self.progress.corpus_checksum != corpus.checksum:
            raise UserError(
                "the corpus is not the one that the training began with: name that with "
                "--text-corpus"
            )
        self.progress.corpus_checksum = corpus.checksum

        weights, losses = start.weights, np.zeros(config.batches_per_step, np.float32)
        if not weights and world.rank == 0:
            weights = initial_weights(config.model, config.seed)
        self.optimizer = OPTIMIZERS[config.optimizer.algorithm](shapes(config.model), config)
        if world.rank == 0:
            self.optimizer.parameters.write(weights)
            if start.moments:
                self.optimizer.memory.write(start.moments)
            losses[: len(self.progress.losses)] = self.progress.losses
        self.losses = from_numpy(losses)  # of this rank's shards of the batches
        self.model = GPT(config.model, self.optimizer.parameters.views)
        start.weights = start.moments = {}
        if world.size > 1:
            for buffer in (self.optimizer.parameters, self.optimizer.memory):
                buffer.apply_in_place(world.ranks.Bcast)

    def train(self, announce: Callable, show_sample: Callable = lambda trainer: None) -> int:
        """Trains to the end, or to a signal to stop; returns the signal's number, or 0.

        `announce` takes a line for each checkpoint; rank 0 calls `show_sample` with the trainer
        every `sample_every` steps. UserError when the loss is no longer finite.
        """
        config, progress, world = self.config, self.progress, self.world
        with noted_signals(world) as signals:
            train_batch, validate = self.capture_training(), self.capture_validation()
            if self.folder and progress.step:
                self.prepare_folder()
            started = time.time() - progress.seconds
            for step in range(progress.step, config.n_steps):
                # random numbers depend on seed and step alone: no state of a generator is saved
                rng = np.random.default_rng([config.seed, step])
                plan = self.make_plan(step, rng)
                if progress.batch == 0:
                    progress.validation_loss = validate(rng)
                    self.save_if_best()

                first, step_started, signal_number = progress.batch, time.time(), 0
                for batch in self.bar(step):
                    train_batch(*plan, batch=batch)
                    progress.batch = batch + 1
                    if signal_number := world.max(max(signals, default=0)):
                        break
                progress.seconds = time.time() - started
                losses = world.all_reduce(copy_out(self.losses))[: progress.batch]
                if signal_number:
                    progress.losses = losses.tolist()
                    self.save_checkpoint(step)
                    return signal_number

                train_loss = float(losses.mean())
                if not math.isfinite(train_loss):
                    raise self.divergence_error()
                self.report(train_loss, (progress.batch - first) / (time.time() - step_started))
                every = config.files.sample_every
                if every and (step + 1) % every == 0 and world.rank == 0:
                    show_sample(self)
                progress.step, progress.batch, progress.losses = step + 1, 0, []
                if is_checkpoint(step, config):
                    self.save_checkpoint(step, announce)
        return 0

    def make_plan(self, step: int, rng: np.random.Generator) -> list[Tensor]:
        """Tensors with a row for each batch of the step: this rank's windows
        (batch / ranks, time + 1), a dropout key for each part of the batch, and the optimizer's
        rates."""
        config, corpus, world = self.config, self.corpus, self.world
        n_batches, length = config.batches_per_step, config.model.context_length + 1
        n_starts = corpus.n_training - length + 1
        dtype = np.int32 if n_starts < 2**31 else np.int64  # the numbers drawn depend on the type
        starts = rng.integers(n_starts, size=(n_batches, config.batch_size), dtype=dtype)
        starts = np.split(starts, world.size, 1)[world.rank]  # (batches, batch / ranks)
        windows = corpus.windows(starts.ravel(), length).reshape(*starts.shape, length)
        # not from `rng`: the number of keys must not change the validation's windows
        key_rng = np.random.default_rng([config.seed, step, 1])
        keys = key_rng.integers(2**32, size=(n_batches, config.accumulate * world.size))
        keys = np.split(keys.astype(np.uint32), world.size, 1)[world.rank]
        updates = range(step * n_batches + 1, (step + 1) * n_batches + 1)
        rates = np.array([self.optimizer.rates(n) for n in updates], np.float32)
        return [from_numpy(array) for array in (windows, keys, rates)]

    def capture_training(self) -> Callable[..., None]:
        """A function, of captured jits, that takes the plan and the index `batch` of a row, updates
        the parameters and the moments, and stores this rank's share of the loss in `losses`."""
        config, optimizer, world = self.config, self.optimizer, self.world

        def compute(windows: Tensor, keys: Tensor, batch: Variable) -> None:
            loss = self.compute_gradients(windows[batch].contiguous(), keys[batch].contiguous())
            self.losses[batch].assign(loss).realize()

        def update(rates: Tensor, batch: Variable) -> None:
            optimizer.step(rates[batch].contiguous())

        def compute_and_update(windows: Tensor, keys: Tensor, rates: Tensor, batch: Variable):
            compute(windows, keys, batch)
            update(rates, batch)

        buffers, sizes = [*optimizer.buffers, self.losses], (config.batch_size, config.accumulate)
        key = (config.model, config.optimizer, config.dtype, *sizes, world.size)

        def cached(function: Callable) -> CachedJit:
            return CachedJit(function, buffers, key, batch=range(config.batches_per_step))

        if world.size == 1:
            return cached(compute_and_update)
        compute_jit, update_jit = cached(compute), cached(update)

        def train_batch(windows: Tensor, keys: Tensor, rates: Tensor, batch: int) -> None:
            compute_jit(windows, keys, batch=batch)
            optimizer.gradients.apply_in_place(world.all_reduce)
            update_jit(rates, batch=batch)

        return train_batch

    def compute_gradients(self, windows: Tensor, keys: Tensor) -> Tensor:
        """Loss of this rank's windows (n, time + 1), computed in a part for each dropout key;
        stores the gradients in the optimizer's buffer. Summed over ranks, both are the batch's."""
        parameters = list(self.optimizer.parameters.views.values())
        gradients = list(self.optimizer.gradients.views.values())
        n_parts, total_loss = self.config.accumulate, None
        size = windows.shape[0] // n_parts
        for i in range(n_parts):
            part = windows[i * size : (i + 1) * size]
            dropout = Dropout(self.config.model.dropout, keys[i : i + 1])
            with Context(PRODUCT_DTYPE=self.config.dtype):
                loss = self.model.loss(part[:, :-1], part[:, 1:], dropout)
                loss = loss / (n_parts * self.world.size)
                grads = loss.gradient(*parameters)
            total_loss = total_loss + loss if i else loss
            if i:
                grads = [total + grad for total, grad in zip(gradients, grads, strict=True)]
            # now: the next part reuses the memory, and the update changes the parameters
            Tensor.realize(*store_in(gradients, grads, total_loss))
        return total_loss

    def capture_validation(self) -> Callable[[np.random.Generator], float]:
        """A function that draws windows with a random generator and returns their mean loss."""
        config, corpus, model, world = self.config, self.corpus, self.model, self.world
        length, n_windows = config.model.context_length + 1, config.validation_size
        # no more memory than training takes
        limit = min(n_windows, config.batch_size // config.accumulate // world.size)
        size = max(n for n in range(1, limit + 1) if n_windows % n == 0)
        loss = from_numpy(np.zeros(1, np.float32))

        def compute_loss(windows: Tensor) -> None:
            with Context(PRODUCT_DTYPE=config.dtype):
                loss.assign(model.loss(windows[:, :-1], windows[:, 1:]).reshape(1)).realize()

        buffers = [*model.parameters().values(), loss]
        loss_jit = CachedJit(compute_loss, buffers, (config.model, size, config.dtype))

        def validate(rng: np.random.Generator) -> float:
            n_starts = len(corpus.ids) - corpus.n_training - length + 1
            starts = rng.integers(n_starts, size=(n_windows // size, size))
            losses = np.zeros(len(starts))
            for i in range(world.rank, len(starts), world.size):
                loss_jit(from_numpy(corpus.windows(corpus.n_training + starts[i], length)))
                losses[i] = copy_out(loss).item()
            return float(world.all_reduce(losses).mean())

        return validate

    def bar(self, step: int) -> Iterator[int]:
        """Yields the remaining batches of a step, with a bar on a terminal."""
        first, total = self.progress.batch, self.config.batches_per_step
        description, batches = f"step {step + 1}/{self.config.n_steps}", range(first, total)
        options = {"bar_format": "{desc} {bar} {n_fmt}/{total_fmt}{postfix}", **self.world.bar}
        bar = tqdm(batches, description, total, initial=first, **options)
        started = shown = time.time()
        for batch in bar:
            yield batch
            if not bar.disable and (now := time.time()) > shown + 0.5:  # copy_out takes time
                loss = copy_out(self.losses)[batch] * self.world.size
                rate = (batch + 1 - first) * self.tokens_per_batch / (now - started)
                bar.set_postfix_str(f"loss {loss:.4f} {rate:,.0f} tokens/s", refresh=False)
                shown = now

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters by name; UserError if one of them is not finite."""
        arrays = self.optimizer.parameters.read()
        if not all(map(models.is_finite, arrays.values())):
            raise self.divergence_error()
        return {name: arrays[name] for name in shapes(self.config.model)}

    def divergence_error(self) -> UserError:
        return UserError(
            "the loss or a parameter is no longer a finite number: try a lower --learning-rate, or "
            f"--grad-clip 1; the last good checkpoint: {self.latest or 'none'}"
        )

    def save_model(self, folder: Path) -> None:
        config, tokenizer = self.config, self.corpus.tokenizer
        model = config.to_json(), self.weights(), tokenizer, config.files.format
        models.save(folder, *model, owned=checkpoint.STATE_FILES, marks=checkpoint.MARKS)

    def save_checkpoint(self, step: int, announce: Callable[[str], None] | None = None) -> None:
        if not self.folder:
            return
        folder = files.claim(CHECKPOINTS / f"{int(time.time())}_{step}")
        if announce:
            announce(f"store checkpoint model to: {folder}")
        config = changed(self.config, {"output_path": self.folder})
        arrays = self.weights(), self.optimizer.memory.read()
        Checkpoint(config, TRAINING, self.corpus.tokenizer, *arrays, self.progress).save(folder)
        if self.latest:  # its model stays; the moments are twice as large
            for name in checkpoint.STATE_FILES:
                (self.latest / name).unlink(missing_ok=True)
        self.latest = folder

    def report(self, train_loss: float, batches_per_second: float) -> None:
        """Prints a line for the step that has ended, and appends a row to `metrics.csv`."""
        config, step, seconds = self.config, self.progress.step + 1, self.progress.seconds
        losses = train_loss, self.progress.validation_loss
        print(metrics.step_line(step, config.n_steps, *losses, seconds), flush=True)
        if not self.folder:
            return
        if step == 1:  # not earlier: a training that fails at once changes nothing
            self.prepare_folder()
        n_batches = step * config.batches_per_step
        row = [step, n_batches, n_batches * self.tokens_per_batch, *losses]
        tokens_per_second = batches_per_second * self.tokens_per_batch
        row += [learning_rate(config, n_batches), tokens_per_second, seconds]
        metrics.append(self.folder, row)

    def save_if_best(self) -> None:
        """Saves the model as `best` if its validation loss is lower than at any step before."""
        progress = self.progress
        is_lower = not progress.validation_loss >= progress.best_loss  # NaN fails to be saved
        if self.folder and progress.step > 0 and is_lower:
            progress.best_loss = progress.validation_loss
            self.save_model(self.folder / "best")

    def prepare_folder(self) -> None:
        """Copies `best` and metrics from this training's earlier folder, and replaces another
        training's."""
        best, n_steps = self.folder / "best", self.progress.step
        previous = self.previous_folder if n_steps else None
        if previous and (previous / "best").exists():
            if previous.resolve() != self.folder.resolve():
                with folders.replacing(best) as new:
                    shutil.copytree(previous / "best", new, dirs_exist_ok=True)
        elif best.exists():
            self.save_model(best)
        metrics.begin(self.folder, previous, n_steps)


def store_in(buffers: list[Tensor], tensors: list[Tensor], *dependents: Tensor) -> list[Tensor]:
    """Tensors to realise so that the buffers hold `tensors`, with `dependents` computed of them."""
    stores, swapped = [], {}
    for buffer, tensor in zip(buffers, tensors, strict=True):
        if tensor.uop.base.op is Ops.AFTER and tensor.uop.has_buffer_identity(after_ok=True):
            # a custom kernel's output, which tinygrad would copy: the kernel writes to `buffer`
            swapped[tensor.uop.base.src[0].base] = buffer.uop.base
            stores.append(tensor)
        else:
            stores.append(buffer.assign(tensor))
    sink = UOp.sink(*(tensor.uop for tensor in (*stores, *dependents)))
    return [Tensor(uop) for uop in sink.substitute(swapped).src]


def is_checkpoint(step: int, config: TrainingConfig) -> bool:
    """Whether a checkpoint is saved after the step: every n steps, and after the last."""
    every = config.files.checkpoint_every
    offset = 5 if every == 10 else 0  # gpt-burn's, for the default
    return (step + 1 + offset) % every == 0 or step + 1 == config.n_steps


@contextlib.contextmanager
def output_folder(config: TrainingConfig, rank: int) -> Iterator[Path | None]:
    """The folder for the model, named or new, reserved for this training; None where this rank
    saves nothing."""
    folder, model = config.files.output_path, config.model
    if rank > 0 or config.files.no_save:
        yield None
        return
    if folder is None:
        name = f"gpt_{model.n_parameters >> 10}k_{model.context_length}context_{int(time.time())}"
        folder = files.claim(Path(".data") / name)
    folder.mkdir(parents=True, exist_ok=True)
    with folders.reserved(folder):
        yield folder


def stop_signals() -> list[int]:
    """Ctrl-C, SIGTERM, and a terminal's hangup, unless nohup ignores it."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
        numbers.append(HANGUP)
    return numbers


@contextlib.contextmanager
def noted_signals(world: World) -> Iterator[list[int]]:
    """Collects the signals to stop, so that the batch in flight ends first.

    A line on stderr answers the first signal. A second signal ends the process at once, unless it
    is a hangup, which may come twice, or there are several workers, which must end together.
    """
    noted, previous = [], {}

    def note(number: int, frame) -> None:
        if world.rank == 0 and not noted:
            is_bar_shown = bool(sys.stderr.isatty() or world.columns)
            with contextlib.suppress(OSError):  # not print, which this may interrupt
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
