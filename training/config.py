"""The settings of a training in one frozen object, and how given settings are merged into it.

The defaults are here, but for the model's sizes in GPTConfig.
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from backend.errors import UserError
from data.texts import CORPUS
from gpt_tiny import GPTConfig

OPTIONS = {  # setting -> option of train.py, where the names differ
    "grad_clipping": "grad_clip",
    "max_vocab_size": "vocab_size",
    "algorithm": "optimizer",
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizers: gpt-burn's, under its names, then ours."""

    grad_clipping: float | None = None  # the largest norm of a gradient
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-5
    weight_decay: float = 1e-4
    algorithm: str = "adamw"  # or "muon"
    momentum: float = 0.95  # Muon's


@dataclass(frozen=True)
class Files:
    """Files that a training reads and writes."""

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
    """All settings; no two of them share a name."""

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
    max_vocab_size: int | None = None  # None: the tokenizer's default
    accumulate: int = 1
    muon_learning_rate: float = 0.02
    warmup: int = 0
    decay: str = "none"
    min_learning_rate: float = 0.0
    dtype: str = "float32"
    no_special: bool = False  # special tokens are text like any other
    files: Files = field(default_factory=Files)

    def to_json(self) -> dict:
        """The content of `config.json`: gpt-burn's settings in its layout, and the tokenizer."""
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


def settings_of(config) -> Iterator[tuple[Field, object]]:
    """Yields the field and the value of every setting, also of nested configs."""
    for setting in fields(config):
        value = getattr(config, setting.name)
        if is_dataclass(value):
            yield from settings_of(value)
        else:
            yield setting, value


def flat(config) -> dict[str, object]:
    """Every setting by name."""
    return {setting.name: value for setting, value in settings_of(config)}


def changed(config, settings: Mapping[str, object]):
    """A copy with new values for some settings, also of nested configs; other names are ignored."""
    values = {
        name: changed(value, settings) if is_dataclass(value) else settings.get(name, value)
        for name, value in vars(config).items()
    }
    return replace(config, **values)


DEFAULTS = TrainingConfig()
DEFAULT_SETTINGS = flat(DEFAULTS)

# Settings that a start fixes: a given setting may not contradict them. A corpus may move: its
# checksum identifies it.
NEW, MODEL, TRAINING = "nothing", "the model to start from", "the training to go on with"
MAY_CHANGE = {"n_steps", "text_corpus", "output_path", "no_save", "format"}
MAY_CHANGE |= {"checkpoint_every", "sample_every"}
FIXED = {
    NEW: set(),
    MODEL: {"d_model", "n_layers", "n_heads", "tokenizer", "max_vocab_size"},
    TRAINING: DEFAULT_SETTINGS.keys() - MAY_CHANGE,
}


def merge(base: TrainingConfig, given: Mapping[str, object], kind: str = NEW) -> TrainingConfig:
    """The base with the given settings; UserError for another value of a setting that a start of
    this kind, a key of FIXED, fixes."""
    before = flat(base)
    for name, value in given.items():
        if name in FIXED[kind] and value != before[name]:
            given_option, fixed_option = as_option(name, value), as_option(name, before[name])
            raise UserError(f"{given_option} contradicts {kind}: it has {fixed_option}")
    config = changed(base, given)
    if config.model.d_model != base.model.d_model:
        config = changed(config, {"d_hidden": 4 * config.model.d_model})
    return config


def as_option(name: str, value: object) -> str:
    """A setting as an option of train.py; `no --option` where it is not set."""
    option = f"--{OPTIONS.get(name, name).replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return option if value else f"no {option}"
    return f"{option} {value}"
