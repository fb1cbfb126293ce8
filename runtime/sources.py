"""Sources of an exported model: C of its step, and a file of its weights and tokens."""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer
from tinygrad.helpers import round_up

from backend.arrays import as_numpy
from backend.cpu import native
from backend.rendering import N_CHUNKS, Call, render_kernels
from tokenizers import SEPARATORS, TOKENIZERS, VOWELS, WHITE_SPACE, Tokenizer

ALIGNMENT = 64  # bytes
MIN_SHARED_BYTES = 4 << 20  # with fewer, waking a core costs more than it gives
OTHER, VOWEL, SEPARATOR, LETTER, NUMBER, SPACE, UNSEEN = range(7)  # as in tokenizer.c


def write_sources(decoder, tokenizer: Tokenizer, help_text: str, folder: Path) -> "Kernels":
    """Writes the files that are compiled for a Decoder of inference/generator.py and a tokenizer.

    kernels.c holds the kernels of a step, one.c and many.c call them for one token and for many,
    model.h holds sizes, offsets and the help, model.bin the weights and the tokens.
    """
    arrays = tables(tokenizer)
    is_end, is_excluded = is_one_of(tokenizer.ends), is_one_of(tokenizer.excluded)
    constants = {
        "CONTEXT_LENGTH": decoder.context_length,
        "N_PREFILL": decoder.n_prefill,
        "N_CHUNKS": N_CHUNKS,
        "VOCAB_SIZE": tokenizer.vocab_size,
        "TOKENIZER": list(TOKENIZERS).index(tokenizer.name),
        "UNKNOWN": -1 if tokenizer.unknown is None else tokenizer.unknown,
        "END": -1 if tokenizer.end is None else tokenizer.end,
        "N_TOKENS": len(tokenizer.tokens),
        "LONGEST_TOKEN": max(map(len, tokenizer.tokens)),
    }
    kernels = Kernels(decoder.weights)
    for name, array in arrays.items():
        constants |= {name: kernels.add(array), f"N_{name}": len(array)}

    for file, n in {"one.c": 1, "many.c": decoder.n_prefill}.items():
        calls = render_kernels(decoder.step, decoder.ids[n], **decoder.ranges[n])
        (folder / file).write_text(kernels.calls(calls), encoding="utf-8")
    (folder / "kernels.c").write_text(kernels.source(), encoding="utf-8")
    constants |= {
        "ID": kernels.offset_of(decoder.ids[1]),
        "IDS": kernels.offset_of(decoder.ids[decoder.n_prefill]),
        "LOGITS": kernels.offset_of(decoder.logits),
        "N_HALVES": kernels.n_halves,
        "MODEL_BYTES": kernels.n_file_bytes,
        "MEMORY_BYTES": kernels.n_memory_bytes,
        "IS_LARGE": int(kernels.n_file_bytes > MIN_SHARED_BYTES),
    }
    lines = (f"  {name} = {value},\n" for name, value in constants.items())
    header = f"enum {{\n{''.join(lines)}}};\n#define HELP {json.dumps(help_text)}\n"
    header += f"#define IS_END(id) ({is_end})\n#define IS_EXCLUDED(id) ({is_excluded})\n"
    (folder / "model.h").write_text(header, encoding="utf-8")
    with (folder / "model.bin").open("wb") as file:
        kernels.write(file)
    return kernels


