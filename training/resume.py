"""A training on disk: a checkpoint with what it takes to go on, in `training.json` (where it
stands) and `optimizer.safetensors` (its optimizer's moments, or momentum)."""

import json
import time
from dataclasses import asdict, fields
from pathlib import Path

import tokenizers
from backend.errors import UserError
from backend.files import claim
from gpt_tiny import GPTConfig
from models import checkpoint, folders, safetensors
from training.optimizers import OPTIMIZERS
from training.state import STATE_FILES, Position, Start, Training

CHECKPOINTS = Path(".data/checkpoints")
POSITION, OPTIMIZER = STATE_FILES


def save(folder: Path, training: Training) -> None:
    """Keeps the training in a folder; from the one that it was kept in before, the model stays."""
    weights = training.weights()
    with folders.replacing(folder, STATE_FILES) as new:
        checkpoint.write(new, training.config.picture(), weights, training.corpus.tokenizer)
        names = training.optimizer.state_shapes({name: w.shape for name, w in weights.items()})
        moments = dict(zip(names, training.optimizer.read(), strict=True))
        safetensors.write(new / OPTIMIZER, moments)
        position = json.dumps(asdict(training.position), indent=1)
        (new / POSITION).write_text(position, encoding="utf-8")
    if training.latest:  # moments are twice as large as the model
        (training.latest / POSITION).unlink(missing_ok=True)
        (training.latest / OPTIMIZER).unlink(missing_ok=True)
    training.latest = folder


def load(path: Path) -> Start:
    """Where the training stopped: at the checkpoint `path`, or at the newest in that folder.

    ValueError if the checkpoint is not complete.
    """
    folder = newest(path)
    position = read_position(folder / POSITION)
    config = checkpoint.read_config(folder)
    shapes = checkpoint.shapes(GPTConfig(**config["model"]))
    moments = safetensors.read(folder / OPTIMIZER)
    found = {name: moment.shape for name, moment in moments.items()}
    expected = {name: each.state_shapes(shapes) for name, each in OPTIMIZERS.items()}
    algorithm = next((name for name in expected if expected[name] == found), None)
    if algorithm is None:
        raise UserError(f"{folder / OPTIMIZER} does not belong to the model beside it")
    return Start(
        tokenizers.load(config.get("tokenizer", "char"), folder),
        checkpoint.read_weights(folder, shapes),
        {name: moments[name] for name in expected[algorithm]},
        algorithm,
        position,
        folder,
        config,
    )


def read_position(path: Path) -> Position:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved.setdefault("texts", [])  # which those of earlier versions lack
        position = Position(**{field.name: saved[field.name] for field in fields(Position)})
        if any(type(getattr(position, field.name)) is not field.type for field in fields(Position)):
            raise UserError("a value of the wrong kind")
        if not all(type(word) is str for word in (*position.arguments, *position.texts)):
            raise UserError("arguments that are not text")
        if len(position.losses) != position.batch:
            raise UserError("as many losses as batches are needed")
        return position
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} does not say where the training stopped: {error}") from error


def newest(path: Path) -> Path:
    """`path` if it is a checkpoint that can be resumed, or else the newest of those in it."""
    if (path / POSITION).exists():
        return path
    found = sorted(path.glob(f"*/{POSITION}"), key=lambda state: state.stat().st_mtime_ns)
    if not found:
        raise UserError(f"there is no checkpoint to go on from in {path}")
    return found[-1].parent


def new_folder(step: int) -> Path:
    return claim(CHECKPOINTS / f"{int(time.time())}_{step}")
