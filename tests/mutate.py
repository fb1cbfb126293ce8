"""Seeded mutations of valid files, to fuzz the loaders."""

import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

N_MUTATIONS = int(os.environ.get("GPT_TINY_MUTATIONS", "300"))
LENGTHS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 10**12, 2**63, 2**64 - 1]
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 10**12, 2**31, 2**64, 10**400, 1e308),
    *(float("nan"), float("inf"), "", "x", "\ud800", "../../etc/passwd", "a\nb", [], {}, [[]]),
    *([10**12], [0], [1] * 100, [1.5], {"": None}, [10**12] * 3, "F16", "x" * 5000),
]


def mutated_bytes(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yields `count` copies, each changed by one to three of the mutations below."""
    rng = random.Random(seed)
    mutations = [_flip, _overwrite, _truncate, _insert, _remove, _repeat, _write_length]
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            rng.choice(mutations)(mutated, rng)
        yield bytes(mutated)


def mutated_json(value: dict, count: int, seed: int) -> Iterator[bytes]:
    """Yields `count` JSON texts of `value` with entries replaced, dropped, renamed or copied."""
    rng = random.Random(seed)
    for _ in range(count):
        mutated = copy.deepcopy(value)
        for _ in range(rng.choice([1, 1, 2])):
            _change_entry(mutated, rng)
        text = json.dumps(mutated)
        if rng.random() < 0.03:
            text = text.replace("{", "[" * 100_000, 1)
        if rng.random() < 0.03:  # duplicate keys
            text = text[:-1] + "," + json.dumps(value)[1:]
        yield text.encode()


def _change_entry(value, rng: random.Random) -> None:
    places = []

    def collect(inner) -> None:
        if isinstance(inner, dict | list):
            keys = inner if isinstance(inner, dict) else range(len(inner))
            for key in keys:
                places.append((inner, key))
                collect(inner[key])

    collect(value)
    if not places:
        return
    holder, key = rng.choice(places)
    way = rng.random()
    if way < 0.7:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif way < 0.8:
        del holder[key]
    elif way < 0.9 and isinstance(holder, dict):
        holder[str(rng.choice(VALUES))[:5000]] = holder.pop(key)
    else:  # copy the value of another entry
        source, source_key = rng.choice(places)
        holder[key] = copy.deepcopy(source[source_key])


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_position(data, rng)] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        if data:
            data[_position(data, rng)] = rng.randrange(256)


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[_position(data, rng) :]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = _position(data, rng)
    data[at:at] = rng.randbytes(rng.randint(1, 16))


def _remove(data: bytearray, rng: random.Random) -> None:
    at = _position(data, rng)
    del data[at : at + rng.randint(1, 16)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at = _position(data, rng)
    data[at:at] = data[at : at + rng.randint(1, 200)]


def _write_length(data: bytearray, rng: random.Random) -> None:
    """Overwrites 1 to 8 bytes with an integer of either byte order, as a length field."""
    size = rng.choice([1, 2, 4, 8])
    length = min(rng.choice([*LENGTHS, len(data)]), 256**size - 1)
    at = _position(data, rng)
    data[at : at + size] = length.to_bytes(size, rng.choice(["little", "big"]))


def _position(data: bytearray, rng: random.Random) -> int:
    """Returns a position, every other time among the first bytes, which hold the header."""
    end = max(1, len(data))
    return rng.randrange(min(end, rng.choice([16, 600, end, end])))


def outcomes(mutations: Iterator[bytes], path: Path, read: Callable) -> tuple[int, int]:
    """Reads each mutated file, within 2 s and 500 MiB; returns how many were read and refused."""
    n_read = n_refused = 0
    peak_before = peak_memory()
    for mutated in mutations:
        path.unlink(missing_ok=True)  # earlier arrays may still map the old file
        path.write_bytes(mutated)
        start = time.perf_counter()
        try:
            assert dict(read())
            n_read += 1
        except (ValueError, OSError) as error:
            text = str(error)
            assert text
            assert text.isprintable(), text
            assert len(text) < 500 + len(str(path)), text
            n_refused += 1
        assert time.perf_counter() - start < 2
    assert peak_memory() - peak_before < 500 << 20
    return n_read, n_refused


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