class Kernels:
    """The kernels of a step, and the offset of each of their buffers in model.bin or in memory.

    The weights are in the file, half precision first: a page has no halves, and converts them to
    single precision, with the same indices. All other buffers are in memory.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self.arrays: list[np.ndarray] = []  # of the file
        self.n_file_bytes = self.n_halves = self.n_memory_bytes = 0
        self.names: dict[str, str] = {}  # source -> name of a function
        self.offsets: dict[Buffer, int] = {}  # in memory, in bytes
        self.arguments: dict[Buffer, str] = {}  # C of weights and addresses of functions
        for weight in sorted(weights, key=lambda weight: weight.dtype != dtypes.half):
            offset, is_half = self.add(as_numpy(weight)), weight.dtype == dtypes.half
            argument = f"HALF({offset // 2})" if is_half else f"WEIGHT({offset})"
            self.arguments[weight.uop.base.buffer] = argument
            if is_half:
                self.n_halves = self.n_file_bytes // 2

    def add(self, array: np.ndarray) -> int:
        """Appends an array to the file; returns its offset there, in bytes."""
        offset = self.n_file_bytes
        self.arrays.append(array)
        self.n_file_bytes += round_up(array.nbytes, ALIGNMENT)
        return offset

    def offset_of(self, tensor: Tensor) -> int:
        """The offset of a tensor's buffer in memory, in bytes."""
        return self.offsets[tensor.uop.base.buffer]

    def argument(self, buffer: Buffer, offset: int) -> str:
        if buffer in self.arguments:
            return self.arguments[buffer]
        if buffer not in self.offsets:
            self.offsets[buffer] = self.n_memory_bytes
            self.n_memory_bytes += round_up(buffer.nbytes, ALIGNMENT)
        return f"MEMORY({self.offsets[buffer] + offset})"

    def calls(self, calls: Iterable[Call]) -> str:
        """The calls in C, by macros that steps.c defines."""
        lines = []
        for function, name in native.names.items():
            self.arguments[function.buffer] = f"FUNCTION({name})"
        for call in calls:
            name = self.names.setdefault(call.source, f"k{len(self.names)}_{call.name}")
            buffers = (self.argument(*buffer) for buffer in call.buffers)
            lines.append(f"CALL({call.n_chunks}, {name}({', '.join([*buffers, *call.variables])}))")
        return "\n".join(lines)

    def source(self) -> str:
        """The kernels in C. tinygrad's `long` has 64 bits, C's only 32 on Windows and in pages."""
        functions = (
            re.sub(r"\bvoid \w+\(", f"KERNEL {name}(", source, count=1)
            for source, name in self.names.items()
        )
        return re.sub(r"\blong\b", "long long", "".join(functions))

    def write(self, file) -> None:
        for array in self.arrays:
            data = np.ascontiguousarray(array)
            file.write(data.data)
            file.write(bytes(-data.nbytes % ALIGNMENT))


def is_one_of(ids: Sequence[int]) -> str:
    """A condition in C: `id` is one of the ids. Consecutive ids are one comparison."""
    ids = np.sort(np.array(ids, int))
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1) if len(ids) else []
    return " || ".join(f"((id) >= {run[0]} && (id) <= {run[-1]})" for run in runs) or "0"


def tables(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Arrays of uint32, and TOKEN_BYTES of uint8, by their names in tokenizer.c.

    TOKEN_STARTS: the offset in TOKEN_BYTES of each token, then of each special token's spelling,
    the longest first, and the end.
    SPECIALS: the ids of the special tokens, in that order.
    SORTED_TOKENS: the ids of all other tokens that a text can have, sorted by their bytes.
    RANKS (n_tokens): of byte pairs, the order in which they are merged.
    KIND_STARTS, KINDS: the first code point and the kind of each run of characters of one kind.
    """
    tokens, specials = tokenizer.tokens, sorted(tokenizer.specials, key=len, reverse=True)
    spellings = [*tokens, *(special.encode() for special in specials)]
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
        "TOKEN_STARTS": np.cumsum([0, *map(len, spellings)]),
        "SPECIALS": [tokenizer.specials[special] for special in specials],
        "SORTED_TOKENS": sorted(known, key=lambda id: tokens[id]),
        "RANKS": ranks,
        "KIND_STARTS": starts,
        "KINDS": kinds[starts],
    }
    arrays = {name: np.array(array, "<u4") for name, array in numbers.items()}
    return {**arrays, "TOKEN_BYTES": np.frombuffer(b"".join(spellings), np.uint8)}
