"""What a training starts from, and what it leaves on disk: a model's folder with two more files,
how far the training is (`training.json`) and the optimizer's moments (`optimizer.safetensors`)."""

import contextlib
import json
import os
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from backend import files
from backend.errors import UserError
from gpt_tiny import shapes
from models import checkpoint as models
from models import folders, safetensors
from tokenizers import Tokenizer
from training import metrics
from training.config import (
    DEFAULTS,
    MODEL,
    NEW,
    TRAINING,
    TrainingConfig,
    as_option,
    changed,
    flat,
    settings_of,
)
from training.optimizers import OPTIMIZERS

CHECKPOINTS = Path(".data/checkpoints")
PROGRESS, MOMENTS = STATE_FILES = "training.json", "optimizer.safetensors"
MARKS = (metrics.METRICS,)  # of the folder of a training that did not end
# what settings of earlier versions lack
EARLIER = {"no_special": True, "sample_every": None, "exact_gelu": False}


@dataclass
class Progress:
    """How far a training is, in what JSON can hold."""

    step: int = 0
    batch: int = 0  # within the step
    losses: list = field(default_factory=list)  # of the batches of this step
    validation_loss: float = 0.0
    best_loss: float = sys.float_info.max
    seconds: float = 0.0
    corpus_checksum: int = 0


@dataclass
class Checkpoint:
    """Config, tokenizer, weights, moments and progress of a training.

    Without a tokenizer, the config names it; without weights, they are random. `kind` is one of
    FIXED in config.py.
    """

    config: TrainingConfig
    kind: str = NEW
    tokenizer: Tokenizer | None = None
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    folder: Path | None = None

    def save(self, folder: Path) -> None:
        with folders.replacing(folder, STATE_FILES) as new:
            models.write(new, self.config.to_json(), self.weights, self.tokenizer)
            safetensors.write(new / MOMENTS, self.moments)
            content = asdict(self.progress) | {"settings": settings_to_json(self.config)}
            (new / PROGRESS).write_text(json.dumps(content, indent=1), encoding="utf-8")


def from_model(path: Path, context_length: int | None) -> Checkpoint:
    """The sizes, the tokenizer and the weights of a model, whose context may be shortened."""
    model, tokenizer, weights = models.read(path)
    own = {"tokenizer": tokenizer.name, "max_vocab_size": tokenizer.vocab_size, "init_from": path}
    if context_length:
        if context_length > model.context_length:
            option = as_option("context_length", context_length)
            raise UserError(f"{option} is beyond the model's {model.context_length}")
        positions = "positional_embedding.weight"
        weights = ChainMap({positions: weights[positions][:context_length]}, weights)
    return Checkpoint(changed(DEFAULTS, asdict(model) | own), MODEL, tokenizer, weights)


def load(path: Path, config_of: Callable[[list[str]], TrainingConfig]) -> Checkpoint:
    """The checkpoint `path`, or the newest in that folder.

    `config_of` reads command lines, which earlier versions kept in place of settings. UserError if
    the checkpoint is not complete.
    """
    folder = newest(path)
    model, tokenizer, weights = models.read(folder)
    progress, config = read_progress(folder / PROGRESS, config_of)
    config = changed(config, asdict(model))
    moments = safetensors.read(folder / MOMENTS)
    names = OPTIMIZERS[config.optimizer.algorithm].state_shapes(shapes(model))
    if {name: moment.shape for name, moment in moments.items()} != names:
        raise UserError(f"{folder / MOMENTS} does not hold what its {PROGRESS} says")
    moments = {name: moments[name] for name in names}
    return Checkpoint(config, TRAINING, tokenizer, weights, moments, progress, folder)


def read_progress(
    path: Path, config_of: Callable[[list[str]], TrainingConfig]
) -> tuple[Progress, TrainingConfig]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        progress = Progress(**{each.name: saved[each.name] for each in fields(Progress)})
        if any(type(getattr(progress, each.name)) is not each.type for each in fields(Progress)):
            raise ValueError("a value of the wrong kind")
        if len(progress.losses) != progress.batch:
            raise ValueError("as many losses as batches are needed")
        if "settings" in saved:
            return progress, settings_from_json(saved["settings"])
        config, texts = config_of(saved["arguments"]), saved.get("texts")  # an earlier version
        paths = {"text_corpus": tuple(map(Path, texts))} if texts else {}
        known = EARLIER | {"output_path": Path(saved["output_path"]), **paths}
        return progress, changed(config, known)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} does not say where the training stopped: {error}") from error


def settings_to_json(config: TrainingConfig) -> dict[str, object]:
    """All settings by name, and the directory in which their paths are found."""
    settings = {"directory": os.getcwd(), **flat(config)}
    return json.loads(json.dumps(settings, default=str))  # paths as text, tuples as lists


def settings_from_json(saved: dict[str, object]) -> TrainingConfig:
    """What `settings_to_json` wrote; TypeError for a value of the wrong kind."""
    saved, settings = EARLIER | saved, {}
    for each, _ in settings_of(DEFAULTS):
        name, kind, value = each.name, each.type, saved[each.name]
        if name == "text_corpus":
            settings[name] = tuple(found_from(saved["directory"], path) for path in value)
        elif kind == Path | None:
            settings[name] = value and found_from(saved["directory"], value)
        elif isinstance(value, kind):
            settings[name] = value
        else:
            raise TypeError(f"{name} is {value!r:.60}")
    return changed(DEFAULTS, settings)


def found_from(directory: str, path: str) -> Path:
    """A path that was named in a directory, as it is found from this one; as it was named where it
    leads nowhere, as that of standard input, or when its project has moved."""
    there = Path(directory, path)
    is_elsewhere = directory != os.getcwd() and path != "-" and there.exists()
    return there if is_elsewhere else Path(path)


def drop_progress(folder: Path) -> None:
    """Leaves the model of a checkpoint alone: its moments are twice as large."""
    for name in (PROGRESS, MOMENTS):
        (folder / name).unlink(missing_ok=True)


def newest(path: Path) -> Path:
    """`path` if it is a checkpoint that can be resumed, or else the newest of those in it."""
    if (path / PROGRESS).exists():
        return path
    found = sorted(path.glob(f"*/{PROGRESS}"), key=lambda state: state.stat().st_mtime_ns)
    if not found:
        raise UserError(f"there is no checkpoint to go on from in {path}")
    return found[-1].parent


def new_folder(step: int) -> Path:
    return files.claim(CHECKPOINTS / f"{int(time.time())}_{step}")


@contextlib.contextmanager
def output_folder(config: TrainingConfig, rank: int) -> Iterator[Path | None]:
    """The folder for the model, of this training alone: the one that is named, or a new one; None
    where this rank keeps nothing."""
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
