"""The ids of texts: encoded once, into a file that is mapped and kept for the next training."""

import contextlib
import functools
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tokenizers
from backend import files, machine
from backend.errors import UserError
from data.texts import Texts
from tokenizers import Tokenizer, Unknown

DEFAULT_MEGA_BYTES = 999  # gpt-burn's
FOLDER = Path(".data/ids")
KEPT_BYTES = 4 << 30
IDS, FACTS = "ids", "corpus.json"
KEPT_NAME = re.compile(r".+-[0-9a-f]{16}")  # of a folder of ids in FOLDER
A_DAY = 24 * 60 * 60  # in seconds
N_AT_ONCE = 256  # windows to cut before what they touched of a file goes out of memory
BAR_FORMAT = "{desc} {bar} {n_fmt}B/{total_fmt}B"


@dataclass
class Corpus:
    """Texts as ids, nine tenths for training, the last one for validation.

    They are mapped from the file `stored`, and in memory only as far as they are looked at: `ids`
    is None where another training has dropped that file. Where none can be written, `stored` is the
    ids. A file in a `temporary` folder goes with it: by `unlink`, or with this object.
    """

    name: str
    tokenizer: Tokenizer
    checksum: int  # of all ids
    stored: Path | np.ndarray
    temporary: tempfile.TemporaryDirectory | None = None

    def __post_init__(self):
        self.ids, self.mapped = self.stored, None
        if isinstance(self.stored, Path):
            self.ids = None
            with contextlib.suppress(FileNotFoundError), self.stored.open("rb") as file:
                if os.fstat(file.fileno()).st_size:  # nothing can't be mapped
                    self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.ids = np.frombuffer(self.mapped or b"", self.tokenizer.dtype)
        self.n_training = 0 if self.ids is None else len(self.ids) * 9 // 10

    def __reduce__(self):
        """For another process of this machine, which maps the file itself."""
        return Corpus, (self.name, self.tokenizer, self.checksum, self.stored)

    def unlink(self) -> None:
        """Removes a temporary file, which all who have it mapped still read."""
        if self.temporary:
            self.temporary.cleanup()

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """starts (n,) -> the `length` ids from each start on: int32 (n, length)"""
        windows = np.lib.stride_tricks.sliding_window_view(self.ids, length)
        cut = np.empty((len(starts), length), np.int32)
        for first in range(0, len(starts), N_AT_ONCE):
            some = slice(first, first + N_AT_ONCE)
            cut[some] = windows[starts[some]]
            if self.mapped and hasattr(mmap, "MADV_DONTNEED"):
                self.mapped.madvise(mmap.MADV_DONTNEED)
        return cut


def read(
    paths: Sequence[Path],
    n_bytes: int | None,
    tokenizer: Tokenizer | type[Tokenizer],
    vocab_size: int | None,
    keep: bool,
    bar: dict[str, object],
    special: bool = True,
) -> Corpus:
    """The ids of the first `n_bytes` bytes of texts; with None of gpt-burn's 999 MiB, and a line if
    there are more.

    A tokenizer may be given as its class, to learn `vocab_size` tokens, or with None its default. A
    line says what of the texts is not in the vocabulary. With `keep` the ids lie in a folder of
    FOLDER, where the next training on these texts finds them, else in a temporary one, and in
    memory where neither can be written. `bar` is options of tqdm. Unless `special`, the tokenizer's
    special tokens are not looked for, nor put between documents, and go. UserError for texts that
    can't be read.
    """
    vocab_size = vocab_size or tokenizer.default_vocab_size
    return Encoder(Texts(paths), n_bytes, tokenizer, vocab_size, bar, special).corpus(keep)


