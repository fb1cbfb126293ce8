"""The loop of a training: a step is a validation, a hundred batches, a report, and what is kept."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from backend.arrays import FlatBuffer, copy_in, copy_out, zeros
from backend.errors import UserError
from data import ids
from data.ids import Corpus
from gpt_tiny import GPT, initial_weights, shapes
from models import checkpoint as models
from models import find_tokenizer, folders
from tokenizers import TOKENIZERS, CharTokenizer, Tokenizer
from training import checkpoint, metrics
from training.batches import capture_training, capture_validation, make_plan
from training.checkpoint import Checkpoint
from training.config import TRAINING, TrainingConfig, changed
from training.optimizers import OPTIMIZERS, learning_rate
from training.workers import World, noted_signals


class Trainer:
    """A model in training: its parameters, its optimizer, and how far it is.

    Takes the arrays of `start`, whose memory it needs. `folder` is the place of the model, or None
    where nothing is kept. UserError for a corpus that is not the one the training began with.
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
        self.folder_before = start.config.files.output_path
        if start.folder and self.progress.corpus_checksum != corpus.checksum:
            raise UserError(
                "the corpus is not the one that the training began with: name that with "
                "--text-corpus"
            )
        self.progress.corpus_checksum = corpus.checksum

        weights, kind = start.weights, OPTIMIZERS[config.optimizer.algorithm]
        if not weights and world.rank == 0:
            weights = initial_weights(config.model, config.seed)
        self.optimizer = kind(FlatBuffer(kind.layout(shapes(config.model))), config)
        self.parameters = self.optimizer.parameters
        self.losses = zeros(config.batches_per_step)  # of this rank's shards of the batches
        if world.rank == 0:
            self.parameters.write(weights)
            if start.moments:
                self.optimizer.memory.write(start.moments)
            losses = np.array(self.progress.losses, np.float32)
            copy_in(self.losses, np.pad(losses, (0, config.batches_per_step - len(losses))))
        self.model = GPT(config.model, self.parameters.views)
        start.weights = start.moments = {}
        world.broadcast_tensors([*self.parameters.whole, *self.optimizer.state])

    def train(self, announce: Callable, show_sample: Callable = lambda trainer: None) -> int:
        """Trains to the end, or to a signal that asks to stop: the signal's number, or 0.

        `announce` is told of each checkpoint, in words, and rank 0 calls `show_sample` with the
        trainer every `sample_every` steps. UserError when the loss is no longer finite.
        """
        config, progress, world = self.config, self.progress, self.world
        train_batch = capture_training(config, self.model, self.optimizer, self.losses, world)
        validate = capture_validation(config, self.corpus, self.model, world)
        if self.folder and progress.step:
            self.take_folder()
        started = time.time() - progress.seconds
        with noted_signals(world) as signals:
            for step in range(progress.step, config.n_steps):
                # all random numbers come from the seed and the step: they have no state to be kept
                rng = np.random.default_rng([config.seed, step])
                plan = make_plan(config, self.corpus, self.optimizer, step, rng, world)
                if progress.batch == 0:
                    progress.validation_loss = validate(rng)
                    self.keep_if_best()

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
                    self.keep_checkpoint(step)
                    return signal_number

                train_loss = float(losses.mean())
                if not math.isfinite(train_loss):
                    raise self.diverged()
                losses = train_loss, progress.validation_loss
                line = metrics.step_line(step + 1, config.n_steps, *losses, progress.seconds)
                print(line, flush=True)
                batches_per_second = (progress.batch - first) / (time.time() - step_started)
                self.keep_metrics(train_loss, batches_per_second)
                every = config.files.sample_every
                if every and (step + 1) % every == 0 and world.rank == 0:
                    show_sample(self)
                progress.step, progress.batch, progress.losses = step + 1, 0, []
                if is_checkpoint(step, config):
                    self.keep_checkpoint(step, announce)
        return 0

    def bar(self, step: int) -> Iterator[int]:
        """The batches that are left of a step, with a bar on a terminal."""
        first, total = self.progress.batch, self.config.batches_per_step
        description, batches = f"step {step + 1}/{self.config.n_steps}", range(first, total)
        options = {"bar_format": "{desc} {bar} {n_fmt}/{total_fmt}{postfix}", **self.world.bar}
        bar = tqdm(batches, description, total, initial=first, **options)
        started = shown = time.time()
        for batch in bar:
            yield batch
            if not bar.disable and (now := time.time()) > shown + 0.5:  # a look takes time
                loss = copy_out(self.losses)[batch] * self.world.size
                rate = (batch + 1 - first) * self.tokens_per_batch / (now - started)
                bar.set_postfix_str(f"loss {loss:.4f} {rate:,.0f} tokens/s", refresh=False)
                shown = now

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters by name; UserError if one of them is not finite."""
        arrays = self.parameters.read()
        if not all(map(models.is_finite, arrays.values())):
            raise self.diverged()
        return {name: arrays[name] for name in shapes(self.config.model)}

    def diverged(self) -> UserError:
        return UserError(
            "the loss or a parameter is no longer a finite number: try a lower --learning-rate, or "
            f"--grad-clip 1; the last good checkpoint: {self.latest or 'none'}"
        )

    def save_model(self, folder: Path) -> None:
        content, tokenizer = self.config.to_json(), self.corpus.tokenizer
        model = content, self.weights(), tokenizer, self.config.files.format
        models.save(folder, *model, owned=checkpoint.STATE_FILES, marks=checkpoint.MARKS)

    def keep_checkpoint(self, step: int, announce: Callable[[str], None] | None = None) -> None:
        if not self.folder:
            return
        folder = checkpoint.new_folder(step)
        if announce:
            announce(f"store checkpoint model to: {folder}")
        config = changed(self.config, {"output_path": self.folder})
        arrays = self.weights(), self.optimizer.memory.read()
        Checkpoint(config, TRAINING, self.corpus.tokenizer, *arrays, self.progress).save(folder)
        if self.latest:
            checkpoint.drop_progress(self.latest)
        self.latest = folder

    def keep_metrics(self, train_loss: float, batches_per_second: float) -> None:
        """A row in the folder's `metrics.csv` for the step that has ended."""
        config, progress = self.config, self.progress
        if not self.folder:
            return
        if progress.step == 0:  # not before: a training that fails at once changes nothing
            self.take_folder()
        n_batches = (progress.step + 1) * config.batches_per_step
        row = [progress.step + 1, n_batches, n_batches * self.tokens_per_batch]
        row += [train_loss, progress.validation_loss, learning_rate(config, n_batches)]
        row += [batches_per_second * self.tokens_per_batch, progress.seconds]
        metrics.append(self.folder, row)

    def keep_if_best(self) -> None:
        """Keeps the model, as `best`, if its validation loss is lower than at any step before."""
        progress = self.progress
        is_lower = not progress.validation_loss >= progress.best_loss  # NaN fails to be saved
        if self.folder and progress.step > 0 and is_lower:
            progress.best_loss = progress.validation_loss
            self.save_model(self.folder / "best")

    def take_folder(self) -> None:
        """Makes the folder the training's own: its files of another folder come along, and none of
        an earlier training stays."""
        best, before = self.folder / "best", self.progress.step and self.folder_before
        if before and (before / "best").exists():
            if before.resolve() != self.folder.resolve():
                with folders.replacing(best) as new:
                    shutil.copytree(before / "best", new, dirs_exist_ok=True)
        elif best.exists():
            self.save_model(best)
        metrics.begin(self.folder, before or None, self.progress.step)


