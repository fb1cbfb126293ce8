"""The settings of a training, in one frozen object, and how given ones are merged into it.

The defaults stand here, and those of the model's sizes in GPTConfig.
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from backend.errors import UserError
from data.texts import CORPUS
from gpt_tiny import GPTConfig
from tokenizers import Tokenizer

OPTIONS = {  # of train.py, where they are not named as the setting is
    "grad_clipping": "grad_clip",
    "max_vocab_size": "vocab_size",
    "algorithm": "optimizer",
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings, under gpt-burn's names, and then ours."""

    grad_clipping: float | None = None  # the largest norm of a gradient
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
    sample_every: int | None = None  # steps


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
    max_vocab_size: int | None = None  # the tokenizer's own
    accumulate: int = 1
    muon_learning_rate: float = 0.02
    warmup: int = 0
    decay: str = "none"
    min_learning_rate: float = 0.0
    dtype: str = "float32"
    no_special: bool = False  # whether texts have no special tokens
    files: Files = field(default_factory=Files)

    def to_json(self) -> dict:
        """The content of `config.json`: gpt-burn's settings as it writes them, and a tokenizer."""
        settings = asdict(self)
        names = list(settings)
        content = {name: settings[name] for name in names[: names.index("tokenizer") + 1]}
        for name in ("gpt2", "exact_gelu"):
            if not content["model"][name]:
                del content["model"][name]
        del content["optimizer"]["algorithm"], content["optimizer"]["momentum"]
        clipping = content["optimizer"]["grad_clipping"]
        content["optimizer"]["grad_clipping"] = clipping and {"Norm": clipping}
        return content

    def with_tokenizer(self, tokenizer: Tokenizer) -> "TrainingConfig":
        model = replace(self.model, vocab_size=tokenizer.vocab_size)
        return replace(self, model=model, tokenizer=tokenizer.name)


def settings_of(config) -> Iterator[tuple[Field, object]]:
    """Every setting of a config and of the configs in it: its field and its value."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from settings_of(value)
        else:
            yield each, value


def flat(config) -> dict[str, object]:
    """Every setting by name."""
    return {each.name: value for each, value in settings_of(config)}


def changed(config, settings: Mapping[str, object]):
    """The config with other values for some settings, wherever in it they stand."""
    values = {}
    for name, value in vars(config).items():
        is_section = is_dataclass(value)
        values[name] = changed(value, settings) if is_section else settings.get(name, value)
    return replace(config, **values)


DEFAULTS = TrainingConfig()

# What a start decides, so that no given setting may contradict it. A corpus that has moved is known
# by its checksum.
NEW, MODEL, TRAINING = "nothing", "the model to start from", "the training to go on with"
MAY_CHANGE = {"n_steps", "text_corpus", "output_path", "no_save", "format"}
MAY_CHANGE |= {"checkpoint_every", "sample_every"}
FIXED = {
    NEW: set(),
    MODEL: {"d_model", "n_layers", "n_heads", "tokenizer", "max_vocab_size"},
    TRAINING: flat(DEFAULTS).keys() - MAY_CHANGE,
}


def merge(base: TrainingConfig, given: Mapping[str, object], start: str = NEW) -> TrainingConfig:
    """The base with the given settings in place of its own; `start` is one of FIXED.

    UserError for a given setting that contradicts the start.
    """
    before = flat(base)
    for name, value in given.items():
        if name in FIXED[start] and value != before[name]:
            option, its = as_option(name, value), as_option(name, before[name])
            raise UserError(f"{option} contradicts {start}: it has {its}")
    config = changed(base, given)
    if config.model.d_model != base.model.d_model:
        config = changed(config, {"d_hidden": 4 * config.model.d_model})
    return config


def as_option(name: str, value: object) -> str:
    """A setting as train.py takes it, or that it is not set."""
    option = f"--{OPTIONS.get(name, name).replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return option if value else f"no {option}"
    return f"{option} {value}"