@dataclass
class Encoder:
    """Texts that are to be ids, and how."""

    texts: Texts
    n_bytes: int | None
    tokenizer: Tokenizer | type[Tokenizer]
    vocab_size: int | None
    bar: dict[str, object]
    special: bool

    @functools.cached_property
    def limit(self) -> int:
        """Bytes."""
        return DEFAULT_MEGA_BYTES << 20 if self.n_bytes is None else self.n_bytes

    def corpus(self, keep: bool) -> Corpus:
        """The ids that an earlier training has kept, or else new ones."""
        is_given = isinstance(self.tokenizer, Tokenizer)
        if is_given:
            self.prepare(self.tokenizer)
        name = [self.tokenizer.name] if self.tokenizer.names_learned else []
        learned = self.folder([self.vocab_size, *name])
        if corpus := self.kept(learned):
            return corpus
        if not is_given:
            with self.reading("counting tokens"):
                self.tokenizer = self.tokenizer.train(self.texts, self.limit, self.vocab_size)
            self.prepare(self.tokenizer)
        given = self.folder(self.tokenizer.digest())
        if corpus := self.kept(given):
            return corpus
        return self.encoded(given if is_given else learned, keep)

    def prepare(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, with special tokens only if the texts have them."""
        if not self.special:
            tokenizer.specials = {}
        return tokenizer

    def folder(self, setting: object) -> Path:
        """Where ids are kept, by the texts and by `setting`: how a tokenizer has learned from them,
        or the digest of one that was given."""
        key = json.dumps([self.texts.names, self.limit, setting]).encode()
        name = re.sub(r"[^\w.-]", "_", Path(self.texts.names[0]).name)
        return FOLDER / f"{name}-{hashlib.sha256(key).hexdigest()[:16]}"

    def encoded(self, folder: Path, keep: bool) -> Corpus:
        """The ids in this folder, in a temporary one or in memory."""
        temporary = None
        is_kept = keep and self.texts.is_repeatable
        try:
            if not is_kept and os.name == "nt":  # where no file that is mapped can be removed
                return self.in_memory()
            if not is_kept:
                temporary = tempfile.TemporaryDirectory()
                folder = Path(temporary.name) / folder.name
            corpus = self.written(folder)
            corpus.temporary = temporary
            if is_kept:
                drop_oldest()
            return corpus
        except OSError as error:
            reason = f"{error.strerror or error}: ids stay in memory"
            print(f"warning: {folder}: {reason}", file=sys.stderr)
            return self.in_memory()

    def kept(self, folder: Path) -> Corpus | None:
        """What `written` left there of these very texts, if anything."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            is_complete = kept["n_ids_bytes"] == (folder / IDS).stat().st_size
            if kept["texts"] != self.texts.facts or not is_complete:
                return None
            tokenizer = self.tokenizer
            if isinstance(tokenizer, type):
                tokenizer = self.prepare(tokenizer.load(folder))
            corpus = Corpus(self.texts.name, tokenizer, kept["checksum"], folder / IDS)
            if kept["tokenizer"] != tokenizer.digest() or corpus.ids is None:
                return None
            if "unknown" not in kept:  # as earlier versions kept them
                self.tokenizer = tokenizer
                kept |= self.encode(lambda ids: None)
                files.write_file(folder / FACTS, json.dumps(kept, indent=1).encode())
            self.say(kept)
            with contextlib.suppress(OSError):  # of someone else, say
                os.utime(folder)  # those that are used stay
            return corpus
        return None

    def written(self, folder: Path) -> Corpus:
        """The ids in a new folder, written whole or not at all."""
        with files.new_folder(folder) as new:
            with (new / IDS).open("wb") as file:
                facts = self.encode(file.write)
                facts["n_ids_bytes"] = file.tell()
            self.tokenizer.save(new)
            (new / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            files.sync(*new.iterdir(), new)
            if corpus := self.kept(folder):  # of another training, which began at the same time
                return corpus
            shutil.rmtree(folder, ignore_errors=True)  # of a text as it was before
            os.rename(new, folder)
        self.say(facts)
        return Corpus(self.texts.name, self.tokenizer, facts["checksum"], folder / IDS)

    def in_memory(self) -> Corpus:
        ids, limit = bytearray(), machine.memory() // 2

        def append(data: bytes) -> None:
            if len(ids) > limit:
                raise UserError(f"{self.texts.name} fits neither on the disk nor in memory")
            ids.extend(data)  # grows in place: a list of arrays would be copied to be joined

        facts = self.encode(append)
        self.say(facts)
        stored = np.frombuffer(ids, self.tokenizer.dtype)
        return Corpus(self.texts.name, self.tokenizer, facts["checksum"], stored)

    def encode(self, write: Callable[[bytes], object]) -> dict[str, object]:
        """Passes the ids on, chunk by chunk; what is to be known of them."""
        checksum, unknown = 0, Unknown()
        self.texts.end = self.tokenizer.document_end.encode()
        with self.reading("encoding"):
            for ids in self.tokenizer.encode_file(self.texts, self.limit, unknown):
                write(data := ids.tobytes())
                checksum = zlib.crc32(data, checksum)
        return {
            "texts": self.texts.facts,
            "tokenizer": self.tokenizer.digest(),
            "checksum": checksum,
            "is_cut": self.texts.n_read > self.limit,
            "reason": self.tokenizer.reason,
            "unknown": asdict(unknown) | {"counts": unknown.most_frequent()},
        }

    def say(self, facts: dict[str, object]) -> None:
        """On standard error: what is used of the texts, as which tokens, and what is left out."""
        name = self.texts.name
        if facts["is_cut"] and self.n_bytes is None:
            used = f"only the first {DEFAULT_MEGA_BYTES} MiB are used"
            print(f"{name}: {used}; --n-mega-bytes takes more", file=sys.stderr)
        if facts["reason"]:
            print(f"{name}: {facts['reason']}", file=sys.stderr)
        Unknown(**facts["unknown"]).warn(name, " and left out")

    @contextlib.contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """The texts from their start, with a bar on a terminal; errors name the text."""
        with tqdm(
            total=min(self.texts.n_stored, self.limit),
            desc=what,
            unit_scale=True,
            unit_divisor=1024,
            bar_format=BAR_FORMAT,
            **self.bar,
        ) as bar:
            self.texts.rewind(bar)
            with self.texts.naming_errors():
                yield


def drop_oldest() -> None:
    """Leaves the ids that were used last, KEPT_BYTES of them, and all that is not ours."""
    complete = (facts.parent for facts in FOLDER.glob(f"*/{FACTS}"))
    ours = [folder for folder in complete if KEPT_NAME.fullmatch(folder.name)]
    files.drop_oldest(ours, KEPT_BYTES, remove)
    for unfinished in FOLDER.glob(".gpt-tiny-*"):
        with contextlib.suppress(OSError):
            if time.time() - (unfinished / IDS).stat().st_mtime > A_DAY:  # its training was killed
                remove(unfinished)


def remove(folder: Path) -> None:
    """Removes a folder of ids, not other files in it. Who has the ids mapped still reads them; on
    Windows, which removes no file that is mapped, OSError before anything is removed."""
    for name in (IDS, *tokenizers.FILES, FACTS):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()  # fails where there is anything else in it
