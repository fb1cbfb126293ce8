"""A training on disk: a checkpoint with what it takes to go on, in `training.json` (where it
stands) and `optimizer.safetensors` (AdamW's moments)."""

import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import tokenizers
from gpt_tiny import GPT, GPTConfig

CHECKPOINTS = Path(".data/checkpoints")
STATE, OPTIMIZER = "training.json", "optimizer.safetensors"


@dataclass
class Training:
    folder: Path
    config: dict
    weights: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    state: dict
    tokenizer: tokenizers.Tokenizer


def save(folder: Path, config: dict, weights: dict, tokenizer, state: dict, moments: dict) -> None:
    def also(temporary: Path) -> None:
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        checkpoint.write_safetensors(temporary / OPTIMIZER, moments)

    checkpoint.save(folder, config, weights, tokenizer, also=also)


def load(path: Path) -> Training:
    """The training that stopped at the checkpoint `path`, or at the newest in that folder.

    Raises ValueError where it is not complete.
    """
    folder = newest(path)
    state = read_state(folder / STATE)
    config = checkpoint.read_config(folder)
    shapes = {n: t.shape for n, t in GPT(GPTConfig(**config["model"])).parameters().items()}
    moments = checkpoint.read_safetensors(folder / OPTIMIZER)
    expected = dict(zip(moment_names(shapes), 2 * list(shapes.values()), strict=True))
    if {name: moment.shape for name, moment in moments.items()} != expected:
        raise ValueError(f"{folder / OPTIMIZER} does not belong to the model beside it")
    return Training(
        folder,
        config,
        checkpoint.read_weights(folder, shapes),
        {name: moments[name] for name in expected},
        state,
        tokenizers.load(config.get("tokenizer", "char"), folder),
    )


def moment_names(names: Iterable[str]) -> list[str]:
    """Names for the first moments of all parameters, then the second ones."""
    return [f"{kind}.{name}" for kind in ("moments_1", "moments_2") for name in names]


def read_state(path: Path) -> dict:
    try:
        state = json.loads(path.read_text())
        kinds = {
            "step": int,
            "batch": int,
            "losses": list,
            "validation_loss": float,
            "best_loss": float,
            "seconds": float,
            "output_path": str,
            "corpus_checksum": int,
            "arguments": list,
        }
        if any(type(state[name]) is not kind for name, kind in kinds.items()):
            raise ValueError("a value of the wrong kind")
        if not all(type(word) is str for word in state["arguments"]):
            raise ValueError("arguments that are not text")
        if len(state["losses"]) != state["batch"]:
            raise ValueError("as many losses as batches are needed")
        return state
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not say where the training stopped: {error}") from error


def check(training: Training, config: dict, corpus_checksum: int) -> None:
    """ValueError if the training was not begun with this config (but for n_steps) and corpus."""
    if {**training.config, "n_steps": 0} != {**config, "n_steps": 0}:
        raise ValueError(f"{training.folder}/config.json is not what {STATE} says")
    if training.state["corpus_checksum"] != corpus_checksum:
        raise ValueError(
            "the corpus is not the one that the training began with: name that with --text-corpus"
        )


def newest(path: Path) -> Path:
    """`path` if it is a checkpoint that can be resumed, or else the newest of those in it."""
    if (path / STATE).exists():
        return path
    found = sorted(path.glob(f"*/{STATE}"), key=lambda state: state.stat().st_mtime_ns)
    if not found:
        raise ValueError(f"there is no checkpoint to go on from in {path}")
    return found[-1].parent


def new_folder(step: int) -> Path:
    return claim(CHECKPOINTS / f"{int(time.time())}_{step}")


def claim(path: Path) -> Path:
    """Makes a folder of this name, or with a number behind it if another training has that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path.name, *(f"{path.name}_{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            path.with_name(name).mkdir()
            return path.with_name(name)
    raise ValueError(f"{path} exists, with a thousand others of that name")


def forget(folder: Path) -> None:
    """Makes a resumable checkpoint a plain one: AdamW's moments are twice as large as the model."""
    (folder / STATE).unlink(missing_ok=True)
    (folder / OPTIMIZER).unlink(missing_ok=True)
