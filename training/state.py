"""A training: what it starts from, what it changes, and where it stands."""

import contextlib
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tinygrad import Tensor

from backend import machine
from backend.arrays import Flat, copy_in, zeros
from backend.errors import UserError
from backend.files import claim
from backend.jit_cache import sources
from data import ids
from data.ids import Corpus
from gpt_tiny import GPT, GPTConfig, initial_weights, shapes
from models import checkpoint, find_tokenizer
from tokenizers import TOKENIZERS, Tokenizer
from training.config import TrainingConfig
from training.optimizers import OPTIMIZERS, AdamW, Muon
from training.workers import World

STATE_FILES = ("training.json", "optimizer.safetensors")  # beside a model
MARKS = ("metrics.csv",)  # the folder of a training that did not end


@dataclass
class Position:
    """Where a training stands, in what JSON can hold."""

    step: int = 0
    batch: int = 0  # within the step
    losses: list = field(default_factory=list)  # of the batches of this step
    validation_loss: float = 0.0
    best_loss: float = sys.float_info.max
    seconds: float = 0.0
    output_path: str = ""  # empty where nothing is kept
    corpus_checksum: int = 0
    arguments: list = field(default_factory=list)  # all words of its command lines so far
    texts: list = field(default_factory=list)  # its corpus, as the last of them named it


@dataclass
class Start:
    """What a training starts from: nothing, a model, or a checkpoint, which has all of this."""

    tokenizer: Tokenizer | None = None
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)  # without them, random ones
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)
    algorithm: str = ""  # whose moments these are
    position: Position = field(default_factory=Position)
    folder: Path | None = None
    config: dict = field(default_factory=dict)  # its config.json


