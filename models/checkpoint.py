"""A model on disk: a folder that holds `config.json` and, beside it, the weights.

Three layouts: our own (`model.safetensors`), gpt-burn's (`model.mpk`), and that of Hugging Face's
GPT-2, in which a GPT-2 is always saved, and whose weights may be in several files. In memory the
weights are numpy arrays by name, a linear's as (out, in).

Nothing here trusts a file: each length and shape is compared with the file's size before memory is
taken for it, nothing is unpickled, and what is wrong is a UserError of one line.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np

import tokenizers
from backend.errors import UserError
from gpt_tiny import GPT, GPTConfig, shapes
from models import gpt2, gpt_burn, hub, safetensors
from models.folders import INDEX, MODEL_FILES, WEIGHT_FILES, replacing
from models.safetensors import LazyArrays
from tokenizers import OF_FOLDERS, TOKENIZERS, Tokenizer


def load(folder: Path | str) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a folder in any of the three layouts, or of a name on the
    Hugging Face Hub.

    UserError or OSError, with one line that names the file and what is wrong with it.
    """
    config, tokenizer, weights = read(folder)
    return GPT(config, weights), tokenizer


def read(folder: Path | str) -> tuple[GPTConfig, Tokenizer, Mapping[str, np.ndarray]]:
    """What `load` makes a model of; the weights as `read_weights` gives them."""
    folder = find(Path(folder))
    config = read_config(folder)
    model = GPTConfig(**config["model"])
    wanted = shapes(model)
    return model, read_tokenizer(folder, config), read_weights(folder, wanted)


def find(folder: Path) -> Path:
    """The folder or, where there is none and its name could be one on the Hub, the folder of that
    model in the Hub's cache, to which the files that are needed are fetched."""
    if folder.exists() or not hub.is_name(folder):
        return folder
    repository = hub.Repository(folder.as_posix())
    config = parse_config(repository.fetch("config.json"))  # before the weights of what is no GPT-2
    kind = TOKENIZERS.get(config.get("tokenizer"), TOKENIZERS[tokenizers.DEFAULT])
    optional = ["generation_config.json"]
    if kind is OF_FOLDERS:
        fetch_byte_pairs(repository)
    else:  # gpt-burn's characters are in no file
        optional += kind.files
    weights = repository.fetch("model.safetensors", INDEX, after=optional)
    if weights.name == INDEX:
        for shard in sorted(set(safetensors.weight_map(weights).values())):
            repository.fetch(shard)
    return weights.parent


def fetch_byte_pairs(repository: hub.Repository) -> Path:
    """Fetches the files of a tokenizer of byte pairs; their folder."""
    optional = ("added_tokens.json", *OF_FOLDERS.role_files)
    path = repository.fetch("vocab.json", "tokenizer.json", after=optional)
    if path.name == "vocab.json":
        repository.fetch("merges.txt")
    return path.parent


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder or of a name on the Hugging Face Hub, which learns nothing."""
    folder, reason = Path(name), "there is no such folder"
    try:
        if hub.is_name(folder):
            folder = fetch_byte_pairs(hub.Repository(folder.as_posix()))
    except UserError as error:
        reason = str(error)
    if not folder.is_dir():
        raise UserError(
            f"--tokenizer {name} is not known: name {', '.join(TOKENIZERS)}, or a folder or a "
            "model of the Hugging Face Hub with vocab.json and merges.txt, or tokenizer.json "
            f"({reason})"
        )
    return OF_FOLDERS.load(folder)


def read_config(folder: Path) -> dict:
    """The folder's `config.json`, with a section `model` that makes a GPTConfig.

    The model's sizes are compared with the size of the weights' file, so that a model built from
    them is never much larger than the file it comes from.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise UserError(f"there is no model folder {path.parent}")
    if not path.is_file():
        raise UserError(f"{path.parent} is not a model folder: it has no config.json")
    file, config = weights_file(path.parent), parse_config(path)
    files = safetensors.shards(file) if file.name == INDEX else [file]
    n_bytes = sum(file.stat().st_size for file in files)
    if GPTConfig(**config["model"]).n_parameters > n_bytes:
        raise UserError(f"{path}: it asks for more weights than {file.name} can hold")
    return config


