"""Text to token ids and back: characters, pieces of words cut before vowels, or GPT-2's byte pairs.

Characters and pieces of words are a fixed set of tokens; all other text shares one more id,
`unknown`, the last of the vocabulary. Ids, order and rule are those of gpt-burn
(github.com/felix-andreas/gpt-burn), whose models depend on them. Byte pairs encode every text. Each
tokenizer can learn its tokens from a text.
"""

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

import numpy as np

from backend.errors import UserError
from backend.machine import n_threads


class Tokenizer:
    """The interface of all tokenizers, and their way back from ids to text.

    A subclass, listed in TOKENIZERS, sets `name` and `tokens`, and defines `train`, `encode` and
    `boundary`; a subclass whose file is not a list of its tokens, also `files`, `load` and `save`.
    """

    name: str  # in a model's config
    files: tuple[str, ...] = ("tokenizer.json",)  # in a model's folder
    default_vocab_size: int | None = None  # to learn; None for no bound
    max_learned_bytes = sys.maxsize  # of the text to learn from
    names_learned = True  # whether the key of kept ids of learned tokens contains `name`
    reason = ""  # for the learned tokens, to be shown
    tokens: list[bytes]  # UTF-8 by id; empty for `unknown` and `end`
    merges: list[tuple[str, str]] | None = None  # pairs of byte pair encoding, by rank
    end: int | None = None  # id that ends a document, and begins a text without a prompt
    ends: tuple[int, ...] = ()  # ids that end generation
    specials: Mapping[str, int] = {}  # ids of the tokens that a text holds by their spelling
    padding: tuple[int, ...] = ()  # ids without text, beside `unknown`
    n_surplus = 0  # rows of the model beyond the tokens

    @classmethod
    def train(cls, chunks: Iterable[str], vocab_size: int | None) -> "Tokenizer":
        """Learns at most `vocab_size` tokens from the chunks of a text."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads `files` of a model's folder; UserError if they are missing or damaged."""
        return cls.read(folder / "tokenizer.json")

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """Reads a list of tokens, as `save` or gpt-burn writes it."""
        with reading(path):
            return cls(read_tokens(path))

    def save(self, folder: Path) -> None:
        """Writes `files` to a model's folder."""
        tokens = [*(token.decode() for token in self.tokens[:-1]), CATCH_ALL]
        content = json.dumps({"tokens": tokens}, ensure_ascii=False, indent=1)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Rows of the model: tokens and surplus."""
        return len(self.tokens) + self.n_surplus

    @property
    def unknown(self) -> int | None:
        return len(self.tokens) - 1

    @property
    def excluded(self) -> list[int]:
        """Ids that sampling excludes: they have no text and end none."""
        unknown = [] if self.unknown is None else [self.unknown]
        return [*unknown, *self.padding, *range(len(self.tokens), self.vocab_size)]

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds the id of every token."""
        return np.min_scalar_type(len(self.tokens) - 1)

    @property
    def document_end(self) -> str:
        """The spelling of `end`, which separates documents in a text; "" without `end`."""
        return next((spelling for spelling, id in self.specials.items() if id == self.end), "")

    def digest(self, *facts: object) -> str:
        """SHA-256 of name, tokens and `facts`: equal for tokenizers that give equal ids."""
        return hashlib.sha256(repr((self.name, self.tokens, *facts)).encode()).hexdigest()

    def encode(self, text: str, unknown: "Unknown | None" = None) -> np.ndarray:
        """The ids of a text: (n,) of `dtype`; counts unknown tokens in `unknown`."""
        raise NotImplementedError

    def encode_chunks(self, chunks: Iterable[str], unknown: "Unknown") -> Iterator[np.ndarray]:
        """Yields the ids of a text in chunks, without the unknown ones, which are counted."""
        for text in self.whole_tokens(chunks):
            ids = self.encode(text, unknown)
            is_known = ids != self.unknown
            yield ids if is_known.all() else ids[is_known]

    @classmethod
    def whole_tokens(cls, chunks: Iterable[str]) -> Iterator[str]:
        """Yields the text of the chunks, cut between tokens."""
        parts = []
        for text in chunks:
            boundary = cls.boundary(text)
            if boundary:
                yield "".join([*parts, text[:boundary]])
                parts = []
            parts.append(text[boundary:])
        yield "".join(parts)

    @staticmethod
    def boundary(text: str) -> int:
        """The last index at which a token starts whatever follows the text; 0 if none is found."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; unknown ones are skipped."""
        return b"".join(self.tokens[id] for id in ids).decode(errors="replace")


