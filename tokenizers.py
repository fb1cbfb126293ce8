"""Text to token ids and back: one id a character, one a piece of a word, or GPT-2's byte pairs.

The first two know a fixed set of tokens; everything else shares one more id, `unknown`, the last of
the vocabulary. Their ids, order and rule are those of gpt-burn (github.com/felix-andreas/gpt-burn),
whose models depend on them. Byte pairs know every text. Each can learn its tokens from a text.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from backend.errors import UserError
from backend.machine import n_threads

CHARACTERS = "\n " + string.ascii_letters + string.punctuation + string.digits + "äüöÄÖÜß"
VOWELS = "aeiouäöü"
# Unicode's White_Space, as in Rust; `str.isspace` holds U+001C to U+001F as well.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
WHITE_SPACE += "".join(map(chr, range(0x2000, 0x200B)))
SEPARATORS = frozenset(WHITE_SPACE + string.punctuation)
CATCH_ALL = "<?>"  # what a file lists for `unknown`
# Bytes read from a file at a time. With larger chunks numpy asks the system for fresh memory at
# every step, which takes up to half of the time.
CHUNK_SIZE = 1 << 16
MAX_COUNTED = 1 << 16  # kinds of unknown tokens; beyond that the rarest are forgotten
MAX_VOCABULARY_BYTES = 16 << 20  # GPT-2's has 1 MB


class Tokenizer:
    """What all tokenizers share: files, and the way back from ids to text.

    A subclass, which TOKENIZERS lists, sets `name` and `tokens`, and defines `train`, `encode` and
    `boundary`; one whose file is not a list of its tokens, also `files`, `save` and `load`.
    """

    name: str  # in a model's config
    files: tuple[str, ...] = ("tokenizer.json",)  # in a model's folder
    default_vocab_size: int | None = None  # that it learns; None for as many as there are
    names_learned = True  # whether ids kept of what it has learned have its name in their key
    reason = ""  # why it learned these tokens, where that is to be said
    tokens: list[bytes]  # the UTF-8 of each id; nothing for `unknown` and `end`
    merges: list[tuple[str, str]] | None = None  # of byte pairs: which are joined, in order
    end: int | None = None  # the id that ends a document, and begins a text without a prompt
    ends: tuple[int, ...] = ()  # the ids that end what a model writes
    specials: Mapping[str, int] = {}  # the tokens that a text names by their spelling
    padding: tuple[int, ...] = ()  # the ids that stand for no text, beside `unknown`
    n_surplus = 0  # rows of the model beyond the tokens

    @classmethod
    def train(cls, file: BinaryIO, size: int, vocab_size: int | None) -> "Tokenizer":
        """Learns at most `vocab_size` tokens from a file's first `size` bytes.

        NotUTF8 if the file is not UTF-8.
        """
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of a model's folder; UserError for files that are missing or damaged."""
        return cls.read(folder / "tokenizer.json")

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a list of tokens, as `save` or gpt-burn writes it."""
        with reading(path):
            return cls(read_tokens(path))

    def save(self, folder: Path) -> None:
        """Writes `files` to a model's folder."""
        write_tokens(folder / "tokenizer.json", self.tokens)

    @property
    def vocab_size(self) -> int:
        """The model's: of all tokens, and of rows that no token has."""
        return len(self.tokens) + self.n_surplus

    @property
    def unknown(self) -> int | None:
        return len(self.tokens) - 1

    @property
    def excluded(self) -> list[int]:
        """The ids that are never drawn, for they stand for no text and end none."""
        unknown = [] if self.unknown is None else [self.unknown]
        return [*unknown, *self.padding, *range(len(self.tokens), self.vocab_size)]

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds the id of every token."""
        return np.min_scalar_type(len(self.tokens) - 1)

    @property
    def document_end(self) -> str:
        """The spelling of `end`, which a text has after each of several documents; or nothing."""
        return next((spelling for spelling, id in self.specials.items() if id == self.end), "")

    def digest(self, *facts: object) -> str:
        """What tells it from tokenizers that give other ids."""
        return hashlib.sha256(repr((self.name, self.tokens, *facts)).encode()).hexdigest()

    def encode(self, text: str, unknown: "Unknown | None" = None) -> np.ndarray:
        """The ids of a text; tokens that are unknown are counted in `unknown`."""
        raise NotImplementedError

    def encode_known(self, text: str, unknown: "Unknown") -> np.ndarray:
        """The ids of a text without the unknown ones, whose tokens are counted."""
        ids = self.encode(text, unknown)
        is_known = ids != self.unknown
        return ids if is_known.all() else ids[is_known]

    def encode_file(
        self, file: BinaryIO, size: int, unknown: "Unknown | None" = None
    ) -> Iterator[np.ndarray]:
        """`encode_known` of a file's first `size` bytes, chunk by chunk.

        NotUTF8 if the file is not UTF-8.
        """
        unknown = unknown or Unknown()
        return (self.encode_known(text, unknown) for text in self.chunks(file, size))

    @staticmethod
    def boundary(text: str) -> int:
        """The last place found where a token starts whatever follows the text; 0 if none is."""
        raise NotImplementedError

    @classmethod
    def chunks(cls, file: BinaryIO, size: int) -> Iterator[str]:
        """The text of a file's first `size` bytes, in chunks that no token straddles."""
        parts = []
        for text in read_text(file, size):
            boundary = cls.boundary(text)
            if boundary:
                yield "".join([*parts, text[:boundary]])
                parts = []
            parts.append(text[boundary:])
        yield "".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; unknown ones are skipped."""
        return b"".join(self.tokens[id] for id in ids).decode(errors="replace")


def read_text(file: BinaryIO, size: int) -> Iterator[str]:
    """The first `size` bytes of a file, in chunks; a character that `size` cuts is left out.

    NotUTF8 for the first byte that is none.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    while True:
        data = file.read(min(CHUNK_SIZE, size - position))
        is_end_of_file = not data and (position < size or not file.read(1))
        n_waiting = len(decoder.getstate()[0])  # bytes of a character whose end comes now
        try:
            text = decoder.decode(data, final=is_end_of_file)
        except UnicodeDecodeError as error:
            byte, offset = error.object[error.start], position - n_waiting + error.start
            raise NotUTF8(byte, offset) from None
        yield text
        if not data:
            return
        position += len(data)


