"""The settings of a training, in one frozen object: `config.json` is its picture.

Their defaults stand here, and those of the model's in GPTConfig.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from data.texts import CORPUS
from gpt_tiny import GPTConfig
from tokenizers import Tokenizer


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings, under gpt-burn's names, and then ours."""

    grad_clipping: float | None = None  # the longest that a gradient may be
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-5
    weight_decay: float = 1e-4
    algorithm: str = "adamw"  # or "muon", for the matrices of the blocks
    momentum: float = 0.95  # Muon's


@dataclass(frozen=True)
class Files:
    """What a training reads, and what it leaves."""

    text_corpus: tuple[Path, ...] = (CORPUS,)
    n_mega_bytes: int | None = None
    init_from: Path | None = None
    output_path: Path | None = None
    no_save: bool = False
    format: str = "tiny"
    checkpoint_every: int = 10  # steps


@dataclass(frozen=True)
class TrainingConfig:
    """All that decides what a training gives; no two settings in it share a name."""

    # gpt-burn's
    n_steps: int = 50
    batch_size: int = 32
    learning_rate: float = 0.003
    batches_per_step: int = 100
    validation_size: int = 128
    seed: int = 0
    model: GPTConfig = field(default_factory=GPTConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # ours
    tokenizer: str = "char"
    max_vocab_size: int = 2000
    accumulate: int = 1
    muon_learning_rate: float = 0.02
    warmup: int = 0
    decay: str = "none"
    min_learning_rate: float = 0.0
    dtype: str = "float32"
    files: Files = field(default_factory=Files)

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.model.context_length

    def picture(self) -> dict:
        """What `config.json` holds: gpt-burn's settings as it writes them, and the tokenizer."""
        settings = asdict(self)
        names = list(settings)
        picture = {name: settings[name] for name in names[: names.index("tokenizer") + 1]}
        if not self.model.gpt2:
            del picture["model"]["gpt2"]
        del picture["optimizer"]["algorithm"], picture["optimizer"]["momentum"]
        clipping = picture["optimizer"]["grad_clipping"]
        picture["optimizer"]["grad_clipping"] = clipping and {"Norm": clipping}
        return picture

    def with_tokenizer(self, tokenizer: Tokenizer) -> "TrainingConfig":
        model = replace(self.model, vocab_size=tokenizer.vocab_size)
        return replace(self, model=model, tokenizer=tokenizer.name)


def flat(config) -> dict[str, object]:
    """Every setting of a config and of the configs in it, by name."""
    settings = {}
    for name, value in sections(config):
        settings |= flat(value) if is_dataclass(value) else {name: value}
    return settings


def changed(config, settings: Mapping[str, object]):
    """The config with other values for some settings, wherever in it they stand."""
    values = {}
    for name, value in sections(config):
        is_section = is_dataclass(value)
        values[name] = changed(value, settings) if is_section else settings.get(name, value)
    return replace(config, **values)


def sections(config) -> list[tuple[str, object]]:
    return [(each.name, getattr(config, each.name)) for each in fields(config)]