def read_corpus(config: TrainingConfig, tokenizer: Tokenizer | None, world: World) -> Corpus:
    """The ids of the texts, by the given tokenizer or else the one that the config names; on each
    machine one rank encodes for all."""
    files = config.files
    n_bytes = files.n_mega_bytes and files.n_mega_bytes << 20
    tokenizer = tokenizer or TOKENIZERS.get(config.tokenizer) or find_tokenizer(config.tokenizer)
    if tokenizer is CharTokenizer and files.format == "burn":
        tokenizer = CharTokenizer()  # gpt-burn has no others
    sizes = n_bytes, tokenizer, config.max_vocab_size
    options = {"keep": not files.no_save, "bar": world.bar, "special": not config.no_special}
    read = partial(ids.read, files.text_corpus, *sizes, **options)
    for _ in range(9):
        corpus = world.broadcast_on_machine(read)
        if not world.max(corpus.ids is None):  # all ranks have them mapped
            corpus.unlink()
            return corpus
    raise UserError(f"other trainings drop all ids in {ids.FOLDER}: start this one anew")


def is_checkpoint(step: int, config: TrainingConfig) -> bool:
    """Whether the training is stored after the step, as it always is after the last one."""
    every = config.files.checkpoint_every
    offset = 5 if every == 10 else 0  # gpt-burn's, for the default
    return (step + 1 + offset) % every == 0 or step + 1 == config.n_steps
