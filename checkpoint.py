"""A model on disk: a folder that holds `config.json` and, beside it, the weights in one file.

Two forms of weights: our own `model.safetensors`, and gpt-burn's record `model.mpk`, which is read
in half, full and double precision and written in half. In memory the weights are a dict of numpy
arrays by name; a linear's weight is (out, in), while gpt-burn's record holds it as (in, out).

Nothing here trusts a file: each length and shape is compared with the file's size before memory is
taken for it, nothing is unpickled, and what is wrong is a ValueError that says so in one line.
"""

import json
import math
import os
import shutil
import uuid
from array import array
from pathlib import Path

import msgpack
import numpy as np

_SIZE = (int, 1, 2**31)
# What config.json must hold: a section, or (type, lowest value, first value too high).
_CONFIG_RULES = {
    "n_steps": (int, 0, 2**31),
    "batch_size": _SIZE,
    "learning_rate": (float, 0, 1e9),
    "batches_per_step": _SIZE,
    "validation_size": _SIZE,
    "seed": (int, 0, 2**64),
    "model": {
        **dict.fromkeys(("context_length", "vocab_size", "n_layers", "n_heads"), _SIZE),
        **dict.fromkeys(("d_model", "d_hidden"), _SIZE),
        "dropout": (float, 0, 1),
    },
    "optimizer": {
        "beta_1": (float, 0, 1),
        "beta_2": (float, 0, 1),
        "epsilon": (float, 0, 1e9),
        "weight_decay": (float, 0, 1e9),
    },
}
_MAX_JSON_BYTES = 4 << 20  # parsed JSON takes up to 25 times its size in memory


def load(folder):
    """Return the model and the tokenizer of a model folder, ours or gpt-burn's.

    Raises ValueError or OSError, with one line that names the file and what is wrong with it.
    """
    import tokenizers  # here, so that reading a config or converting weights needs no tinygrad
    from gpt_tiny import GPT, GPTConfig

    folder = Path(folder)
    config = read_config(folder)
    _model_file(folder)  # first: only with a file to compare to does read_config bound the sizes
    model_config = GPTConfig(**config["model"])
    tokenizer = tokenizers.load(config.get("tokenizer", "char"), folder)
    if tokenizer.vocab_size != model_config.vocab_size:
        raise ValueError(
            f"{folder / 'config.json'}: vocab_size is {model_config.vocab_size}, but the tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size} tokens: they do not belong together"
        )
    shapes = {name: tensor.shape for name, tensor in GPT(model_config).parameters().items()}
    return GPT(model_config, read_weights(folder, shapes)), tokenizer


def read_config(folder: Path) -> dict:
    """Return the folder's `config.json`, each value checked for its type and range.

    The sizes of the model are also held against the size of the weights' file, where there is one,
    so that a model built from them is never much larger than the file it comes from.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(f"there is no model folder {path.parent}")
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a model folder: it has no config.json")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is far too large for a config")
    config = _parse_json(path.read_bytes(), path)
    _check_config(config, _CONFIG_RULES, path)

    model = config["model"]
    if unknown := model.keys() - _CONFIG_RULES["model"].keys():
        raise ValueError(f"{path}: a model has no setting {min(unknown)!r:.60}")
    d_model, d_hidden, n_heads = model["d_model"], model["d_hidden"], model["n_heads"]
    if d_model % n_heads:
        raise ValueError(f"{path}: d_model {d_model} is not divisible by n_heads {n_heads}")
    tokenizer = config.get("tokenizer", "char")
    if not isinstance(tokenizer, str) or not tokenizer.isidentifier():
        raise ValueError(f"{path}: tokenizer is {tokenizer!r:.60}, not the name of a tokenizer")

    n_weights = model["n_layers"] * (4 * d_model + 2 * d_hidden) * d_model
    n_weights += (model["context_length"] + 2 * model["vocab_size"]) * d_model
    for name in _READERS:
        if path.with_name(name).is_file() and path.with_name(name).stat().st_size < n_weights:
            raise ValueError(f"{path} asks for {n_weights} weights, more than {name} can hold")
    return config


def read_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the weights of a model folder, by name, in the order and the shapes of `shapes`.

    They come from `model.safetensors` or, where there is none, from `model.mpk`. Half precision
    stays float16, all else is float32; the arrays may be read-only views of the file.
    """
    path = _model_file(Path(folder))
    tensors = _READERS[path.name](path)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name} {shape} that config.json asks for")
        if tensors[name].shape != tuple(shape):
            raise ValueError(
                f"{path}: the tensor {name} has the shape {tensors[name].shape}, "
                f"but config.json asks for {tuple(shape)}"
            )
    if surplus := tensors.keys() - shapes.keys():
        name = min(surplus)
        raise ValueError(
            f"{path}: config.json does not ask for the tensor {name!r:.80} {tensors[name].shape}"
        )
    return {name: _at_most_float32(tensors.pop(name)) for name in shapes}