MAX_COUNTED = 1 << 16  # distinct unknown tokens; beyond, the rarest are forgotten


@dataclass
class Unknown:
    """Counts of the characters of a text, of the unknown ones, and of the unknown tokens."""

    n: int = 0  # unknown characters
    n_characters: int = 0
    counts: dict[str, int] = field(default_factory=Counter)

    def add(self, n_characters: int, counts: Mapping[str, int]) -> None:
        """Adds a text: its number of characters, and the counts of its unknown tokens."""
        self.n_characters += n_characters
        self.n += sum(len(token) * count for token, count in counts.items())
        self.counts.update(counts)
        if len(self.counts) > MAX_COUNTED:
            self.counts = Counter(dict(self.counts.most_common(MAX_COUNTED // 2)))

    def most_frequent(self) -> dict[str, int]:
        """Counts of the five most frequent tokens."""
        return {token: self.counts[token] for token in most_frequent(self.counts, 5)}

    @property
    def share(self) -> str:
        percent = 100 * self.n / max(1, self.n_characters)
        return f"{percent:.1f} %" if percent >= 0.05 else "less than 0.1 %"

    def warn(self, source: str, consequence: str = "") -> None:
        """Prints on standard error the share of `source` that is unknown, if any."""
        if self.n:
            tokens = " ".join(map(visible, self.most_frequent()))
            lack = f"{self.share} of {source} is not in the vocabulary{consequence}: {tokens}"
            print(f"warning: {lack}", file=sys.stderr)


def visible(text: str) -> str:
    """The text with U+0009 in place of a tab, and so on for all invisible characters."""
    return "".join(
        character if character.isprintable() and character != " " else f"U+{ord(character):04X}"
        for character in text
    )


def most_frequent(counts: Counter, n: int) -> list:
    """The `n` keys with the highest counts; of equal counts, the first in sorted order."""
    return sorted(counts, key=lambda key: (-counts[key], key))[:n]


CHARACTERS = "\n " + string.ascii_letters + string.punctuation + string.digits + "äüöÄÖÜß"


class CharTokenizer(Tokenizer):
    """One id for each character: gpt-burn's 103, enough for most English and German texts, or a
    text's own, in sorted order.

    The carriage return of Windows' line breaks has no id, and is not counted as unknown.
    """

    name = "char"
    MIN_PER_UNKNOWN = 200  # characters of a text for each one that gpt-burn's may lack

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
    def train(cls, chunks: Iterable[str], vocab_size: int | None) -> "CharTokenizer":
        """gpt-burn's characters, where they are enough and no size is given, or else the text's
        own that occur twice or more, the most frequent `vocab_size - 1` of them."""
        if vocab_size == 1:
            raise UserError("the vocabulary size must be 2 or more: a line break takes one id, too")
        counts = np.zeros(sys.maxunicode + 1, np.int64)  # by code point
        for text in chunks:
            found = np.bincount(code_points(text))
            counts[: len(found)] += found
        counts[ord("\r")] = 0
        n_characters = int(counts.sum())
        n_unknown = n_characters - int(counts[code_points(CHARACTERS)].sum())
        if vocab_size is None and n_unknown * cls.MIN_PER_UNKNOWN <= n_characters:
            return cls()
        counts[ord("\n")] = n_characters + 2  # always there: prompts begin with it
        found = np.flatnonzero(counts > 1)
        order = np.argsort(-counts[found], kind="stable")[: vocab_size and vocab_size - 1]
        tokenizer = cls(map(chr, np.sort(found[order])))
        why = f"for gpt-burn's 103 leave out {Unknown(n_unknown, n_characters).share}"
        why = "as --vocab-size asks" if vocab_size else why
        tokenizer.reason = f"the vocabulary is its own {len(order)} characters, {why}"
        return tokenizer

    def encode(self, text: str, unknown: Unknown | None = None) -> np.ndarray:
        points = code_points(text)
        ids = self.ids.take(points, mode="clip")
        if unknown is not None:
            lacking, counts = np.unique(points[ids == self.unknown], return_counts=True)
            counts = dict(zip(map(chr, lacking.tolist()), counts.tolist(), strict=True))
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


VOWELS = "aeiouäöü"
# Unicode's White_Space, as in Rust; `str.isspace` is also true of U+001C to U+001F.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
WHITE_SPACE += "".join(map(chr, range(0x2000, 0x200B)))
SEPARATORS = frozenset(WHITE_SPACE + string.punctuation)


class SimpleVowelTokenizer(Tokenizer):
    """Words cut before vowels into something like syllables; white space and punctuation alone.

    Knows the `vocab_size - 1` most frequent of the given tokens (all, if they are fewer), with ids
    in sorted order. Of equally frequent tokens it prefers the first in that order. `tokens` may
    also map tokens to their counts.
    """

    name = "vowel"
    default_vocab_size = 2000
    names_learned = False  # as in earlier versions, whose ids are kept

    def __init__(self, tokens: Iterable[str] | Mapping[str, int], vocab_size: int = sys.maxsize):
        if vocab_size < 1:
            raise UserError("the vocabulary size must be 1 or more: unknown tokens take one id")
        known = sorted(most_frequent(Counter(tokens), vocab_size - 1))
        if CATCH_ALL in known:  # no text has it: `<` is a token by itself
            raise UserError(f"{CATCH_ALL} stands for unknown tokens and cannot be one")
        self.tokens = [token.encode() for token in known] + [b""]
        self.ids = {token: id for id, token in enumerate(self.tokens[:-1])}
        # For numpy's binary search: short tokens by key, and a key above all, which no token has.
        short = [token for token in self.ids if 0 < len(token) < 8]
        keys = token_keys(b"".join(short), np.cumsum([0, *map(len, short)]))
        keys = np.append(keys, ~np.uint64(0))
        ids = np.array([*map(self.ids.get, short), self.unknown], self.dtype)
        order = np.argsort(keys)
        self.keys, self.key_ids = keys[order], ids[order]

    @staticmethod
    def tokenize(text: str) -> list[str]:
        """The tokens of a text; joined, they are the text.

        A token starts at each separator, after each separator, and at each vowel more than 3 UTF-8
        bytes after the start of the token before.
        """
        return list(map(as_text, VowelTokens(text).at(...)))

    @classmethod
    def train(cls, chunks: Iterable[str], vocab_size: int) -> "SimpleVowelTokenizer":
        counts = Counter()
        for text in cls.whole_tokens(chunks):
            VowelTokens(text).count(counts)
        return cls({as_text(token): count for token, count in counts.items()}, vocab_size)

    def encode(self, text: str, unknown: Unknown | None = None) -> np.ndarray:
        tokens = VowelTokens(text)
        places = np.searchsorted(self.keys, tokens.keys)
        ids = self.key_ids[places]
        ids[self.keys[places] != tokens.keys] = self.unknown
        long = tokens.at(tokens.is_long)
        ids[tokens.is_long] = [self.ids.get(token, self.unknown) for token in long]
        if unknown is not None:
            tokens.count(counts := Counter(), ids == self.unknown)
            unknown.add(len(text), {as_text(token): count for token, count in counts.items()})
        return ids

    @staticmethod
    def boundary(text: str) -> int:
        separators = (i for i in range(len(text) - 1, 0, -1) if text[i] in SEPARATORS)
        return next(separators, 0)


class VowelTokens:
    """The tokens of a text, as numpy finds them: `offsets` of their starts and of the end in
    `data`, the text's UTF-8, (n + 1,); `keys`, (n,), and `is_long` where a token has none."""

    def __init__(self, text: str):
        self.data = text.encode("utf-8", "surrogatepass")
        self.offsets = token_offsets(text, self.data)
        self.keys = token_keys(self.data, self.offsets)
        self.is_long = self.keys == 0

    def at(self, index: object) -> list[bytes]:
        """Some of the tokens, by any index of an array (n,)."""
        starts, ends = self.offsets[:-1][index].tolist(), self.offsets[1:][index].tolist()
        return [self.data[start:end] for start, end in zip(starts, ends, strict=True)]

    def count(self, counts: Counter[bytes], mask: np.ndarray | bool = True) -> None:
        """Adds the tokens under a mask (n,) to `counts`."""
        counts.update(self.at(mask & self.is_long))
        keys, repeats = np.unique(self.keys[mask & ~self.is_long], return_counts=True)
        for key, repeat in zip(keys.tolist(), repeats.tolist(), strict=True):
            packed = key.to_bytes(8, "little")
            counts[packed[-packed[0] :]] += repeat


def as_text(token: bytes) -> str:
    return token.decode("utf-8", "surrogatepass")


OTHER, VOWEL, SEPARATOR = range(3)
KINDS = np.full(0x3002, OTHER, np.uint8)  # by code point; U+3000 is the last separator
KINDS[[ord(character) for character in VOWELS]] = VOWEL
KINDS[[ord(character) for character in SEPARATORS]] = SEPARATOR
ASCII_KINDS = KINDS[:128].tobytes() + bytes(128)


def token_offsets(text: str, data: bytes) -> np.ndarray:
    """The offsets in `data`, the text's UTF-8, of each token's start, and of the end."""
    # A flag for each byte and for the end, after 3 more.
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
    certain = kinds == SEPARATOR  # tokens start here, whatever precedes
    certain[1:] |= ends[:-1]
    certain[[3, -1]] = True

    # A vowel starts a token unless one of the 3 bytes before does, which in turn depends on earlier
    # bytes. From the supposition that no vowel starts one, rounds over all bytes at once give upper
    # and lower bounds in turn; bytes at which the bounds differ after 4 rounds, as in a long run of
    # vowels, are settled one by one.
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
    """A number for each token: uint64 with its length as the lowest byte, its bytes as the highest.

    0 for tokens of more than 7 bytes, which do not fit.
    """
    # The 8 bytes from each offset on, as one number.
    windows = np.ndarray(len(data) + 1, "<u8", data + bytes(8), strides=(1,))[offsets[:-1]]
    lengths = np.diff(offsets).astype(np.uint64)
    lengths *= lengths < 8
    return (windows << (64 - 8 * lengths)) + lengths  # numpy shifts by 64 to 0


# GPT-2's files write each byte as a character: visible ones of Latin-1 as themselves, the others as
# the characters from U+0100 on.
VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
INVISIBLE = map(chr, range(0x100, 0x200))
BYTES = "".join(chr(byte) if byte in VISIBLE else next(INVISIBLE) for byte in range(256))
BYTE_OF = {character: byte for byte, character in enumerate(BYTES)}


def bytes_of(token: str) -> bytes:
    """The bytes of a token in GPT-2's files; UserError for another character."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError as error:
        raise UserError(f"{error} stands for no byte") from None


class BytePairTokenizer(Tokenizer):
    """GPT-2's byte pair encoding (Radford et al., 2019), by the package tiktoken.

    `vocab` maps tokens to ids, `merges` lists the pairs of tokens that are joined, by rank, both as
    Hugging Face writes them: a character for each byte. `added` maps tokens that are found in a
    text by their spelling to ids; `vocab` may hold some of them. UserError if these do not fit
    together, and without tiktoken.
    """

    name, unknown = "bpe", None
    default_vocab_size = 4096
    max_learned_bytes = 64 << 20
    role_files = ("special_tokens_map.json", "tokenizer_config.json")  # the padding token, say
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
        # tiktoken joins the neighbours of the lowest rank first.
        ranked = list(dict.fromkeys([*BYTES, *map("".join, merges)]))
        if missing := [token for token in ranked if vocab.get(token, self.end) == self.end]:
            raise UserError(f"it lacks the token {missing[0]!r:.60}")
        unranked = [token for token in vocab if token not in spelled]
        in_bytes = {token: bytes_of(token) for token in dict.fromkeys([*ranked, *unranked])}
        self.tokens = [b""] * len(ids)
        for token, id in ids.items():
            if id != self.end:  # the end of a document is no part of its text
                self.tokens[id] = token.encode() if token in spelled else in_bytes[token]
        self.ids = np.array([vocab[token] for token in ranked], self.dtype)  # by rank
        ranks = {in_bytes[token]: rank for rank, token in enumerate(ranked)}
        try:
            import tiktoken
        except ImportError:
            raise UserError("byte pairs need the package tiktoken: pip install '.[bpe]'") from None
        self.encoding = tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def train(cls, chunks: Iterable[str], vocab_size: int) -> "BytePairTokenizer":
        """Learns the 256 bytes, the most frequent pairs of the text, and <|endoftext|>."""
        if vocab_size <= len(BYTES):
            raise UserError("the vocabulary size must be 257 or more: bytes, and an end of text")
        texts = cls.whole_tokens(chunks)
        parts = [part for text in texts for part in text.split(cls.end_of_text)]
        merges = learned_merges(parts, cls.pattern, vocab_size - 1)
        tokens = dict.fromkeys([*BYTES, *map("".join, merges), cls.end_of_text])
        return cls({token: id for id, token in enumerate(tokens)}, merges)

    def digest(self) -> str:
        return super().digest(self.merges, *[sorted(self.specials.items())] * bool(self.specials))

    def encode_chunks(self, chunks: Iterable[str], unknown: Unknown) -> Iterator[np.ndarray]:
        """Encodes on all cores: tiktoken releases the interpreter's lock."""
        with ThreadPoolExecutor(n := n_threads()) as threads:
            texts = self.with_whole_specials(self.whole_tokens(chunks))
            while batch := list(islice(texts, 4 * n)):
                yield from threads.map(self.encode, batch)

    def with_whole_specials(self, texts: Iterable[str]) -> Iterator[str]:
        """Joins chunks of a text between which a special token's spelling may be cut."""
        beginnings = tuple({token[:n] for token in self.specials for n in range(1, len(token))})
        joined = ""
        for text in texts:
            joined += text
            if not joined.endswith(beginnings):
                yield joined
                joined = ""
        yield joined

    def encode(self, text: str, unknown: Unknown | None = None) -> np.ndarray:
        """The ids of a text, in which `specials` are tokens; where two begin, the longer one, as at
        Hugging Face."""
        text = text.encode(errors="replace").decode()  # half a surrogate pair becomes a "?"
        by_length = sorted(self.specials, key=len, reverse=True)
        pattern = f"({'|'.join(map(re.escape, by_length))})"
        pieces = re.split(pattern, text) if by_length else [text]
        pieces[::2] = [self.ids[self.encoding.encode_to_numpy(piece)] for piece in pieces[::2]]
        pieces[1::2] = [np.array([self.specials[piece]], self.dtype) for piece in pieces[1::2]]
        return np.concatenate(pieces)

    @classmethod
    def boundary(cls, text: str) -> int:
        """No token continues where white space begins, nor where punctuation follows letters, for
        texts without spaces."""
        indices = range(len(text) - 1, 0, -1)
        spaces = (i for i in indices if text[i] in WHITE_SPACE and text[i - 1] not in WHITE_SPACE)
        ends = (i for i in indices if text[i] in cls.punctuation and text[i - 1].isalpha())
        return next(spaces, 0) or next(ends, 0)

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
        as `save` writes them. UserError if they are damaged or of another kind of tokenizer."""
        roles = read_objects(folder, cls.role_files)
        settings = {name: value for file in roles.values() for name, value in file.items()}
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
        tokenizer.read_roles(folder, [] if pad is None else [pad])
        return tokenizer

    def read_roles(self, folder: Path, pads: list[int]) -> None:
        """Sets `ends`, as transformers does: from `generation_config.json`, or else `config.json`;
        and `padding`: `pads` and the ids in both files, but for ids with another use."""
        ends, ids = self.ends, range(len(self.tokens))
        for name, config in read_objects(folder, ("config.json", "generation_config.json")).items():
            with reading(folder / name, "config"):
                ends = ids_named(config, "eos_token_id", ends if name == "config.json" else ())
                pads = [*pads, *ids_named(config, "pad_token_id", ())]
        self.ends = tuple(sorted(set(ends).intersection(ids)))
        used = {self.end, *self.ends, *self.ids.tolist()}
        self.padding = tuple(sorted(set(pads).intersection(ids) - used))


# Runs in another process, for this file hides Hugging Face's package of the same name. A script
# without spaces has words as long as sentences: they are cut, lest whole sentences become tokens.
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
    """The pairs to join by Hugging Face's trainer, `vocab_size` together with the bytes; UserError
    without its package."""
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


TOKENIZERS = {kind.name: kind for kind in (CharTokenizer, SimpleVowelTokenizer, BytePairTokenizer)}
FILES = [file for kind in TOKENIZERS.values() for file in kind.files]
DEFAULT = CharTokenizer.name  # of a config that names none, as gpt-burn's


def load(name: str, folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder, by the name in its config; UserError for another name."""
    if name not in TOKENIZERS:
        *names, last = map(repr, TOKENIZERS)
        raise UserError(f"unknown tokenizer {name!r}: there are {', '.join(names)} and {last}")
    return TOKENIZERS[name].load(folder)


@contextlib.contextmanager
def reading(path: Path, kind: str = "vocabulary") -> Iterator[None]:
    """Turns errors into a UserError of one line with the file's name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a {kind}: {error!s:.200}") from error


CATCH_ALL = "<?>"  # `unknown` in a list of tokens


def read_tokens(path: Path) -> list[str]:
    """The known tokens of a file, as `Tokenizer.save` or gpt-burn writes it."""
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
    position = 0

    def read_bytes(n: int) -> bytes:
        nonlocal position
        position += n
        if position > len(data):
            raise UserError("it ends too early")
        return data[position - n : position]

    def read_number() -> int:
        return int.from_bytes(read_bytes(8), "little")

    def read_string() -> str:
        return read_bytes(read_number()).decode()

    ids = {read_string(): read_number() for _ in range(read_number())}
    tokens = {read_number(): read_string() for _ in range(read_number())}
    if position < len(data) or ids != {token: id for id, token in tokens.items()}:
        raise UserError("its two halves do not agree")
    if sorted(tokens) != list(range(len(tokens))):
        raise UserError("its ids are not 0, 1, 2, ...")
    return [tokens[id] for id in range(len(tokens))]


MAX_VOCABULARY_BYTES = 16 << 20  # GPT-2's has 1 MB
# Allowed values of the settings that decide the ids of a text, the default first, in the parts of
# GPT-2's tokenizer.json and in tokenizer_config.json.
SETTINGS = {
    "model": {
        "type": ("BPE",),
        "dropout": (None, 0),
        "ignore_merges": (False,),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
    },
    "normalizer": {"type": (None,)},
    "pre_tokenizer": {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)},
    "post_processor": {"type": (None, "ByteLevel", "TemplateProcessing"), "special_tokens": ({},)},
    "added token": {"lstrip": (False,), "rstrip": (False,), "single_word": (False,)},
    "tokenizer_config.json": {"add_prefix_space": (False, None), "add_bos_token": (False, None)},
}
BytePairs = tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]  # vocab, merges, added


def read_tokenizer_json(path: Path) -> BytePairs:
    """The arguments of BytePairTokenizer in one file of Hugging Face's package tokenizers."""
    content = read_objects(path.parent, [path.name], "vocabulary")[path.name]
    with reading(path):
        for name in ("model", "normalizer", "pre_tokenizer", "post_processor"):
            part = content.get(name)
            check_settings(name, {"type": None} if part is None else part)
        model, tokens = content["model"], content.get("added_tokens") or []
        tokens = tokens if isinstance(tokens, list) else [tokens]
        for token in tokens:
            check_settings("added token", token)
        added = ids_in({spelling(token): token.get("id") for token in tokens})
        return ids_in(model.get("vocab")), pairs_in(model.get("merges")), added


def read_vocab_json(path: Path) -> BytePairs:
    """The arguments of BytePairTokenizer in a vocab.json and the lists beside it."""
    merges_path, added_path = path.with_name("merges.txt"), path.with_name("added_tokens.json")
    with reading(merges_path):
        lines = read_text(merges_path).split("\n")
        merges = pairs_in([line for line in lines if line[:8] not in ("", "#version")])
    with reading(added_path):
        added = ids_in(json.loads(read_text(added_path))) if added_path.is_file() else {}
    with reading(path):
        return ids_in(json.loads(read_text(path))), merges, added


def read_objects(folder: Path, names: Iterable[str], kind: str = "config") -> dict[str, dict]:
    """The JSON objects in the files of these names that a folder has."""
    objects = {}
    for path in map(folder.joinpath, names):
        with reading(path, kind):
            if path.is_file():
                objects[path.name] = json.loads(read_text(path))
                if not isinstance(objects[path.name], dict):
                    raise UserError("it is not a JSON object")
    return objects


def read_text(path: Path) -> str:
    if path.stat().st_size > MAX_VOCABULARY_BYTES:
        raise UserError("it is far too large")
    return path.read_text(encoding="utf-8-sig")


def check_settings(name: str, part: object) -> None:
    """UserError unless a part of a tokenizer has an allowed value for each of its SETTINGS."""
    if not isinstance(part, dict):
        raise UserError(f"its {name} is not a JSON object")
    for setting, values in SETTINGS[name].items():
        if (value := part.get(setting, values[0])) not in values:
            raise UserError(f"its {name} has the {setting} {value!r:.60}, not {values[0]!r}")


def spelling(token: object) -> str:
    """The text of a token, written as a string or as an object with a `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def ids_in(vocab: object) -> dict[str, int]:
    is_map = isinstance(vocab, dict) and "" not in vocab
    if not is_map or any(type(id) is not int for id in vocab.values()):
        raise UserError("it is no map of tokens to ids")
    return vocab


def pairs_in(merges: object) -> list[tuple[str, str]]:
    """Accepts [["a", "b"]] and ["a b"]."""
    pairs = merges if isinstance(merges, list) else [merges]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
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


# Names in Hugging Face's package tokenizers, for programs in this folder that import it.
HUGGING_FACE_NAMES = {
    *("AddedToken", "Encoding", "NormalizedString", "PreTokenizedString", "Regex", "Token"),
    *("decoders", "implementations", "models", "normalizers", "pre_tokenizers", "processors"),
    *("trainers", "ByteLevelBPETokenizer", "CharBPETokenizer", "BertWordPieceTokenizer"),
    *("SentencePieceBPETokenizer", "SentencePieceUnigramTokenizer"),
}


def __getattr__(name: str):
    if name in HUGGING_FACE_NAMES:
        raise ImportError(
            f"{__file__} is not Hugging Face's package tokenizers, which has {name}: import that, "
            "or transformers, in a program outside of this folder"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
