"""The start of a training, and its state on disk: a model's folder with two more files, progress
and settings (`training.json`) and the optimizer's moments (`optimizer.safetensors`)."""

import json
import os
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

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
    merge,
    settings_of,
)
from training.optimizers import OPTIMIZERS

PROGRESS, MOMENTS = STATE_FILES = "training.json", "optimizer.safetensors"
MARKS = (metrics.METRICS,)  # marks the folder of a training that did not end
# settings that checkpoints of earlier versions lack
EARLIER = {"no_special": True, "sample_every": None, "exact_gelu": False}


@dataclass
class Progress:
    """The progress of a training, in types of JSON."""

    step: int = 0
    batch: int = 0  # within the step
    losses: list = field(default_factory=list)  # of the batches of this step so far
    validation_loss: float = 0.0
    best_loss: float = sys.float_info.max
    seconds: float = 0.0
    corpus_checksum: int = 0


@dataclass
class Checkpoint:
    """Config, tokenizer, weights, moments and progress of a training.

    Without a tokenizer, the config names one; without weights, they are drawn at random. `kind` is
    a key of FIXED in config.py.
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
    """A start with the sizes, tokenizer and weights of a model, perhaps with a shorter context."""
    model, tokenizer, weights = models.read(path)
    settings = asdict(model) | {"tokenizer": tokenizer.name, "init_from": path}
    settings["max_vocab_size"] = tokenizer.vocab_size
    if context_length:
        if context_length > model.context_length:
            option = as_option("context_length", context_length)
            raise UserError(f"{option} is beyond the model's {model.context_length}")
        positions = "positional_embedding.weight"
        weights = ChainMap({positions: weights[positions][:context_length]}, weights)
    return Checkpoint(changed(DEFAULTS, settings), MODEL, tokenizer, weights)


def load(path: Path, parse: Callable[[list[str]], dict[str, object]]) -> Checkpoint:
    """The checkpoint `path`, or the newest in the folder `path`; UserError if it is incomplete.

    `parse` returns the settings of a command line, which earlier versions stored.
    """
    folder = newest(path)
    model, tokenizer, weights = models.read(folder)
    progress, config = read_progress(folder / PROGRESS, parse)
    config = changed(config, asdict(model))
    moments = dict(safetensors.read(folder / MOMENTS))
    expected = OPTIMIZERS[config.optimizer.algorithm].state_shapes(shapes(model))
    if {name: moment.shape for name, moment in moments.items()} != expected:
        raise UserError(f"{folder / MOMENTS} does not hold what its {PROGRESS} says")
    return Checkpoint(config, TRAINING, tokenizer, weights, moments, progress, folder)


def read_progress(
    path: Path, parse: Callable[[list[str]], dict[str, object]]
) -> tuple[Progress, TrainingConfig]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        types = {field.name: field.type for field in fields(Progress)}
        progress = Progress(**{name: saved[name] for name in types})
        if any(type(saved[name]) is not kind for name, kind in types.items()):
            raise ValueError("a value of the wrong kind")
        if len(progress.losses) != progress.batch:
            raise ValueError("as many losses as batches are needed")
        if "settings" in saved:
            return progress, settings_from_json(saved["settings"])
        settings = parse(saved["arguments"]) | EARLIER  # an earlier version's checkpoint
        settings["output_path"] = Path(saved["output_path"])
        if texts := saved.get("texts"):
            settings["text_corpus"] = tuple(map(Path, texts))
        return progress, merge(DEFAULTS, settings)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} does not say where the training stopped: {error}") from error


def settings_to_json(config: TrainingConfig) -> dict[str, object]:
    """All settings by name, and the working directory, for relative paths."""
    settings = {"directory": os.getcwd(), **flat(config)}
    return json.loads(json.dumps(settings, default=str))  # paths as text, tuples as lists


def settings_from_json(saved: dict[str, object]) -> TrainingConfig:
    """The inverse of `settings_to_json`; TypeError for a value of the wrong kind."""
    saved, settings = EARLIER | saved, {}
    for setting, _ in settings_of(DEFAULTS):
        name, kind, value = setting.name, setting.type, saved[setting.name]
        if name == "text_corpus":
            settings[name] = tuple(resolve_path(saved["directory"], path) for path in value)
        elif kind == Path | None:
            settings[name] = value and resolve_path(saved["directory"], value)
        elif isinstance(value, kind):
            settings[name] = value
        else:
            raise TypeError(f"{name} is {value!r:.60}")
    return changed(DEFAULTS, settings)


def resolve_path(directory: str, path: str) -> Path:
    """`path` below `directory`, the working directory of an earlier run, if it exists there; `path`
    unchanged for the same working directory, standard input, and a project that has moved."""
    resolved = Path(directory, path)
    is_elsewhere = directory != os.getcwd() and path != "-" and resolved.exists()
    return resolved if is_elsewhere else Path(path)


def newest(path: Path) -> Path:
    """`path` if it can be resumed, else the newest checkpoint in the folder `path` that can."""
    if (path / PROGRESS).exists():
        return path
    found = sorted(path.glob(f"*/{PROGRESS}"), key=lambda state: state.stat().st_mtime_ns)
    if not found:
        raise UserError(f"there is no checkpoint to go on from in {path}")
    return found[-1].parent