def parse_config(path: Path) -> dict:
    """A config by itself: its sizes may still be any."""
    config = safetensors.read_json(path, "a config")
    try:
        if "model_type" in config:
            config = gpt2.config_to_ours(config)
        model = config.get("model")
        if type(model) is not dict:
            raise UserError("it has no section model")
        known = {field.name for field in fields(GPTConfig)}
        if wrong := model.keys() - known:
            raise UserError(f"a model has no setting {min(wrong)!r:.60}")
        if wrong := known - model.keys() - {"gpt2", "exact_gelu"}:
            raise UserError(f"it lacks the setting {min(wrong)}")
        tokenizer = config.get("tokenizer", tokenizers.DEFAULT)
        if not isinstance(tokenizer, str) or not tokenizer.isidentifier():
            raise UserError(f"tokenizer is {tokenizer!r:.60}, not the name of a tokenizer")
        GPTConfig(**model)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def read_tokenizer(folder: Path, config: dict) -> Tokenizer:
    """The tokenizer of a model's folder; where it is of byte pairs, rows of the model may be left
    for which it has no token."""
    vocab_size = config["model"]["vocab_size"]
    tokenizer = tokenizers.load(config.get("tokenizer", tokenizers.DEFAULT), folder)
    if isinstance(tokenizer, OF_FOLDERS):
        tokenizer.n_surplus = max(0, vocab_size - tokenizer.vocab_size)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{folder / 'config.json'}: vocab_size is {vocab_size}, but the tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size} tokens: they do not belong together"
        )
    return tokenizer


def read_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, np.ndarray]:
    """The weights of a model folder, by name, in the order and the shapes of `shapes`.

    They come from the first of WEIGHT_FILES that there is. Half precision stays float16, all else
    is float32. The arrays of a safetensors file are read one by one, each whenever it is asked for,
    and only then is it looked through for what is not finite.
    """
    path = weights_file(folder)
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if path.name == "model.mpk":
        arrays = gpt_burn.read_record(path)
    else:
        arrays = (safetensors.read_sharded if path.name == INDEX else safetensors.read)(path)
        if gpt2.is_theirs(arrays):
            n_layers = sum(name.endswith(".norm_1.gamma") for name in shapes)
            arrays = LazyArrays(gpt2.weights_to_ours(arrays, n_layers, path))
    for name, shape in shapes.items():
        if name not in arrays:
            raise UserError(f"{path} lacks the tensor {name} {shape} that config.json asks for")
        if arrays[name].shape != tuple(shape):
            raise UserError(
                f"{path}: the tensor {name} has the shape {arrays[name].shape}, "
                f"but config.json asks for {tuple(shape)}"
            )
    if surplus := arrays.keys() - shapes.keys():
        name = min(surplus)
        raise UserError(
            f"{path}: config.json does not ask for the tensor {name!r:.80} {arrays[name].shape}"
        )
    return LazyArrays({name: partial(take_finite, arrays, name, path) for name in shapes})


def take_finite(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    """An array in at most float32; UserError if it holds NaN or what is infinite there."""
    array = arrays[name]
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if not is_finite(array):
        raise UserError(f"{path}: the tensor {name} holds numbers that are not finite")
    return array


def is_finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        # the sum, which is quick, is finite unless a number is not, or all together are too large
        return bool(np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all())


def weights_file(folder: Path) -> Path:
    # Links are followed (Hugging Face's cache is made of them), pipes and devices not opened.
    for path in filter(Path.is_file, map(folder.joinpath, WEIGHT_FILES)):
        return path
    raise UserError(f"{folder} is not a model folder: it has no {' or '.join(WEIGHT_FILES)}")


def save(folder: Path, *model, owned=(), marks=(), **options) -> None:
    """Writes a model, as `write` takes it, to a folder, as `replacing` takes that."""
    with replacing(folder, owned, marks) as new:
        write(new, *model, **options)


def write(
    folder: Path,
    config: dict,
    weights: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None = None,
    format: str = "tiny",
) -> None:
    """`format` "tiny" is our layout, or Hugging Face's for a GPT-2, in the precision of `weights`;
    "burn" is gpt-burn's, in half precision, which holds no GPT-2: UserError."""
    is_gpt2, n_layers = config["model"].get("gpt2"), config["model"]["n_layers"]
    if format == "burn" and is_gpt2:
        raise UserError("gpt-burn's layout holds no GPT-2")
    if tokenizer is not None:
        config = {**config, "tokenizer": tokenizer.name}
        tokenizer.save(folder)
    if format == "burn":
        gpt_burn.write_record(folder / "model.mpk", weights, n_layers)
        config = gpt_burn.config_to_theirs(config)
    elif is_gpt2:
        tensors = gpt2.weights_to_theirs(weights, n_layers)
        safetensors.write(folder / "model.safetensors", tensors)
        config = gpt2.config_to_theirs(config, tokenizer)
    else:
        safetensors.write(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def files(folder: Path) -> set[Path]:
    """Where the links of a model's folder lead: its files, and those that it could have as well."""
    names = {*MODEL_FILES, *tokenizers.FILES}
    found = (path for kind in ("json", "safetensors") for path in folder.glob(f"*.{kind}"))
    paths = [*map(folder.joinpath, names), *found]
    return set(map(Path, map(os.path.realpath, paths)))