class NotUTF8(UserError):
    """A text that has another encoding, by its first byte that UTF-8 does not have there."""

    def __init__(self, byte: int, offset: int, name="the text", remedy="convert it to UTF-8"):
        where = f"invalid byte 0x{byte:02x} at offset {offset}"
        super().__init__(f"{name} is not UTF-8: {where}; {remedy}")
        self.byte, self.offset = byte, offset


@dataclass
class Unknown:
    """How many characters of a text a vocabulary lacks, of how many, and in which tokens."""

    n: int = 0
    n_characters: int = 0
    counts: dict[str, int] = field(default_factory=Counter)

    def add(self, n_characters: int, counts: Mapping[str, int]) -> None:
        """Counts a text of so many characters, and how often it has each token that is unknown."""
        self.n_characters += n_characters
        self.n += sum(len(token) * count for token, count in counts.items())
        self.counts.update(counts)
        if len(self.counts) > MAX_COUNTED:
            self.counts = Counter(dict(self.counts.most_common(MAX_COUNTED // 2)))

    def most_frequent(self) -> dict[str, int]:
        """Five tokens, with their counts."""
        return {token: self.counts[token] for token in most_frequent(self.counts, 5)}

    @property
    def share(self) -> str:
        percent = 100 * self.n / max(1, self.n_characters)
        return f"{percent:.1f} %" if percent >= 0.05 else "less than 0.1 %"

    def warn(self, source: str, fate: str = "") -> None:
        """Says on standard error what of `source` is unknown, if anything is."""
        if self.n:
            tokens = " ".join(map(visible, self.most_frequent()))
            lack = f"{self.share} of {source} is not in the vocabulary{fate}: {tokens}"
            print(f"warning: {lack}", file=sys.stderr)


def visible(text: str) -> str:
    """The text, with U+0009 for a tab, and so for all that one would not see."""
    return "".join(
        each if each.isprintable() and not each.isspace() else f"U+{ord(each):04X}" for each in text
    )


def most_frequent(counts: Counter, n: int) -> list:
    """The `n` keys with the highest counts; of equal counts, the first in sorted order."""
    if n < 0:
        raise UserError("the vocabulary size must be 1 or more: unknown tokens take one id")
    return sorted(counts, key=lambda key: (-counts[key], key))[:n]


class CharTokenizer(Tokenizer):
    """One id for each character: gpt-burn's 103, most of what English and German texts are made of,
    or a text's own, in sorted order.

    The carriage return of Windows' line breaks is never one, and not counted as unknown.
    """

    name = "char"
    N_OTHERS = 200  # gpt-burn's are enough where all but one character in so many are among them

    def __init__(self, characters: Iterable[str] = CHARACTERS):
        characters = list(characters)
        if longer := [token for token in characters if len(token) != 1]:
            raise UserError(f"{longer[0]!r:.60} is not one character")
        self.is_gpt_burns = characters == list(CHARACTERS)
        self.tokens = [character.encode() for character in characters] + [b""]
        points = code_points("".join(characters))
        # By code point; the last entry stands for all from there on.
        self.ids = np.full(points.max(initial=0) + 2, len(points), self.dtype)
        self.ids[points] = np.arange(len(points))

    @classmethod
    def train(cls, file: BinaryIO, size: int, vocab_size: int | None) -> "CharTokenizer":
        """gpt-burn's characters, where they are enough and no size is given, or else the text's
        own: those that occur twice or more, the most frequent `vocab_size - 1` of them."""
        if vocab_size == 1:
            raise UserError("the vocabulary size must be 2 or more: a line break takes one id, too")
        counts = np.zeros(sys.maxunicode + 1, np.int64)  # by code point
        for text in cls.chunks(file, size):
            found = np.bincount(code_points(text))
            counts[: len(found)] += found
        counts[ord("\r")] = 0
        n_characters = int(counts.sum())
        n_others = n_characters - counts[code_points(CHARACTERS)].sum()
        others = Unknown(int(n_others), n_characters)
        if vocab_size is None and n_others * cls.N_OTHERS <= n_characters:
            return cls()
        counts[ord("\n")] = n_characters + 2  # always there: prompts begin with it
        found = np.flatnonzero(counts > 1)
        order = np.argsort(-counts[found], kind="stable")[: vocab_size and vocab_size - 1]
        tokenizer = cls(map(chr, np.sort(found[order])))
        why = f"for gpt-burn's 103 leave out {others.share}"
        why = "as --vocab-size asks" if vocab_size else why
        tokenizer.reason = f"the vocabulary is its own {len(order)} characters, {why}"
        return tokenizer

    def encode(self, text: str, unknown: Unknown | None = None) -> np.ndarray:
        points = code_points(text)
        ids = self.ids.take(points, mode="clip")
        if unknown is not None:
            others, counts = np.unique(points[ids == self.unknown], return_counts=True)
            counts = dict(zip(map(chr, others.tolist()), counts.tolist(), strict=True))
            unknown.add(len(text) - counts.pop("\r", 0), counts)
        return ids

    @staticmethod
    def boundary(text: str) -> int:
        return len(text)

    @classmethod
    def load(cls, folder: Path) -> "CharTokenizer":
        return super().load(folder) if (folder / "tokenizer.json").is_file() else cls()

    def save(self, folder: Path) -> None:
        """Writes a text's own characters; without a file they are gpt-burn's."""
        if not self.is_gpt_burns:
            super().save(folder)


def code_points(text: str) -> np.ndarray:
    # Half a surrogate pair, as in a command line that is not UTF-8, is an unknown character.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class SimpleVowelTokenizer(Tokenizer):
    """Words cut before vowels into something like syllables; white space and punctuation alone.

    Knows the `vocab_size - 1` most frequent of the given tokens (all, if they are fewer), with ids
    in sorted order. Of equally frequent tokens it prefers the first in that order.
    """

    name = "vowel"
    default_vocab_size = 2000
    names_learned = False  # as earlier versions have it, whose ids are kept

    def __init__(self, tokens: Iterable[str], vocab_size: int = sys.maxsize):
        known = sorted(most_frequent(Counter(tokens), vocab_size - 1))
        if CATCH_ALL in known:  # no text has it: `<` is a token by itself
            raise UserError(f"{CATCH_ALL} stands for unknown tokens and cannot be one")
        self.tokens = [token.encode() for token in known] + [b""]
        self.ids = {token: id for id, token in enumerate(self.tokens[:-1])}
        self._fill_slots()

    @staticmethod
    def tokenize(text: str) -> list[str]:
        """The tokens of a text; joined, they are the text.

        One starts at each separator, after each separator, and at each vowel that stands more than
        3 UTF-8 bytes after the start of the token before it.
        """
        data = text.encode("utf-8", "surrogatepass")
        places = pairwise(token_offsets(text, data).tolist())
        return [data[start:end].decode("utf-8", "surrogatepass") for start, end in places]

    @classmethod
    def train(cls, file: BinaryIO, size: int, vocab_size: int) -> "SimpleVowelTokenizer":
        counts: Counter[bytes] = Counter()
        for text in cls.chunks(file, size):
            data = text.encode()
            offsets = token_offsets(text, data)
            count_tokens(counts, data, offsets, np.arange(len(offsets) - 1))
        return cls(token.decode() for token in most_frequent(counts, vocab_size - 1))

    def encode(self, text: str, unknown: Unknown | None = None) -> np.ndarray:
        data = text.encode("utf-8", "surrogatepass")
        offsets = token_offsets(text, data)
        keys = token_keys(data, offsets)
        slots = self._slots(keys)
        ids = self.slot_ids[slots]
        others = np.flatnonzero(self.slot_keys[slots] != keys)
        ids[others] = self.unknown
        others = others[self.crowded[slots[others]]]
        tokens = slices(data, offsets, others)
        ids[others] = [self.ids.get(token, self.unknown) for token in tokens]
        if unknown is not None:
            counts = count_tokens(Counter(), data, offsets, np.flatnonzero(ids == self.unknown))
            tokens = (token.decode("utf-8", "surrogatepass") for token in counts)
            unknown.add(len(text), dict(zip(tokens, counts.values(), strict=True)))
        return ids

    def _fill_slots(self) -> None:
        """A hash table for numpy: one token a slot; `ids` must be asked about a crowded slot's."""
        short = [token for token in self.ids if 0 < len(token) < 8]
        offsets = np.cumsum([0] + [len(token) for token in short])
        keys = token_keys(b"".join(short), offsets)
        self.slot_bits = len(short).bit_length() + 6  # so that few share one
        slots = self._slots(keys)
        self.slot_keys = np.zeros(1 << self.slot_bits, np.uint64)
        self.slot_keys[slots] = keys
        self.slot_ids = np.zeros(1 << self.slot_bits, self.dtype)
        self.slot_ids[slots] = [self.ids[token] for token in short]
        self.crowded = np.bincount(slots, minlength=1 << self.slot_bits) > 1
        # Long tokens have the key 0, whose slot is the first; no token has the key 8.
        self.slot_keys[0], self.crowded[0] = 8, True

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        # Multiplicative hashing (Knuth, volume 3, 6.4), by 2^64 over the golden ratio.
        hashes = keys * np.uint64(0x9E3779B97F4A7C15)
        return (hashes >> np.uint64(64 - self.slot_bits)).astype(np.int64)

    @staticmethod
    def boundary(text: str) -> int:
        separators = (i for i in range(len(text) - 1, 0, -1) if text[i] in SEPARATORS)
        return next(separators, 0)


OTHER, VOWEL, SEPARATOR = range(3)
KINDS = np.full(0x3002, OTHER, np.uint8)  # by code point; U+3000 is the last separator
KINDS[[ord(character) for character in VOWELS]] = VOWEL
KINDS[[ord(character) for character in SEPARATORS]] = SEPARATOR
ASCII_KINDS = KINDS[:128].tobytes() + bytes(128)


def token_offsets(text: str, data: bytes) -> np.ndarray:
    """Where the tokens of `SimpleVowelTokenizer.tokenize` start in the text's UTF-8, and its end.

    Numpy looks at all bytes at once.
    """
    # Flags a byte, and one for the end; 3 more before the first.
    kinds = np.frombuffer(bytearray(3) + data.translate(ASCII_KINDS) + b"\0", np.uint8)
    ends = kinds == SEPARATOR
    if not text.isascii():
        points = code_points(text)
        points = points[points > 0x7F]
        first_bytes = np.flatnonzero(np.frombuffer(data, np.uint8) >= 0xC0) + 3
        kinds[first_bytes] = KINDS[np.minimum(points, len(KINDS) - 1)]
        last_bytes = first_bytes + 1 + (points > 0x7FF) + (points > 0xFFFF)
        ends[last_bytes] = kinds[first_bytes] == SEPARATOR
    vowels = kinds == VOWEL
    certain = kinds == SEPARATOR  # a token starts here, whatever came before
    certain[1:] |= ends[:-1]
    certain[[3, -1]] = True

    # A vowel starts a token if none of the 3 bytes before it does, which in turn depends on those
    # before. Supposing first that no vowel starts one, then that all do which then seem free to,
    # and so on, gives lower and upper bounds in turn; where they still differ after a few rounds,
    # bytes are looked at one by one.
    starts = certain
    for _ in range(4):
        previous = starts
        starts = certain.copy()
        near = previous[:-3] | previous[1:-2] | previous[2:-1]
        starts[3:] |= vowels[3:] & ~near
    settled = bytearray(starts)
    for index in np.flatnonzero(starts != previous).tolist():
        settled[index] = 1 not in settled[index - 3 : index]
    return np.flatnonzero(np.frombuffer(settled, bool)[3:])


def token_keys(data: bytes, offsets: np.ndarray) -> np.ndarray:
    """A number for each token: its length as the lowest byte, its bytes as the highest ones.

    0 for those of more than 7 bytes, which do not fit.
    """
    # The 8 bytes from each offset on, as one number.
    windows = np.ndarray(len(data) + 1, "<u8", data + bytes(8), strides=(1,))[offsets[:-1]]
    lengths = np.diff(offsets).astype(np.uint64)
    lengths *= lengths < 8
    return (windows << (64 - 8 * lengths)) + lengths  # numpy shifts by 64 to 0


def slices(data: bytes, offsets: np.ndarray, indices: np.ndarray) -> Iterator[bytes]:
    starts, ends = offsets[indices].tolist(), offsets[indices + 1].tolist()
    return (data[start:end] for start, end in zip(starts, ends, strict=True))


def count_tokens(
    counts: Counter[bytes], data: bytes, offsets: np.ndarray, indices: np.ndarray
) -> Counter[bytes]:
    """Adds how often there is each of some tokens of a text."""
    keys, repeats = np.unique(token_keys(data, offsets)[indices], return_counts=True)
    for key, count in zip(keys.tolist(), repeats.tolist(), strict=True):
        length, *_ = packed = key.to_bytes(8, "little")
        counts[packed[8 - length :]] += count
    del counts[b""]  # the key that long tokens share
    counts.update(slices(data, offsets, indices[np.diff(offsets)[indices] > 7]))
    return counts


# The characters by which GPT-2's files write the bytes 0 to 255: those of Latin-1 that are visible
# for themselves, the characters from U+0100 on for the others.
VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = map(chr, range(0x100, 0x200))
BYTES = "".join(chr(byte) if byte in VISIBLE else next(OTHERS) for byte in range(256))
BYTE_OF = {character: byte for byte, character in enumerate(BYTES)}


def bytes_of(token: str) -> bytes:
    """What a token of GPT-2's files stands for; UserError for another token."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError as error:
        raise UserError(f"{error} stands for no byte") from None


class BytePairTokenizer(Tokenizer):
    """GPT-2's byte pair encoding (Radford et al., 2019), by the package tiktoken.

    `vocab` holds the ids of the tokens, `merges` the pairs of tokens that are joined, the first of
    them first, both as Hugging Face writes them: a character for each byte. `added` holds the ids
    of tokens that are found in a text by their spelling, of which `vocab` may have some. ValueError
    if these do not fit together, and without tiktoken.
    """

    name, unknown = "bpe", None
    default_vocab_size = 4096
    LEARNED_BYTES = 64 << 20  # of a text, at most
    role_files = ("special_tokens_map.json", "tokenizer_config.json")  # which token pads, say
    files = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json", *role_files)
    roles: Mapping[str, dict] = {}  # the content of a folder's `role_files`
    end_of_text = "<|endoftext|>"
    punctuation = frozenset(string.punctuation + "。、")
    # GPT-2's own: contractions, words, numbers and punctuation with the space before them
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], added: Mapping[str, int] = {}
    ):
        self.vocab, self.merges = vocab, merges
        ids = {**added, **vocab}  # of a token in both, the vocabulary's, as at Hugging Face
        if sorted(ids.values()) != list(range(len(ids))):
            raise UserError("its ids are not 0, 1, 2, ...")
        self.added = {token: ids[token] for token in added}
        spelled = dict.fromkeys([self.end_of_text, *self.added])
        self.specials = {token: ids[token] for token in spelled if token in ids}
        self.end = ids.get(self.end_of_text)
        self.ends = () if self.end is None else (self.end,)
        # Of neighbours in a text, tiktoken joins those of the lowest rank.
        ranked = list(dict.fromkeys([*BYTES, *map("".join, merges)]))
        if missing := [token for token in ranked if vocab.get(token, self.end) == self.end]:
            raise UserError(f"it lacks the token {missing[0]!r:.60}")
        others = [token for token in vocab if token not in spelled]
        in_bytes = {token: bytes_of(token) for token in dict.fromkeys([*ranked, *others])}
        self.tokens = [b""] * len(ids)
        for token, id in ids.items():
            if id != self.end:  # the end of a document is no part of its text
                self.tokens[id] = token.encode() if token in spelled else in_bytes[token]
        self.ids = np.array([vocab[token] for token in ranked], self.dtype)  # by rank
        ranks = {in_bytes[token]: rank for rank, token in enumerate(ranked)}
        self.encoding = tiktoken().Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def train(cls, file: BinaryIO, size: int, vocab_size: int) -> "BytePairTokenizer":
        """The 256 bytes, the pairs that the text has most often, and <|endoftext|>."""
        if vocab_size <= len(BYTES):
            raise UserError("the vocabulary size must be 257 or more: bytes, and an end of text")
        texts = cls.chunks(file, min(size, cls.LEARNED_BYTES))
        parts = [part for text in texts for part in text.split(cls.end_of_text)]
        merges = learned_merges(parts, cls.pattern, vocab_size - 1)
        tokens = dict.fromkeys([*BYTES, *map("".join, merges), cls.end_of_text])
        return cls({token: id for id, token in enumerate(tokens)}, merges)

    def digest(self) -> str:
        return super().digest(self.merges, *[sorted(self.specials.items())] * bool(self.specials))

    def encode_file(
        self, file: BinaryIO, size: int, unknown: Unknown | None = None
    ) -> Iterator[np.ndarray]:
        """On all cores: tiktoken lets other threads run."""
        with ThreadPoolExecutor(n := n_threads()) as threads:
            texts = self.with_whole_specials(self.chunks(file, size))
            while some := list(islice(texts, 4 * n)):
                yield from threads.map(self.encode, some)

    def with_whole_specials(self, texts: Iterable[str]) -> Iterator[str]:
        """Pieces of a text, joined where the spelling of a special token may be cut."""
        beginnings = tuple({each[:n] for each in self.specials for n in range(1, len(each))})
        joined = ""
        for text in texts:
            joined += text
            if not joined.endswith(beginnings):
                yield joined
                joined = ""
        yield joined

    def encode(self, text: str, unknown: Unknown | None = None) -> np.ndarray:
        """The ids of a text, in which `specials` are tokens; where two begin, the longer one is
        meant, as Hugging Face has it."""
        text = text.encode(errors="replace").decode()  # half a surrogate pair becomes a "?"
        by_length = sorted(self.specials, key=len, reverse=True)
        pattern = f"({'|'.join(map(re.escape, by_length))})"
        pieces = re.split(pattern, text) if by_length else [text]
        pieces[::2] = [self.ids[self.encoding.encode_to_numpy(piece)] for piece in pieces[::2]]
        pieces[1::2] = [np.array([self.specials[piece]], self.dtype) for piece in pieces[1::2]]
        return np.concatenate(pieces)

    @classmethod
    def boundary(cls, text: str) -> int:
        """Where white space begins, no token runs on; nor do letters before punctuation, which is
        for a text that has no spaces."""
        for i in range(len(text) - 1, 0, -1):
            if text[i] in WHITE_SPACE and text[i - 1] not in WHITE_SPACE:
                return i
        places = range(len(text) - 1, 0, -1)
        ends = (i for i in places if text[i] in cls.punctuation and text[i - 1].isalpha())
        return next(ends, 0)

    def save(self, folder: Path) -> None:
        """Writes lists that Hugging Face's transformers reads, version 4 as well as 5."""
        contents = {"vocab.json": self.vocab, **self.roles}
        if self.added.keys() - ({self.end_of_text} & self.vocab.keys()):
            contents["added_tokens.json"] = self.added
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *map(" ".join, self.merges), ""]
        (folder / "merges.txt").write_bytes("\n".join(lines).encode())

    @classmethod
    def load(cls, folder: Path) -> "BytePairTokenizer":
        """Reads `files` of any folder, a model's or not: Hugging Face's `tokenizer.json`, or lists
        as `save` writes them. UserError if it cannot, and if the tokenizer is of another kind."""
        roles = read_objects(folder, cls.role_files)
        settings = {name: value for each in roles.values() for name, value in each.items()}
        path, read = folder / "tokenizer.json", read_tokenizer_json
        if not path.is_file():
            path, read = folder / "vocab.json", read_vocab_json
        vocab, merges, added = read(path)
        with reading(path):
            check_settings("tokenizer_config.json", settings)
            named = {name: spelling(token) for name, token in settings.items() if "_token" in name}
            added |= {token: vocab[token] for token in named.values() if token in vocab}
            tokenizer = cls(vocab, merges, added)
        tokenizer.roles = roles
        pad = tokenizer.specials.get(named.get("pad_token"))
        tokenizer.take_roles(folder, [] if pad is None else [pad])
        return tokenizer

    def take_roles(self, folder: Path, pads: list[int]) -> None:
        """Sets the ids that end what a folder's model writes, as transformers has them: those of
        `generation_config.json`, where there is one, and else of `config.json`; and the ids that
        pad: `pads` and those of both files, but for ids that have another use."""
        ends, ids = self.ends, range(len(self.tokens))
        for name, config in read_objects(folder, ("config.json", "generation_config.json")).items():
            with reading(folder / name, "config"):
                ends = ids_named(config, "eos_token_id", ends if name == "config.json" else ())
                pads = [*pads, *ids_named(config, "pad_token_id", ())]
        self.ends = tuple(sorted(set(ends).intersection(ids)))
        others = {self.end, *self.ends, *self.ids.tolist()}
        self.padding = tuple(sorted(set(pads).intersection(ids) - others))


# Run by itself, for Hugging Face's package has the name of this file. A script without spaces has
# words as long as a sentence: they are cut, and tokens bounded, or rare ones would be whole ones.
LEARN = """
import json, os, sys
given = json.load(sys.stdin)
sys.path = [path for path in sys.path if os.path.realpath(path) != given["folder"]]
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
split = pre_tokenizers.Split(Regex(given["pattern"].replace("+", "{1,32}")), "isolated")
to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
trainer = trainers.BpeTrainer(
    vocab_size=given["vocab_size"], max_token_length=32, show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
tokenizer.train_from_iterator(given["texts"], trainer)
merges = json.loads(tokenizer.to_str())["model"]["merges"]
json.dump([pair.split(" ") if isinstance(pair, str) else pair for pair in merges], sys.stdout)
"""


def learned_merges(texts: list[str], pattern: str, vocab_size: int) -> list[tuple[str, str]]:
    """The pairs to join, bytes and pairs together `vocab_size`, as Hugging Face's trainer has
    them; UserError without its package."""
    try:
        metadata.version("tokenizers")
    except metadata.PackageNotFoundError:
        needs = "learning byte pairs needs Hugging Face's package tokenizers"
        raise UserError(f"{needs}: pip install '.[bpe]'") from None
    folder = os.path.dirname(os.path.realpath(__file__))
    given = {"folder": folder, "pattern": pattern, "vocab_size": vocab_size, "texts": texts}
    process = subprocess.run(
        [sys.executable, "-P", "-c", LEARN],
        input=json.dumps(given),
        env=os.environ | {"RAYON_NUM_THREADS": str(n_threads())},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        *_, reason = process.stderr.splitlines() or [f"status {process.returncode}"]
        raise UserError(f"byte pairs cannot be learned: {reason}")
    return list(map(tuple, json.loads(process.stdout)))


def tiktoken():
    try:
        import tiktoken
    except ImportError:
        raise UserError("byte pairs need the package tiktoken: pip install '.[bpe]'") from None
    return tiktoken


TOKENIZERS = {each.name: each for each in (CharTokenizer, SimpleVowelTokenizer, BytePairTokenizer)}
FILES = [file for each in TOKENIZERS.values() for file in each.files]
DEFAULT = CharTokenizer.name  # of a config that names none, as gpt-burn's
OF_FOLDERS = BytePairTokenizer  # that folders, also without a model, and names on the Hub stand for


def load(name: str, folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder, by the name in its config; UserError if there is none."""
    if name not in TOKENIZERS:
        *others, last = map(repr, TOKENIZERS)
        raise UserError(f"unknown tokenizer {name!r}: there are {', '.join(others)} and {last}")
    return TOKENIZERS[name].load(folder)


@contextlib.contextmanager
def reading(path: Path, kind: str = "vocabulary") -> Iterator[Path]:
    """Makes one line, with the file's name, of what is wrong with it."""
    try:
        yield path
    except OSError as error:
        raise UserError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a {kind}: {error!s:.200}") from error


def write_tokens(path: Path, tokens: list[bytes]) -> None:
    listed = [token.decode() for token in tokens[:-1]] + [CATCH_ALL]
    content = json.dumps({"tokens": listed}, ensure_ascii=False, indent=1)
    path.write_text(content, encoding="utf-8")


def read_tokens(path: Path) -> list[str]:
    """The known tokens of a file, as `write_tokens` or gpt-burn writes it."""
    data = path.read_bytes()
    # bincode's first number has zero bytes, JSON none
    tokens = tokens_of_bincode(data) if b"\0" in data[:8] else tokens_of_json(data)
    if tokens[-1:] != [CATCH_ALL]:
        raise UserError(f"its last token is not {CATCH_ALL}")
    if any(token >= following for token, following in pairwise(tokens[:-1])):
        raise UserError("its tokens are not in sorted order")
    return tokens[:-1]


def tokens_of_json(data: bytes) -> list[str]:
    content = json.loads(data.decode("utf-8-sig"))
    tokens = content.get("tokens") if isinstance(content, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError('it holds no list of strings named "tokens"')
    return tokens


def tokens_of_bincode(data: bytes) -> list[str]:
    """A vocabulary as gpt-burn saves it: tokens to ids, then ids to tokens, in any order."""
    rest = memoryview(data)

    def take(n_bytes: int) -> memoryview:
        nonlocal rest
        if n_bytes > len(rest):
            raise UserError("it ends too early")
        taken, rest = rest[:n_bytes], rest[n_bytes:]
        return taken

    def read_number() -> int:
        return int.from_bytes(take(8), "little")

    def read_string() -> str:
        return str(take(read_number()), "utf-8")

    ids = {read_string(): read_number() for _ in range(read_number())}
    tokens = {read_number(): read_string() for _ in range(read_number())}
    if rest or ids != {token: id for id, token in tokens.items()}:
        raise UserError("its two halves do not agree")
    if sorted(tokens) != list(range(len(tokens))):
        raise UserError("its ids are not 0, 1, 2, ...")
    return [tokens[id] for id in range(len(tokens))]


# What decides the ids of a text, in the parts of GPT-2's tokenizer.json and in its config: the
# values that each setting may have, first the one that it has where a file does not say.
SETTINGS = {
    "model": {
        **{"type": ("BPE",), "dropout": (None, 0), "ignore_merges": (False,)},
        **{"continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")},
    },
    "normalizer": {"type": (None,)},
    "pre_tokenizer": {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)},
    "post_processor": {"type": (None, "ByteLevel", "TemplateProcessing"), "special_tokens": ({},)},
    "added token": {"lstrip": (False,), "rstrip": (False,), "single_word": (False,)},
    "tokenizer_config.json": {"add_prefix_space": (False, None), "add_bos_token": (False, None)},
}
BytePairs = tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]  # vocab, merges, added


def read_tokenizer_json(path: Path) -> BytePairs:
    """What a BytePairTokenizer is made of, in one file of Hugging Face's package tokenizers."""
    content = read_objects(path.parent, [path.name], "vocabulary")[path.name]
    with reading(path):
        for part in ("model", "normalizer", "pre_tokenizer", "post_processor"):
            check_settings(part, content.get(part))
        tokens, model = content.get("added_tokens") or [], content["model"]
        for token in tokens if isinstance(tokens, list) else [tokens]:
            check_settings("added token", token or {})
        added = ids_in({spelling(token): token.get("id") for token in tokens})
        return ids_in(model.get("vocab")), pairs_in(model.get("merges")), added


def read_vocab_json(path: Path) -> BytePairs:
    """What a BytePairTokenizer is made of, in a vocab.json and the lists beside it."""
    with reading(path.with_name("merges.txt")) as merges_path:
        lines = read_text_file(merges_path).split("\n")
        merges = pairs_in([line for line in lines if line[:8] not in ("", "#version")])
    with reading(path.with_name("added_tokens.json")) as added_path:
        added = ids_in(json.loads(read_text_file(added_path))) if added_path.is_file() else {}
    with reading(path):
        return ids_in(json.loads(read_text_file(path))), merges, added


def read_objects(folder: Path, names: Iterable[str], kind: str = "config") -> dict[str, dict]:
    """The JSON objects in these files of a folder, of those that there are."""
    objects = {}
    for name in names:
        with reading(folder / name, kind) as path:
            if path.is_file():
                objects[name] = json.loads(read_text_file(path))
                if not isinstance(objects[name], dict):
                    raise UserError("it is not a JSON object")
    return objects


def read_text_file(path: Path) -> str:
    if path.stat().st_size > MAX_VOCABULARY_BYTES:
        raise UserError("it is far too large")
    return path.read_text(encoding="utf-8-sig")


def check_settings(name: str, part: object) -> None:
    """UserError unless a part of a tokenizer has, in each of its SETTINGS, one of the values."""
    part = {"type": None} if part is None else part
    if not isinstance(part, dict):
        raise UserError(f"its {name} is not a JSON object")
    for setting, values in SETTINGS[name].items():
        if (value := part.get(setting, values[0])) not in values:
            raise UserError(f"its {name} has the {setting} {value!r:.60}, not {values[0]!r}")


def spelling(token: object) -> str:
    """Of a token that is written as a text or as an object with a `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def ids_in(vocab: object) -> dict[str, int]:
    is_map = isinstance(vocab, dict) and "" not in vocab
    if not is_map or any(type(id) is not int for id in vocab.values()):
        raise UserError("it is no map of tokens to ids")
    return vocab


def pairs_in(merges: object) -> list[tuple[str, str]]:
    """Of lists of two tokens, or of texts with a space between two."""
    pairs = merges if isinstance(merges, list) else [merges]
    pairs = [each.split(" ") if isinstance(each, str) else each for each in pairs]
    for pair in pairs:
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str] or "" in pair:
            raise UserError("it is no list of pairs of tokens")
    return list(map(tuple, pairs))


def ids_named(config: dict, name: str, default: Collection[int]) -> Collection[int]:
    ids = config.get(name, default)
    ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    if any(type(id) is not int for id in ids):
        raise UserError(f"its {name} is neither an id nor a list of ids")
    return ids


# What Hugging Face's package of this name has, for whom a program in this folder gets this file.
THEIRS = {
    *("AddedToken", "Encoding", "NormalizedString", "PreTokenizedString", "Regex", "Token"),
    *("decoders", "implementations", "models", "normalizers", "pre_tokenizers", "processors"),
    *("trainers", "ByteLevelBPETokenizer", "CharBPETokenizer", "BertWordPieceTokenizer"),
    *("SentencePieceBPETokenizer", "SentencePieceUnigramTokenizer"),
}


def __getattr__(name: str):
    if name in THEIRS:
        raise ImportError(
            f"{__file__} is not Hugging Face's package tokenizers, which has {name}: import that, "
            "or transformers, in a program outside of this folder"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
