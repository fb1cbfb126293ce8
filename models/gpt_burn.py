"""gpt-burn's models: MessagePack, as Burn 0.13's NamedMpkFileRecorder writes it.

Such a record is a map {metadata, item, _b}; `item` is nested by field name, and each parameter in
it is {id, param: {value: [...], shape: [...]}}. In half precision, which gpt-burn writes, `value`
holds the 16 bits of each float16 as an integer. A linear's weight is (in, out); here (out, in).
"""

import math
import uuid
from array import array
from pathlib import Path

import msgpack
import numpy as np

import tokenizers
from backend.errors import UserError

BROKEN = (ValueError, LookupError, TypeError, OverflowError, msgpack.UnpackException)
HALF = "half::binary16::f16"  # its integers take 1, 2 or 3 bytes
# The other precisions: MessagePack's code for such a number, and the bytes after it.
FLOATS = {"f32": (0xCA, ">f4"), "f64": (0xCB, ">f8")}
PLACEHOLDER = "the values of a parameter"

# The fields of gpt-burn's modules in their order. True is a parameter; the rest is saved as None.
NORM = {"gamma": True, "beta": True, "epsilon": None}
LINEAR = {"weight": True, "bias": True}
PROJECTION = {"weight": True, "bias": None}
MULTI_HEAD = {
    **{"n_heads": None, "d_k": None, "query": PROJECTION, "key": PROJECTION, "value": PROJECTION},
    **{"attn_dropout": None, "out": PROJECTION, "resid_dropout": None},
}
PWFF = {"linear_1": LINEAR, "gelu": None, "linear_2": LINEAR, "dropout": None}
BLOCK = {"norm_1": NORM, "multi_head": MULTI_HEAD, "norm_2": NORM, "pwff": PWFF}


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and "embedding" not in name


def read_record(path: Path) -> dict[str, np.ndarray]:
    """The parameters of a record by dotted name, in its own precision.

    ValueError if it is not one. No more memory is taken than the file's size accounts for.
    """
    try:
        return Record(np.asarray(np.memmap(path, np.uint8, "r"))).parameters
    except BROKEN as error:
        reason = error if type(error) is UserError else "its structure is broken"
        raise UserError(f"{path} is truncated or corrupt: {reason!s:.200}") from None


class Record:
    """A cursor over a record: msgpack reads the structure, numpy the numbers.

    To msgpack each number is a Python object, which for a model of 83M parameters are too many.
    """

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0
        self.precision, self.parameters = None, {}
        for _ in range(self.take("read_map_header")):
            key = self.take()
            if key == "metadata":
                self.precision = self.take()["float"]
            elif key == "item":
                self.read_module("")
            else:
                self.take("skip")

    def take(self, method: str = "unpack"):
        """The next value, or what another method of msgpack's Unpacker makes of it."""
        unpacker = msgpack.Unpacker(max_buffer_size=1024)  # the structure has nothing longer
        unpacker.feed(self.data[self.at : self.at + 1024])
        value = getattr(unpacker, method)()
        self.at += unpacker.tell()
        return value

    def read_module(self, name: str) -> None:
        """A map of fields: modules, arrays of modules, parameters, and constants, skipped."""
        if name.count(".") > 9:
            raise UserError("its modules are nested too deeply")
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
            raise UserError(f"{name!r:.80} has {len(values)} values for the shape {shape!s:.80}")
        values = values.reshape(shape)
        self.parameters[name] = np.ascontiguousarray(values.T) if is_linear(name) else values

    def take_numbers(self) -> np.ndarray:
        count = self.take("read_array_header")
        if count > len(self.data) - self.at:  # each takes a byte or more
            raise UserError("it ends before its numbers do")
        if self.precision == HALF:
            return self.take_halves(count)
        if self.precision not in FLOATS:
            raise UserError(f"unknown precision {self.precision!r:.40}")
        code, dtype = FLOATS[self.precision]
        stride = 1 + np.dtype(dtype).itemsize
        numbers = self.data[self.at : self.at + count * stride]
        if len(numbers) < count * stride or (numbers[::stride] != code).any():
            raise UserError(f"its numbers are not all {self.precision}")
        self.at += len(numbers)
        values = np.ndarray(count, dtype, numbers, 1, (stride,))
        return values.astype(values.dtype.newbyteorder("="))

    def take_halves(self, count: int) -> np.ndarray:
        """Float16s, read from as many integers.

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
    """Writes a record in half precision, as gpt-burn itself does.

    ValueError for weights that such a record has no place for, or too large for a float16.
    """
    names = []

    def fill(field, name: str):
        """The field with its parameters, whose values are written later, one by one."""
        if isinstance(field, dict):
            return {key: fill(inner, f"{name}.{key}") for key, inner in field.items()}
        if isinstance(field, list):
            return [fill(inner, f"{name}.{index}") for index, inner in enumerate(field)]
        if field is None:
            return None
        names.append(name.removeprefix("."))
        if names[-1] not in weights:
            raise UserError(f"gpt-burn's record needs {names[-1]}, which this model lacks")
        shape = list(weights[names[-1]].shape)
        param = {"value": PLACEHOLDER, "shape": shape[::-1] if is_linear(name) else shape}
        return {"id": str(uuid.uuid4()), "param": param}

    settings = "HalfPrecisionSettings"
    recorder = "burn_core::record::file::NamedMpkFileRecorder<burn_core::record::settings::"
    metadata = {
        **{"float": HALF, "int": "i16", "format": f"{recorder}{settings}>"},
        **{"version": "0.13.2", "settings": settings},
    }
    embedding = {"weight": True}
    item = {
        **{"token_embedding": embedding, "positional_embedding": embedding, "dropout": None},
        **{"blocks": [BLOCK] * n_layers, "norm": NORM, "linear": LINEAR},
    }
    record = msgpack.packb({"metadata": metadata, "item": fill(item, ""), "_b": []})
    if surplus := weights.keys() - set(names):
        raise UserError(f"gpt-burn's record has no place for {min(surplus)}")
    structure = record.split(msgpack.packb(PLACEHOLDER))
    with open(path, "wb") as file:
        for before, name in zip(structure, names, strict=False):
            file.write(before)
            file.write(packed_halves(name, weights[name]))
        file.write(structure[-1])


def config_to_theirs(config: dict) -> dict:
    """Our config without what gpt-burn has no word for: it knows one tokenizer alone."""
    model = {name: value for name, value in config["model"].items() if name != "gpt2"}
    config = {**config, "model": model}
    if config.get("tokenizer") == tokenizers.DEFAULT:
        del config["tokenizer"]
    return config


def packed_halves(name: str, values: np.ndarray) -> bytes:
    """MessagePack's array of the bits of each float16 as integers, in their shortest form."""
    with np.errstate(over="ignore"):
        halves = (values.T if is_linear(name) else values).astype(np.float16)
    if np.isinf(halves).any():
        raise UserError(f"{name} has values too large for gpt-burn's half precision")
    bits = halves.ravel().view(np.uint16)
    packed = np.empty((len(bits), 3), np.uint8)
    packed[:, 0], packed[:, 1], packed[:, 2] = 0xCD, bits >> 8, bits & 0xFF
    used = np.ones(packed.shape, bool)
    used[bits < 0x100, 0] = False  # 0xcc and one byte
    packed[bits < 0x100, 1] = 0xCC
    used[bits < 0x80, 1] = False  # one byte alone
    return msgpack.Packer().pack_array_header(len(bits)) + packed[used].tobytes()