def save(
    folder: Path, config: dict, weights: dict[str, np.ndarray], tokenizer=None, format="tiny"
) -> None:
    """Write a model folder, whole or not at all.

    `format` "tiny" writes `model.safetensors` in the precision of `weights`, "burn" gpt-burn's
    `model.mpk` in half precision. A model that is there already is replaced; other files of its
    folder stay. Raises ValueError where `check_destination` does, OSError when the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    check_destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".gpt-tiny-{uuid.uuid4().hex}")
    new.mkdir()
    try:
        if tokenizer is not None:
            config = {**config, "tokenizer": tokenizer.name}
            tokenizer.save(new)
        if format == "burn":
            if config.get("tokenizer") == "char":  # all that gpt-burn knows, so it has no such key
                config = {key: value for key, value in config.items() if key != "tokenizer"}
            write_record(new / "model.mpk", weights, config["model"]["n_layers"])
        else:
            write_safetensors(new / "model.safetensors", weights)
        (new / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        for path in (*new.iterdir(), new):
            _sync(path)
        _put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # by now it exists only if something failed


def check_destination(folder: Path) -> None:
    """Raise ValueError unless `save` can write to `folder`: call it before a training starts.

    The folder may be new, empty, or hold a model, which `save` replaces.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder to save the model to")
        names = os.listdir(folder)
        if names and not ("config.json" in names and not _READERS.keys().isdisjoint(names)):
            raise ValueError(
                f"{folder} exists and is not a model folder: name another, nothing in it is touched"
            )
        if os.path.ismount(folder):  # the whole folder is renamed, which a mount point cannot be
            raise ValueError(f"{folder} is a mount point: name a folder inside it")
    parent = next(parent for parent in folder.parents if parent.exists())
    trial = parent / f".gpt-tiny-{uuid.uuid4().hex}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise ValueError(f"cannot save to {folder}: {error.strerror} ({parent})") from None


def _put_in_place(new: Path, folder: Path) -> None:
    """Rename the folder `new` to `folder`, in place of what is there."""
    old = new.with_name(new.name + "-old")
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:  # an interrupt between the two, too, must leave the model under its name
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    if old.exists():
        for path in old.iterdir():  # someone's notes beside the model are not ours to delete
            if path.name not in ("config.json", *_READERS) and not (folder / path.name).exists():
                os.rename(path, folder / path.name)
        shutil.rmtree(old, ignore_errors=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _model_file(folder: Path) -> Path:
    for name in _READERS:
        # Links are followed (Hugging Face's cache is made of them), pipes and devices not opened.
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} is not a model folder: it has no {' or '.join(_READERS)}")


def _map_file(path: Path) -> np.ndarray:
    """Return the file's bytes as an array (n,) that is read as it is used."""
    if path.stat().st_size == 0:  # nothing to map
        raise ValueError(f"{path} is empty")
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _parse_json(text: bytes, path: Path) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: not valid JSON ({error!s:.100})") from None
    if type(value) is not dict:
        raise ValueError(f"{path} is corrupt: not a JSON object")
    return value


