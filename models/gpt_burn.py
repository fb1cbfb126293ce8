"""gpt-burn's format of models: MessagePack records of Burn 0.13's NamedMpkFileRecorder.

A record is a map {metadata, item, _b}; `item` is nested by field name, and each parameter in it is
{id, param: {value: [...], shape: [...]}}. In half precision, which gpt-burn writes, `value` holds
the 16 bits of each float16 as an integer. The weight of a linear layer is (in, out) in a record,
(out, in) here.
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
HALF = "half::binary16::f16"  # stored as integers of 1, 2 or 3 bytes
# The other precisions: MessagePack's code of a number, and the bytes after the code.
FLOATS = {"f32": (0xCA, ">f4"), "f64": (0xCB, ">f8")}
PLACEHOLDER = "the values of a parameter"

# The fields of gpt-burn's modules in order. True is a parameter; None a constant, saved as None.
NORM = {"gamma": True, "beta": True, "epsilon": None}
LINEAR = {"weight": True, "bias": True}
PROJECTION = {"weight": True, "bias": None}
PROJECTIONS = dict.fromkeys(("query", "key", "value"), PROJECTION)
MULTI_HEAD = {"n_heads": None, "d_k": None, **PROJECTIONS, "attn_dropout": None}
MULTI_HEAD |= {"out": PROJECTION, "resid_dropout": None}
PWFF = {"linear_1": LINEAR, "gelu": None, "linear_2": LINEAR, "dropout": None}
BLOCK = {"norm_1": NORM, "multi_head": MULTI_HEAD, "norm_2": NORM, "pwff": PWFF}


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and "embedding" not in name


def read_record(path: Path) -> dict[str, np.ndarray]:
    """The parameters of a record by dotted name, in the precision of the record.

    UserError if the file is no record. Takes memory in proportion to the size of the file.
    """
    try:
        return Record(np.asarray(np.memmap(path, np.uint8, "r"))).parameters
    except BROKEN as error:
        reason = error if type(error) is UserError else "its structure is broken"
        raise UserError(f"{path} is truncated or corrupt: {reason!s:.200}") from None


class Record:
    """A cursor over a record: msgpack reads the structure, numpy the numbers.

    msgpack would make each number a Python object: far too slow for a model of 83M parameters.
    """

    def __init__(self, data: np.ndarray):
        self.data, self.offset = data, 0
        self.precision, self.parameters = None, {}
        for _ in range(self.take("read_map_header")):
            key = self.take()
            if key == "metadata":
                self.precision = self.take()["float"]
            elif key == "item":
                self.read_module("")
            else:
                self.take("skip")

    def take(self, method: str = "unpack", header: bytes = b""):
        """Has msgpack's Unpacker read `header` and a value; moves the cursor past the value."""
        unpacker = msgpack.Unpacker(max_buffer_size=2048)
        unpacker.feed(header)
        unpacker.feed(self.data[self.offset : self.offset + 1024])  # no value is longer
        value = getattr(unpacker, method)()
        self.offset += unpacker.tell() - len(header)
        return value

    def read_module(self, name: str) -> None:
        """Reads a map of fields: modules, arrays of modules, parameters, and constants, skipped."""
        if name.count(".") > 9:
            raise UserError("its modules are nested too deeply")
        for _ in range(self.take("read_map_header")):
            key = self.take()
            inner = f"{name}.{key}" if name else str(key)
            code = self.data[self.offset]
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
        is_shape = len(shape) <= 8 and all(type(size) is int and size > 0 for size in shape)
        if not is_shape or math.prod(shape) != len(values):
            raise UserError(f"{name!r:.80} has {len(values)} values for the shape {shape!s:.80}")
        values = values.reshape(shape)
        self.parameters[name] = np.ascontiguousarray(values.T) if is_linear(name) else values

    def take_numbers(self) -> np.ndarray:
        count = self.take("read_array_header")
        if count > len(self.data) - self.offset:  # a number takes a byte or more
            raise UserError("it ends before its numbers do")
        if self.precision == HALF:
            return self.take_halves(count)
        if self.precision not in FLOATS:
            raise UserError(f"unknown precision {self.precision!r:.40}")
        code, dtype = FLOATS[self.precision]
        stride = 1 + np.dtype(dtype).itemsize
        numbers = self.data[self.offset : self.offset + count * stride]
        if len(numbers) < count * stride or (numbers[::stride] != code).any():
            raise UserError(f"its numbers are not all {self.precision}")
        self.offset += len(numbers)
        values = np.ndarray(count, dtype, numbers, 1, (stride,))
        return values.astype(values.dtype.newbyteorder("="))

    def take_halves(self, count: int) -> np.ndarray:
        """Float16 numbers (count,) from as many integers.

        Nearly all take 3 bytes: numpy copies each run of these, msgpack reads the next 256.
        """
        bits, done = np.empty(count, np.uint16), 0
        while done < count:
            window = min(count - done, 2048, (len(self.data) - self.offset) // 3)
            is_short = self.data[self.offset : self.offset + 3 * window : 3] != 0xCD
            run = int(is_short.argmax()) if is_short.any() else window
            bits[done : done + run] = np.ndarray(run, ">u2", self.data, self.offset + 1, (3,))
            self.offset, done = self.offset + 3 * run, done + run
            if run < window or window == 0:
                n = min(256, count - done)
                integers = self.take(header=b"\xdd" + n.to_bytes(4, "big"))  # an array of n
                bits[done : done + n] = array("H", integers)  # OverflowError beyond 16 bits
                done += n
        return bits.view(np.float16)


def write_record(path: Path, weights: dict[str, np.ndarray], n_layers: int) -> None:
    """Writes a record in half precision, as gpt-burn does.

    UserError for weights that a record has no place for, and for numbers too large for float16.
    """
    names = []

    def fill(field, name: str):
        """The field with PLACEHOLDER for the values of its parameters, which are written later."""
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
    metadata = {"float": HALF, "int": "i16", "format": f"{recorder}{settings}>"}
    metadata |= {"version": "0.13.2", "settings": settings}
    embedding = {"weight": True}
    item = {"token_embedding": embedding, "positional_embedding": embedding, "dropout": None}
    item |= {"blocks": [BLOCK] * n_layers, "norm": NORM, "linear": LINEAR}
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
    """Our config without settings that gpt-burn lacks: it has no GPT-2 and one tokenizer."""
    model = {name: value for name, value in config["model"].items() if name != "gpt2"}
    config = {**config, "model": model}
    if config.get("tokenizer") == tokenizers.DEFAULT:
        del config["tokenizer"]
    return config


def packed_halves(name: str, values: np.ndarray) -> bytes:
    """A MessagePack array of the bits of each float16 as an integer, in its shortest form."""
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
