"""What is compiled for a model: the C of its step, and a file of its weights and tokens."""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer

from backend.arrays import as_numpy
from backend.cpu import native
from backend.rendered import N_CHUNKS, Call, rendered
from tokenizers import SEPARATORS, TOKENIZERS, VOWELS, WHITE_SPACE, Tokenizer

ALIGNMENT = 64  # bytes
MIN_SHARED_BYTES = 4 << 20  # with fewer, waking a core costs more than it gives
OTHER, VOWEL, SEPARATOR, LETTER, NUMBER, SPACE, UNSEEN = range(7)  # tokenizer.c's kinds


def write_sources(decoder, tokenizer: Tokenizer, help: str, folder: Path) -> "Kernels":
    """Writes, of a step of inference's Decoder, kernels.c, with one.c and many.c, which call these
    for one token and for many; model.h, sizes and help; and model.bin, the weights and tokens."""
    arrays = tables(tokenizer)
    sizes = {
        "CONTEXT_LENGTH": decoder.context_length,
        "CHUNK": decoder.chunk,
        "N_CHUNKS": N_CHUNKS,
        "VOCAB_SIZE": tokenizer.vocab_size,
        "TOKENIZER": list(TOKENIZERS).index(tokenizer.name),
        "UNKNOWN": -1 if tokenizer.unknown is None else tokenizer.unknown,
        "END": -1 if tokenizer.end is None else tokenizer.end,
        "N_TOKENS": len(tokenizer.tokens),
        "LONGEST_TOKEN": max(map(len, tokenizer.tokens)),
    }
    steps = {"one": 1, "many": decoder.chunk}
    calls = [rendered(decoder.step, decoder.ids[n], **decoder.ranges[n]) for n in steps.values()]
    kernels = Kernels(decoder.weights)
    for name, calls_of_step in zip(steps, calls, strict=True):
        (folder / f"{name}.c").write_text(kernels.calls(calls_of_step), encoding="utf-8")
    (folder / "kernels.c").write_text(kernels.source(), encoding="utf-8")

    for name, array in arrays.items():
        sizes |= {name: kernels.add(array), f"N_{name}": len(array)}
    sizes |= {
        "ID": kernels.place_of(decoder.ids[1]),
        "IDS": kernels.place_of(decoder.ids[decoder.chunk]),
        "LOGITS": kernels.place_of(decoder.logits),
        "N_HALVES": kernels.n_halves,
        "MODEL_BYTES": kernels.n_file_bytes,
        "MEMORY_BYTES": kernels.n_memory_bytes,
        "IS_LARGE": int(kernels.n_file_bytes > MIN_SHARED_BYTES),
    }
    lines = (f"  {name} = {size},\n" for name, size in sizes.items())
    header = f"enum {{\n{''.join(lines)}}};\n#define HELP {json.dumps(help)}\n"
    header += f"#define IS_END(id) ({is_one_of(tokenizer.ends)})\n"
    header += f"#define IS_EXCLUDED(id) ({is_one_of(tokenizer.excluded)})\n"
    (folder / "model.h").write_text(header, encoding="utf-8")
    with (folder / "model.bin").open("wb") as file:
        kernels.write(file)
    return kernels