@dataclass
class Training:
    config: TrainingConfig
    corpus: Corpus
    position: Position
    model: GPT
    parameters: Flat  # the model's memory
    optimizer: AdamW | Muon
    losses: Tensor  # (batches_per_step,), of this rank's shares
    latest: Path | None  # the newest checkpoint

    @property
    def is_kept(self) -> bool:
        return bool(self.position.output_path)

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters by name; ValueError if one of them is not finite."""
        arrays = dict(zip(self.model.parameters(), self.parameters.read(), strict=True))
        if not all(map(checkpoint.is_finite, arrays.values())):
            raise self.diverged()
        return arrays

    def diverged(self) -> ValueError:
        return UserError(
            "the loss or a parameter is no longer a finite number: try a lower --learning-rate, or "
            f"--grad-clip 1; the last good checkpoint: {self.latest or 'none'}"
        )

    def save_model(self, folder: Path) -> None:
        config = self.config
        picture, format = config.picture(), config.files.format
        weights, tokenizer = self.weights(), self.corpus.tokenizer
        model = (picture, weights, tokenizer, format)
        checkpoint.save(folder, *model, owned=STATE_FILES, marks=MARKS)


def read_corpus(config: TrainingConfig, tokenizer: Tokenizer | None, world: World) -> Corpus:
    """By the given tokenizer or else the one that the config names; on each machine one rank
    encodes for all."""
    files = config.files
    n_bytes = files.n_mega_bytes and files.n_mega_bytes << 20
    tokenizer = tokenizer or find_tokenizer(config.tokenizer) or TOKENIZERS[config.tokenizer]
    sizes = n_bytes, tokenizer, config.max_vocab_size
    read = partial(ids.read, files.text_corpus, *sizes, keep=not files.no_save, bar=world.bar())
    for _ in range(9):
        corpus = world.broadcast_on_machine(read)
        if not world.max(corpus.ids is None):  # all ranks have them mapped
            corpus.unlink()
            return corpus
    raise UserError(f"other trainings drop all ids in {ids.FOLDER}: start this one anew")


def begin(config: TrainingConfig, corpus: Corpus, start: Start, world: World) -> Training:
    """Makes model, optimizer and position of what `start` holds, whose tensors it takes.

    ValueError for what can't be trained, or can't go on from there.
    """
    check_sizes(config, corpus)
    world.share(config.batch_size, "--batch-size", config.accumulate)
    position, checksum = start.position, corpus.checksum
    code = (sources(), version("tinygrad"), version("numpy"))
    world.check_same(code=code, corpus=checksum, command=position.arguments)
    if start.folder:
        check_same_training(config, checksum, start)
    position.corpus_checksum = checksum
    is_kept = world.rank == 0 and not config.files.no_save
    position.output_path = output_folder(config, position.output_path) if is_kept else ""

    algorithm = config.optimizer.algorithm
    model, parameters = flat_model(config.model, algorithm)
    optimizer = OPTIMIZERS[algorithm](parameters, config.optimizer)
    losses = zeros(config.batches_per_step)
    if world.rank == 0:
        weights = start.weights or initial_weights(config.model, config.seed)
        parameters.write([weights[name] for name in model.parameters()])
        if start.moments:
            optimizer.write(start.moments.values())
        to_come = config.batches_per_step - position.batch
        copy_in(losses, np.pad(np.float32(position.losses), (0, to_come)))
    start.weights = start.moments = {}  # their memory is needed
    world.broadcast_tensors([*parameters.whole, *optimizer.state])
    learned = (model, parameters, optimizer, losses)
    return Training(config, corpus, position, *learned, start.folder)


def flat_model(config: GPTConfig, algorithm: str = "adamw") -> tuple[GPT, Flat]:
    """A model whose parameters, all 0 yet, lie in memory for this optimizer; and that memory."""
    parameters = OPTIMIZERS[algorithm].memory(shapes(config))
    return GPT(config, dict(zip(shapes(config), parameters.parts, strict=True))), parameters


def check_sizes(config: TrainingConfig, corpus: Corpus) -> None:
    """ValueError where the corpus is too short, or where the system would run out of memory, and
    end the training without a word."""
    model, n_validation = config.model, len(corpus.ids) - corpus.n_training
    if n_validation <= model.context_length:
        raise UserError(
            f"{corpus.name} is too short: its last tenth, {n_validation} tokens, is "
            f"for validation and has to exceed --context-length {model.context_length}"
        )
    activations = 16 * model.d_model + 3 * model.d_hidden  # floats a token and block
    activations += 4 * model.n_heads * model.context_length
    n_tokens = config.batch_size // config.accumulate * model.context_length
    n_floats = 4 * model.n_parameters  # with their gradients and two moments
    n_floats += n_tokens * (model.n_layers * activations + 4 * model.vocab_size)
    memory = machine.memory()
    if 4 * n_floats > memory:
        raise UserError(
            f"training {model.n_parameters:,} parameters on {n_tokens:,} tokens at a time takes "
            f"about {4 * n_floats / 2**30:,.0f} GiB of memory, and there are "
            f"{memory / 2**30:,.0f}: choose a smaller model, --context-length or --batch-size"
        )


def check_same_training(config: TrainingConfig, checksum: int, start: Start) -> None:
    """ValueError if what goes on is not what began, but for the number of steps."""
    if {**start.config, "n_steps": 0} != {**config.picture(), "n_steps": 0}:
        raise UserError(f"{start.folder}/config.json is not what its training.json says")
    if start.algorithm != config.optimizer.algorithm:
        raise UserError(f"{start.folder} does not hold what its training.json says")
    if start.position.corpus_checksum != checksum:
        raise UserError(
            "the corpus is not the one that the training began with: name that with --text-corpus"
        )


def output_folder(config: TrainingConfig, before: str) -> str:
    """The folder of the training's model; a new one gets what is in the one `before`."""
    folder, model = config.files.output_path, config.model
    if folder is None and before:
        return before
    if folder is None:
        name = f"gpt_{model.n_parameters >> 10}k_{model.context_length}context_{int(time.time())}"
        return str(claim(Path(".data") / name))
    folder.mkdir(parents=True, exist_ok=True)
    if before and Path(before).resolve() != folder.resolve():
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(Path(before) / "best", folder / "best", dirs_exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(Path(before) / "metrics.csv", folder)
    return str(folder)