def _check_config(section: dict, rules: dict, path: Path) -> None:
    for key, rule in rules.items():
        if key not in section:
            raise ValueError(f"{path} lacks the setting {key}")
        value = section[key]
        if type(rule) is dict:
            if type(value) is not dict:
                raise ValueError(f"{path}: {key} is not a section of settings")
            _check_config(value, rule, path)
        else:
            kind, lowest, end = rule
            if type(value) not in (int, kind) or not lowest <= value < end:  # bool is no number
                wanted = f"{'a whole' if kind is int else 'a'} number from {lowest} to below {end}"
                raise ValueError(f"{path}: {key} is {value!r:.60}, not {wanted}")


def _at_most_float32(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.float64:
        return values
    with np.errstate(over="ignore"):  # beyond float32 is infinite, as everywhere
        return values.astype(np.float32)


# --- safetensors: a u64 length, a JSON header of that length, then the tensors' bytes ---

_SAFETENSORS_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file as views of it; bfloat16 becomes float32.

    As https://huggingface.co/docs/safetensors asks, they must fill the file without gap or overlap.
    """
    data = _map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > min(len(data), _MAX_JSON_BYTES):
        raise ValueError(f"{path} is truncated or corrupt: the header does not fit")
    header = _parse_json(data[8:start].tobytes(), path)
    header.pop("__metadata__", None)

    tensors, end = {}, start
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise ValueError(f"{name!r:.80} is of the type {entry['dtype']!r:.20}")
            dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), entry["shape"]
            if len(shape) > 8 or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError(f"{name!r:.80} has no proper shape")
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [begin - start, end - start] or end > len(data):
                raise ValueError(f"the data of {name!r:.80} does not fit its shape or the file")
            tensors[name] = data[begin:end].view(dtype).reshape(shape)
            if entry["dtype"] == "BF16":  # the upper half of a float32
                tensors[name] = (tensors[name].astype(np.uint32) << 16).view(np.float32)
        if end < len(data):
            raise ValueError("the tensors end before the file does")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error!s:.200}") from None
    return tensors


def write_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write a safetensors file, with the metadata that Hugging Face's programs ask for."""
    names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, values in weights.items():
        dtype, begin, end = values.dtype.newbyteorder("<").str, end, end + values.nbytes
        header[name] = {"dtype": names[dtype], "shape": values.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie aligned in a mapped file
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in weights.values():
            file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)


# --- gpt-burn's record: MessagePack, as Burn 0.13's NamedMpkFileRecorder writes it ---

_BROKEN = (ValueError, LookupError, TypeError, OverflowError, msgpack.UnpackException)
_HALF = "half::binary16::f16"  # 16 bits in an integer, which takes 1, 2 or 3 bytes
# By precision: MessagePack's code for such a number and the bytes after it.
_FLOATS = {"f32": (0xCA, ">f4"), "f64": (0xCB, ">f8")}
_NORM = {"gamma": True, "beta": True, "epsilon": None}
_LINEAR = {"weight": True, "bias": True}
_PROJECTION = {"weight": True, "bias": None}
# The fields of gpt-burn's modules in their order; those that are no parameters are saved as None.
_BLOCK = {
    "norm_1": _NORM,
    "multi_head": {
        "n_heads": None,
        "d_k": None,
        "query": _PROJECTION,
        "key": _PROJECTION,
        "value": _PROJECTION,
        "attn_dropout": None,
        "out": _PROJECTION,
        "resid_dropout": None,
    },
    "norm_2": _NORM,
    "pwff": {"linear_1": _LINEAR, "gelu": None, "linear_2": _LINEAR, "dropout": None},
}


def read_record(path: Path) -> dict[str, np.ndarray]:
    """Return the parameters of a gpt-burn record in its own precision, by dotted name.

    A linear's weight is turned to (out, in).
    """
    return _Record(path).parameters


class _Record:
    """A cursor over a record: msgpack reads the structure, numpy the numbers.

    To msgpack each number is a Python object, which for a model of 83M parameters are too many.
    """

    def __init__(self, path: Path):
        self.data, self.at = _map_file(path), 0
        self.precision, self.parameters = None, {}
        try:
            for _ in range(self.take("read_map_header")):
                key = self.take()
                if key == "metadata":
                    self.precision = self.take()["float"]
                elif key == "item":
                    self.read_module("")
                else:
                    self.take("skip")
        except _BROKEN as error:
            reason = error if type(error) is ValueError else "its structure is broken"
            raise ValueError(f"{path} is truncated or corrupt: {reason!s:.200}") from None

    def take(self, method="unpack"):
        """Return the next value, or what another method of msgpack's Unpacker makes of it."""
        unpacker = msgpack.Unpacker(max_buffer_size=1024)  # the structure has nothing longer
        unpacker.feed(self.data[self.at : self.at + 1024])
        value = getattr(unpacker, method)()
        self.at += unpacker.tell()
        return value

    def read_module(self, name: str) -> None:
        """Read a map of fields: modules, arrays of modules, parameters, and constants, skipped."""
        if name.count(".") > 9:
            raise ValueError("its modules are nested too deeply")
        for _ in range(self.take("read_map_header")):
            key = self.take()
            inner = f"{name}.{key}" if name else str(key)
            code = self.data[self.at]
            if key == "param":
                self.read_parameter(name)
            elif 0x80 <= code < 0x90 or code in (0xDE, 0xDF):  # a map
                self.read_module(inner)
            elif 0x90 <= code < 0xA0 or code in (0xDC, 0xDD):  # an array
                for index in range(self.take("read_array_header")):
                    self.read_module(f"{inner}.{index}")
            else:
                self.take("skip")

    def read_parameter(self, name: str) -> None:
        fields = {}
        for _ in range(self.take("read_map_header")):
            key = self.take()
            fields[key] = self.take_numbers() if key == "value" else self.take()
        values, shape = fields["value"], fields["shape"]
        whole = len(shape) <= 8 and all(type(size) is int and size > 0 for size in shape)
        if not whole or math.prod(shape) != len(values):
            raise ValueError(f"{name!r:.80} has {len(values)} values for the shape {shape!s:.80}")
        values = values.reshape(shape)
        self.parameters[name] = np.ascontiguousarray(values.T) if _is_linear(name) else values

    def take_numbers(self) -> np.ndarray:
        count = self.take("read_array_header")
        if count > len(self.data) - self.at:  # each takes a byte or more
            raise ValueError("it ends before its numbers do")
        if self.precision == _HALF:
            return self.take_halves(count)
        if self.precision not in _FLOATS:
            raise ValueError(f"unknown precision {self.precision!r:.40}")
        code, dtype = _FLOATS[self.precision]
        stride = 1 + np.dtype(dtype).itemsize
        numbers = self.data[self.at : self.at + count * stride]
        if len(numbers) < count * stride or (numbers[::stride] != code).any():
            raise ValueError(f"its numbers are not all {self.precision}")
        self.at += len(numbers)
        values = np.ndarray(count, dtype, numbers, 1, (stride,))
        return values.astype(values.dtype.newbyteorder("="))

    def take_halves(self, count: int) -> np.ndarray:
        """Return float16s read from as many integers.

        Nearly all weights take 3 bytes: numpy copies runs of those. msgpack reads a piece after
        each run, and larger pieces where runs are short: so neither a few weights near zero nor a
        file full of them takes long.
        """
        bits, done, piece, resumed = np.empty(count, np.uint16), 0, 128, 0
        while done < count:
            window = min(count - done, 8192, (len(self.data) - self.at) // 3)
            others = self.data[self.at : self.at + 3 * window : 3] != 0xCD
            run = int(others.argmax()) if others.any() else window
            bits[done : done + run] = np.ndarray(run, ">u2", self.data, self.at + 1, (3,))
            self.at, done = self.at + 3 * run, done + run
            if run < window or window == 0:
                piece = min(2 * piece, 8192) if done - resumed < 2 * piece else 128
                size = min(piece, count - done)
                unpacker = msgpack.Unpacker(max_buffer_size=5 + 3 * size)
                unpacker.feed(b"\xdd" + size.to_bytes(4, "big"))  # makes an array of the piece
                unpacker.feed(self.data[self.at : self.at + 3 * size])
                bits[done : done + size] = array("H", unpacker.unpack())  # errs beyond 16 bits
                self.at, done = self.at + unpacker.tell() - 5, done + size
                resumed = done
        return bits.view(np.float16)


def write_record(path: Path, weights: dict[str, np.ndarray], n_layers: int) -> None:
    """Write a gpt-burn record in half precision, as gpt-burn itself does.

    Raises ValueError for weights that such a record has no place for, or too large for a float16.
    """
    left, packer = dict(weights), msgpack.Packer()

    def parameter(name: str) -> dict:
        if name not in left:
            raise ValueError(f"gpt-burn's record needs {name}, which this model lacks")
        values = left.pop(name)
        with np.errstate(over="ignore"):
            halves = np.array(values.T if _is_linear(name) else values, np.float16, order="C")
        if np.isinf(halves).any():
            raise ValueError(f"{name} has values too large for gpt-burn's half precision")
        param = {"value": halves.reshape(-1), "shape": list(halves.shape)}
        return {"id": str(uuid.uuid4()), "param": param}

    def write(value, name: str) -> None:
        if isinstance(value, dict):
            file.write(packer.pack_map_header(len(value)))
            for key, inner in value.items():
                file.write(packer.pack(key))
                write(inner, f"{name}.{key}" if name else key)
        elif isinstance(value, list):
            file.write(packer.pack_array_header(len(value)))
            for index, inner in enumerate(value):
                write(inner, f"{name}.{index}")
        elif isinstance(value, np.ndarray):
            file.write(packer.pack_array_header(len(value)))
            file.write(_pack_halves(value))
        elif value is True:
            write(parameter(name), "")
        else:
            file.write(packer.pack(value))

    settings = "HalfPrecisionSettings"
    recorder = "burn_core::record::file::NamedMpkFileRecorder<burn_core::record::settings::"
    metadata = {
        "float": _HALF,
        "int": "i16",
        "format": f"{recorder}{settings}>",
        "version": "0.13.2",
        "settings": settings,
    }
    item = {
        "token_embedding": {"weight": True},
        "positional_embedding": {"weight": True},
        "dropout": None,
        "blocks": [_BLOCK] * n_layers,
        "norm": _NORM,
        "linear": _LINEAR,
    }
    with open(path, "wb") as file:
        file.write(packer.pack_map_header(3))
        for key, value in (("metadata", metadata), ("item", item), ("_b", [])):
            file.write(packer.pack(key))
            write(value, "")
    if left:
        raise ValueError(f"gpt-burn's record has no place for {min(left)}")


def _pack_halves(halves: np.ndarray) -> np.ndarray:
    """Return MessagePack's shortest form of each float16's bits taken as an integer."""
    bits = halves.view(np.uint16)
    packed = np.empty((len(bits), 3), np.uint8)
    packed[:, 0] = 0xCD
    packed[:, 1] = bits >> 8
    packed[:, 2] = bits & 0xFF
    if bits.min() >= 0x100:
        return packed.reshape(-1)
    used = np.ones(packed.shape, bool)
    used[bits < 0x100, 0] = False  # 0xcc and one byte
    packed[bits < 0x100, 1] = 0xCC
    used[bits < 0x80, 1] = False  # one byte alone
    return packed[used]


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and "embedding" not in name


_READERS = {"model.safetensors": read_safetensors, "model.mpk": read_record}
