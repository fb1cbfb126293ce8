"""A model on disk: a folder with `config.json`, weights, and the files of the tokenizer.

There are three formats: ours (`model.safetensors`), gpt-burn's (`model.mpk`), and Hugging Face's,
for every GPT-2, with one or several files of weights. In memory, weights are numpy arrays by name;
the weight of a linear layer is (out, in).

No file is trusted: lengths and shapes are compared with the file's size before memory is allocated,
nothing is unpickled, and errors are UserErrors of one line.
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
from tokenizers import TOKENIZERS, BytePairTokenizer, Tokenizer


def load(folder: Path | str) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a folder, or of a name on the Hugging Face Hub.

    UserError or OSError of one line, with the name of the file and its fault.
    """
    config, tokenizer, weights = read(folder)
    return GPT(config, weights), tokenizer


def read(folder: Path | str) -> tuple[GPTConfig, Tokenizer, Mapping[str, np.ndarray]]:
    """The config, the tokenizer and the weights of a model; see `load` and `read_weights`."""
    folder = find(Path(folder))
    config = read_config(folder)
    model = GPTConfig(**config["model"])
    parameter_shapes, vocab_size = shapes(model), model.vocab_size
    tokenizer = tokenizers.load(config.get("tokenizer", tokenizers.DEFAULT), folder)
    if isinstance(tokenizer, BytePairTokenizer):  # the model may have more rows than tokens
        tokenizer.n_surplus = max(0, vocab_size - tokenizer.vocab_size)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{folder / 'config.json'}: vocab_size is {vocab_size}, but the tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size} tokens: they do not belong together"
        )
    return model, tokenizer, read_weights(folder, parameter_shapes)


def find(folder: Path) -> Path:
    """The folder; for a name on the Hub, downloads the model to a folder of the Hub's cache."""
    if folder.exists() or not hub.is_name(folder):
        return folder
    repository = hub.Repository(folder.as_posix())
    config = parse_config(repository.fetch("config.json"))  # other models fail before the weights
    kind = TOKENIZERS.get(config.get("tokenizer"), TOKENIZERS[tokenizers.DEFAULT])
    optional = ["generation_config.json"]
    if kind is BytePairTokenizer:
        fetch_byte_pairs(repository)
    else:  # gpt-burn's characters are in no file
        optional += kind.files
    weights = repository.fetch("model.safetensors", INDEX, optional=optional)
    if weights.name == INDEX:
        for shard in sorted(set(safetensors.weight_map(weights).values())):
            repository.fetch(shard)
    return weights.parent


def fetch_byte_pairs(repository: hub.Repository) -> Path:
    """Downloads the files of a byte pair tokenizer; returns their folder."""
    optional = ("added_tokens.json", *BytePairTokenizer.role_files)
    path = repository.fetch("vocab.json", "tokenizer.json", optional=optional)
    if path.name == "vocab.json":
        repository.fetch("merges.txt")
    return path.parent


def find_tokenizer(name: str) -> Tokenizer:
    """The trained tokenizer of a folder or of a name on the Hugging Face Hub."""
    folder, reason = Path(name), "there is no such folder"
    try:
        if not folder.exists() and hub.is_name(folder):
            folder = fetch_byte_pairs(hub.Repository(folder.as_posix()))
    except UserError as error:
        reason = str(error)
    if not folder.is_dir():
        raise UserError(
            f"--tokenizer {name} is not known: name {', '.join(TOKENIZERS)}, or a folder or a "
            "model of the Hugging Face Hub with vocab.json and merges.txt, or tokenizer.json "
            f"({reason})"
        )
    return BytePairTokenizer.load(folder)


def read_config(folder: Path) -> dict:
    """The config of a folder, with a section `model` of GPTConfig's fields.

    UserError for more parameters than the files of weights have bytes.
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
    """Our config from a file of any format; sizes are not compared with the weights."""
    config = safetensors.read_json(path, "a config")
    try:
        if "model_type" in config:
            config = gpt2.config_to_ours(config)
        model = config.get("model")
        if type(model) is not dict:
            raise UserError("it has no section model")
        known = {field.name for field in fields(GPTConfig)}
        if unknown := model.keys() - known:
            raise UserError(f"a model has no setting {min(unknown)!r:.60}")
        if missing := known - model.keys() - {"gpt2", "exact_gelu"}:
            raise UserError(f"it lacks the setting {min(missing)}")
        tokenizer = config.get("tokenizer", tokenizers.DEFAULT)
        if not isinstance(tokenizer, str) or not tokenizer.isidentifier():
            raise UserError(f"tokenizer is {tokenizer!r:.60}, not the name of a tokenizer")
        GPTConfig(**model)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def read_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, np.ndarray]:
    """The weights of a folder by name, in the order of `shapes`; float16, or else float32.

    Arrays of safetensors files are read at each access. UserError for a file that does not match
    `shapes` and, at the access, for numbers that are not finite.
    """
    path = weights_file(folder)
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if path.name == "model.mpk":
        arrays = gpt_burn.read_record(path)
    else:
        arrays = (safetensors.read_sharded if path.name == INDEX else safetensors.read)(path)
        if not arrays.keys().isdisjoint(gpt2.EMBEDDINGS):
            n_layers = sum(name.endswith(".norm_1.gamma") for name in shapes)
            arrays = LazyArrays(gpt2.weights_to_ours(arrays, n_layers, path))
    names = set(arrays)
    for name, shape in shapes.items():
        if name not in names:
            raise UserError(f"{path} lacks the tensor {name} {shape} that config.json asks for")
        if (found := arrays[name].shape) != tuple(shape):
            raise UserError(
                f"{path}: the tensor {name} has the shape {found}, "
                f"but config.json asks for {tuple(shape)}"
            )
    if surplus := names - shapes.keys():
        name = min(surplus)
        raise UserError(
            f"{path}: config.json does not ask for the tensor {name!r:.80} {arrays[name].shape}"
        )
    return LazyArrays({name: partial(read_finite, arrays, name, path) for name in shapes})


def read_finite(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    """The array, float64 as float32; UserError for NaN and infinity."""
    array = arrays[name]
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if not is_finite(array):
        raise UserError(f"{path}: the tensor {name} holds numbers that are not finite")
    return array


def is_finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        # the fast sum is finite, unless a number is not or the sum itself overflows
        return bool(np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all())


def weights_file(folder: Path) -> Path:
    # links are followed, as in Hugging Face's cache; pipes and devices are not opened
    for path in filter(Path.is_file, map(folder.joinpath, WEIGHT_FILES)):
        return path
    raise UserError(f"{folder} is not a model folder: it has no {' or '.join(WEIGHT_FILES)}")


def save(folder: Path, *model, owned=(), marks=(), **options) -> None:
    """Replaces `folder`, see `replacing`, by a folder with a model, see `write`."""
    with replacing(folder, owned, marks) as new:
        write(new, *model, **options)


def write(
    folder: Path,
    config: dict,
    weights: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None = None,
    format: str = "tiny",
) -> None:
    """Writes a model in the format "tiny" (ours, Hugging Face's for a GPT-2), in the precision of
    `weights`, or "burn" (gpt-burn's, in half precision; UserError for a GPT-2)."""
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
    """Paths, with links resolved, of the files that a model's folder has or could have."""
    found = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    paths = [*map(folder.joinpath, MODEL_FILES), *found]
    return {Path(os.path.realpath(path)) for path in paths}
