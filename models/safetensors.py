"""Safetensors files: a u64 length, a JSON header of that length, then the bytes of the tensors.

A large model may be in several files, its shards, with an index of each tensor's shard.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from backend.errors import UserError

MAX_JSON_BYTES = 4 << 20  # parsed JSON takes up to 25 times its size in memory
SHARD_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)  # a file beside the index
DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}  # of weights
OTHER_DTYPES = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ"),
    *("F8_E5M2FNUZ", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64"),
)
# bits of a dtype, the first number in its name
N_BITS = {kind: int((re.findall(r"\d+", kind) or [8])[0]) for kind in (*DTYPES, *OTHER_DTYPES)}
MAX_DIMENSIONS = 64  # numpy's and PyTorch's


class LazyArrays(Mapping):
    """Arrays by name, read at each access: loading takes little more memory than the model."""

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]]):
        self.readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def read(path: Path) -> LazyArrays:
    """The tensors of a safetensors file, in the order of their bytes; bfloat16 becomes float32.

    As https://huggingface.co/docs/safetensors asks, tensors must fill the file without gap or
    overlap: else a UserError, as for the access to a tensor with none of DTYPES.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        end = start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise UserError(f"{path} is truncated or corrupt: the header does not fit")
        if start > MAX_JSON_BYTES:
            raise UserError(f"{path}: the header does not fit into {MAX_JSON_BYTES >> 20} MiB")
        header = parse_json(file.read(start - 8), path)
    header.pop("__metadata__", None)
    readers = {}
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape = entry["dtype"], entry["shape"]
            has_sizes = all(type(length) is int and length >= 0 for length in shape)
            if len(shape) > MAX_DIMENSIONS or not has_sizes:
                raise UserError(f"{name!r:.80} has no proper shape")
            offset, (_, last) = end, entry["data_offsets"]
            end = start + operator.index(last)
            n_bits = 8 * (end - offset)
            is_whole = n_bits == math.prod(shape) * N_BITS[kind] if kind in N_BITS else n_bits >= 0
            is_next = entry["data_offsets"] == [offset - start, end - start] and end <= size
            if not (is_next and is_whole):
                raise UserError(f"the data of {name!r:.80} does not fit its shape or the file")
            readers[name] = partial(read_array, path, name, kind, offset, tuple(shape))
        if end < size:
            raise UserError("the tensors end before the file does")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is truncated or corrupt: {error!s:.200}") from None
    return LazyArrays(readers)


def read_sharded(index: Path) -> LazyArrays:
    """The tensors of all shards of an index; UserError for a tensor that is not in its shard."""
    files, readers = weight_map(index), {}
    for path in shards(index):
        arrays = read(path)
        for name in arrays:
            if files.get(name) != path.name:
                raise UserError(f"{path} holds the tensor {name!r:.80}, against {index.name}")
        readers |= arrays.readers
    if missing := files.keys() - readers.keys():
        name = min(missing)
        raise UserError(f"{index.with_name(files[name])} lacks the tensor {name!r:.80}")
    return LazyArrays(readers)


def shards(index: Path) -> list[Path]:
    """The paths of the shards of an index, beside it; UserError if one is missing."""
    paths = [index.with_name(name) for name in sorted(set(weight_map(index).values()))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is not there")
    return paths


def weight_map(index: Path) -> dict[str, str]:
    """The file name of the shard of each tensor."""
    files = read_json(index, "an index").get("weight_map")
    if type(files) is not dict or not files:
        raise UserError(f"{index} is corrupt: it has no weight_map")
    for file in files.values():
        if type(file) is not str or not SHARD_NAME.fullmatch(file):
            raise UserError(f"{index} is corrupt: {file!r:.80} is no safetensors file beside it")
    return files


def read_array(path: Path, name: str, kind: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    if kind not in DTYPES:
        raise UserError(
            f"{path}: the tensor {name!r:.80} is of the type {kind!r:.20}, which is not supported: "
            f"weights may be {', '.join(DTYPES)}"
        )
    if 0 in shape:
        return np.empty(shape, DTYPES[kind])
    # "c", copy on write: tinygrad's OpenCL refuses arrays that cannot be written
    array = np.asarray(np.memmap(path, DTYPES[kind], "c", offset, shape))
    return (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array


def write(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file with the metadata that Hugging Face's programs require."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, values in weights.items():
        kind, offsets = kinds[values.dtype.newbyteorder("<").str], [end, end + values.nbytes]
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": offsets}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors in a mapped file
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in weights.values():
            file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)


def read_json(path: Path, kind: str) -> dict:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} is far too large for {kind}")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, path: Path) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt: not valid JSON ({error!s:.100})") from None
    if type(value) is not dict:
        raise UserError(f"{path} is corrupt: not a JSON object")
    return value