class Kernels:
    """The kernels of calls, and where each of their buffers is.

    The given weights are in a file, those in half precision first, so that places among these can
    be counted in numbers; all else is in memory.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self.file: list[np.ndarray] = []
        self.n_file_bytes = self.n_halves = self.n_memory_bytes = 0
        self.names: dict[str, str] = {}  # of functions, by their source
        self.places: dict[Buffer, int] = {}  # in memory
        self.arguments: dict[Buffer, str] = {}  # in C, of what is not in memory
        for weight in sorted(weights, key=lambda weight: weight.dtype != dtypes.half):
            place, is_half = self.add(as_numpy(weight)), weight.dtype == dtypes.half
            argument = f"HALF({place // 2})" if is_half else f"WEIGHT({place})"
            self.arguments[weight.uop.base.buffer] = argument
            self.n_halves = self.n_file_bytes // 2 if is_half else self.n_halves

    def add(self, array: np.ndarray) -> int:
        """Puts an array at the end of the file; its place there, in bytes."""
        place = self.n_file_bytes
        self.file.append(array)
        self.n_file_bytes += round_up(array.nbytes)
        return place

    def place_of(self, tensor: Tensor) -> int:
        """Where a tensor's buffer is in memory, in bytes."""
        return self.places[tensor.uop.base.buffer]

    def argument(self, buffer: Buffer, offset: int) -> str:
        if buffer in self.arguments:
            return self.arguments[buffer]
        if buffer not in self.places:
            self.places[buffer] = self.n_memory_bytes
            self.n_memory_bytes += round_up(buffer.nbytes)
        return f"MEMORY({self.places[buffer] + offset})"

    def calls(self, calls: Iterable[Call]) -> str:
        """These calls in C, of macros that steps.c defines."""
        lines = []
        for function, name in native.names.items():
            self.arguments[function.buffer] = f"FUNCTION({name})"
        for call in calls:
            name = self.names.setdefault(call.source, f"k{len(self.names)}_{call.name}")
            buffers = (self.argument(*buffer) for buffer in call.buffers)
            lines.append(f"CALL({call.n_chunks}, {name}({', '.join([*buffers, *call.variables])}))")
        return "\n".join(lines)

    def source(self) -> str:
        """The kernels in C. tinygrad's `long` has 64 bits, and C's has not everywhere."""
        functions = (
            re.sub(r"\bvoid \w+\(", f"KERNEL {name}(", source, count=1)
            for source, name in self.names.items()
        )
        return re.sub(r"\blong\b", "long long", "".join(functions))

    def write(self, file) -> None:
        for array in self.file:
            data = np.ascontiguousarray(array)
            file.write(data.data)
            file.write(bytes(round_up(data.nbytes) - data.nbytes))


def round_up(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def is_one_of(ids: Sequence[int]) -> str:
    """C for whether `id` is one of these, of which many may follow one another."""
    ids = np.sort(np.array(ids, int))
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1) if len(ids) else []
    return " || ".join(f"((id) >= {run[0]} && (id) <= {run[-1]})" for run in runs) or "0"


def tables(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Arrays of uint32, and one of bytes, by the names that tokenizer.c has for their places.

    TOKEN_STARTS are the places in TOKEN_BYTES of the tokens, then of the spellings of the special
    ones, the longest first, and the end; SPECIALS are the ids of these. SORTED_TOKENS are the ids
    of the other tokens that a text can have, in the order of their bytes, and RANKS (n_tokens), of
    byte pairs, which of two is joined first. From each of KIND_STARTS, a code point, to before the
    next one characters are of the same one of KINDS.
    """
    tokens, specials = tokenizer.tokens, sorted(tokenizer.specials, key=len, reverse=True)
    in_bytes = [*tokens, *(spelling.encode() for spelling in specials)]
    known, ranks = [id for id, token in enumerate(tokens) if token], np.zeros(len(tokens))
    characters = list(map(chr, range(sys.maxunicode + 1)))
    kinds = np.full(len(characters), OTHER)
    if tokenizer.merges is not None:
        known = tokenizer.ids.tolist()
        ranks[known] = np.arange(len(known))
        letters = {"L": LETTER, "N": NUMBER}
        categories = map(unicodedata.category, characters)
        kinds[:] = [letters.get(category[0], OTHER) for category in categories]
    else:
        kinds[~np.array(list(map(str.isprintable, characters)))] = UNSEEN
        kinds[[ord(character) for character in VOWELS]] = VOWEL
        kinds[[ord(character) for character in SEPARATORS]] = SEPARATOR
    kinds[[ord(character) for character in WHITE_SPACE]] = SPACE
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    numbers = {
        "TOKEN_STARTS": np.cumsum([0, *map(len, in_bytes)]),
        "SPECIALS": [tokenizer.specials[spelling] for spelling in specials],
        "SORTED_TOKENS": sorted(known, key=lambda id: tokens[id]),
        "RANKS": ranks,
        "KIND_STARTS": starts,
        "KINDS": kinds[starts],
    }
    arrays = {name: np.array(array, "<u4") for name, array in numbers.items()}
    return {**arrays, "TOKEN_BYTES": np.frombuffer(b"".join(in_bytes), np.uint8)}
