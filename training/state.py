"""A training: what it starts from, what it changes, and where it stands."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tinygrad import Tensor

from backend.memory import Flat
from gpt_tiny import GPT
from models import checkpoint
from tokenizers import Tokenizer
from training.optimizers import AdamW
from training.settings import TrainingConfig


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


@dataclass
class Start:
    """What a training starts from: nothing, a model, or a checkpoint, which has all of this."""

    tokenizer: Tokenizer | None = None
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)  # without them, random ones
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)
    position: Position = field(default_factory=Position)
    folder: Path | None = None
    config: dict = field(default_factory=dict)  # its config.json


@dataclass
class Training:
    config: TrainingConfig
    tokenizer: Tokenizer
    ids: np.ndarray  # of the corpus
    position: Position
    model: GPT
    parameters: Flat  # the model's memory
    optimizer: AdamW
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
        return ValueError(
            "the loss or a parameter is no longer a finite number: try a lower --learning-rate, or "
            f"--grad-clip 1; the last good checkpoint: {self.latest or 'none'}"
        )

    def save_model(self, folder: Path) -> None:
        config = self.config
        picture, format = config.picture(), config.files.format
        checkpoint.save(folder, picture, self.weights(), self.tokenizer, format)
