"""The ids of texts: encoded once, into a file that is mapped, and kept for later trainings."""

import contextlib
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
N_AT_ONCE = 256  # windows to cut before the mapped pages that they touched are released
BAR_FORMAT = "{desc} {bar} {n_fmt}B/{total_fmt}B"


@dataclass
class Corpus:
    """Texts as ids, nine tenths for training, the last one for validation.

    `ids` is mapped from the file `stored`, in memory only as far as it is read, and None where
    another training has dropped the file. Where no file can be written, `stored` holds the ids.
    A `temporary` folder is deleted at the end of this object, if not before.
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
                if os.fstat(file.fileno()).st_size:  # an empty file can't be mapped
                    self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.ids = np.frombuffer(self.mapped or b"", self.tokenizer.dtype)
        self.n_training = 0 if self.ids is None else len(self.ids) * 9 // 10

    def __reduce__(self):
        """Pickles the path: another process of this machine maps the file itself."""
        return Corpus, (self.name, self.tokenizer, self.checksum, self.stored)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """starts (n,) -> the `length` ids from each start on: int32 (n, length)"""
        windows = np.lib.stride_tricks.sliding_window_view(self.ids, length)
        cut = np.empty((len(starts), length), np.int32)
        for first in range(0, len(starts), N_AT_ONCE):
            batch = slice(first, first + N_AT_ONCE)
            cut[batch] = windows[starts[batch]]
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
    """The ids of the first `n_bytes` bytes of texts, by default gpt-burn's 999 MiB, with a line on
    stderr if there are more.

    A tokenizer class learns `vocab_size` tokens, by default `default_vocab_size`. A warning names
    tokens outside the vocabulary. With `keep` the ids are written to a folder in FOLDER, where the
    next training on these texts finds them, else to a temporary folder, and stay in memory where
    neither can be written. `bar`: options of tqdm. Unless `special`, special tokens are neither
    found in texts nor put between documents. UserError for texts that can't be read.
    """
    limit = DEFAULT_MEGA_BYTES << 20 if n_bytes is None else n_bytes
    texts, vocab_size = Texts(paths), vocab_size or tokenizer.default_vocab_size
    corpus, facts = Encoder(texts, limit, special, bar).corpus(tokenizer, vocab_size, keep)
    if facts["is_cut"] and n_bytes is None:
        used = f"only the first {DEFAULT_MEGA_BYTES} MiB are used"
        print(f"{texts.name}: {used}; --n-mega-bytes takes more", file=sys.stderr)
    if facts["reason"]:
        print(f"{texts.name}: {facts['reason']}", file=sys.stderr)
    Unknown(**facts["unknown"]).warn(texts.name, " and left out")
    return corpus


@dataclass
class Encoder:
    """Finds kept ids of texts, or encodes the texts; the facts of ids are the content of FACTS."""

    texts: Texts
    limit: int  # bytes
    special: bool
    bar: dict[str, object]

    def corpus(
        self, tokenizer: Tokenizer | type[Tokenizer], vocab_size: int | None, keep: bool
    ) -> tuple[Corpus, dict]:
        """The ids that an earlier training has kept, else new ids; and their facts."""
        is_given = isinstance(tokenizer, Tokenizer)
        name = [tokenizer.name] if tokenizer.names_learned else []
        folder_of_learned = self.folder([vocab_size, *name])
        if found := self.kept(folder_of_learned, tokenizer):
            return found
        if not is_given:
            n_bytes = min(self.limit, tokenizer.max_learned_bytes)
            with self.reading("counting tokens", n_bytes) as chunks:
                tokenizer = tokenizer.train(chunks, vocab_size)
        if not self.special:
            tokenizer.specials = {}
        folder_of_given = self.folder(tokenizer.digest())
        if found := self.kept(folder_of_given, tokenizer):
            return found
        return self.store(tokenizer, folder_of_given if is_given else folder_of_learned, keep)

    def folder(self, setting: object) -> Path:
        """The folder of kept ids for the texts and a setting: how a tokenizer learns from them, or
        the digest of a given tokenizer."""
        key = json.dumps([self.texts.names, self.limit, setting]).encode()
        name = re.sub(r"[^\w.-]", "_", Path(self.texts.names[0]).name)
        return FOLDER / f"{name}-{hashlib.sha256(key).hexdigest()[:16]}"

    def kept(
        self, folder: Path, tokenizer: Tokenizer | type[Tokenizer]
    ) -> tuple[Corpus, dict] | None:
        """The ids in the folder, or None if they are of other texts or of another tokenizer."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            is_complete = facts["n_ids_bytes"] == (folder / IDS).stat().st_size
            if facts["texts"] != self.texts.facts or not is_complete:
                return None
            if isinstance(tokenizer, type):
                tokenizer = tokenizer.load(folder)
            if not self.special:
                tokenizer.specials = {}
            corpus = Corpus(self.texts.name, tokenizer, facts["checksum"], folder / IDS)
            if facts["tokenizer"] != tokenizer.digest() or corpus.ids is None:
                return None
            if not {"is_cut", "reason", "unknown"} <= facts.keys():  # of an earlier version
                facts |= self.encode(tokenizer, lambda ids: None)
                files.write_file(folder / FACTS, json.dumps(facts, indent=1).encode())
            with contextlib.suppress(OSError):  # another user's folder
                os.utime(folder)  # `drop_oldest` drops the least recently used
            return corpus, facts
        return None

    def store(self, tokenizer: Tokenizer, folder: Path, keep: bool) -> tuple[Corpus, dict]:
        """Encodes the texts into this folder, a temporary folder, or memory."""
        temporary, is_kept = None, keep and self.texts.is_repeatable
        try:
            if not is_kept:
                if os.name == "nt":  # where no mapped file can be removed
                    return self.encode_to_memory(tokenizer)
                temporary = tempfile.TemporaryDirectory()
                folder = Path(temporary.name) / folder.name
            corpus, facts = self.encode_to_folder(tokenizer, folder)
        except OSError as error:
            reason = f"{error.strerror or error}: ids stay in memory"
            print(f"warning: {folder}: {reason}", file=sys.stderr)
            return self.encode_to_memory(tokenizer)
        corpus.temporary = temporary
        if is_kept:
            drop_oldest()
        return corpus, facts

    def encode_to_folder(self, tokenizer: Tokenizer, folder: Path) -> tuple[Corpus, dict]:
        """Writes the ids to the folder, whole or not at all."""
        with files.new_folder(folder) as new:
            with (new / IDS).open("wb") as file:
                facts = self.encode(tokenizer, file.write)
                facts["n_ids_bytes"] = file.tell()
            tokenizer.save(new)
            (new / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            files.sync(*new.iterdir(), new)
            if found := self.kept(folder, tokenizer):  # by a training that began at the same time
                return found
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier state of the texts
            os.rename(new, folder)
        return Corpus(self.texts.name, tokenizer, facts["checksum"], folder / IDS), facts

    def encode_to_memory(self, tokenizer: Tokenizer) -> tuple[Corpus, dict]:
        ids, limit = bytearray(), machine.memory() // 2

        def append(data: bytes) -> None:
            if len(ids) > limit:
                raise UserError(f"{self.texts.name} fits neither on the disk nor in memory")
            ids.extend(data)  # grows in place: joining a list of arrays would copy them

        facts = self.encode(tokenizer, append)
        stored = np.frombuffer(ids, tokenizer.dtype)
        return Corpus(self.texts.name, tokenizer, facts["checksum"], stored), facts

    def encode(self, tokenizer: Tokenizer, write: Callable[[bytes], object]) -> dict[str, object]:
        """Writes the ids, chunk by chunk; returns their facts."""
        checksum, unknown = 0, Unknown()
        with self.reading("encoding", self.limit, tokenizer.document_end) as chunks:
            for ids in tokenizer.encode_chunks(chunks, unknown):
                write(data := ids.tobytes())
                checksum = zlib.crc32(data, checksum)
        return {
            "texts": self.texts.facts,
            "tokenizer": tokenizer.digest(),
            "checksum": checksum,
            "is_cut": self.texts.is_cut,
            "reason": tokenizer.reason,
            "unknown": asdict(unknown) | {"counts": unknown.most_frequent()},
        }

    @contextlib.contextmanager
    def reading(self, description: str, n_bytes: int, end: str = "") -> Iterator[Iterator[str]]:
        """Chunks of the texts, with a bar on a terminal."""
        with tqdm(
            total=min(self.texts.n_stored, n_bytes),
            desc=description,
            unit_scale=True,
            unit_divisor=1024,
            bar_format=BAR_FORMAT,
            **self.bar,
        ) as bar:
            yield self.texts.read(n_bytes, end, bar)


def drop_oldest() -> None:
    """Removes the least recently used ids beyond KEPT_BYTES, and those of killed trainings."""
    complete = (facts.parent for facts in FOLDER.glob(f"*/{FACTS}"))
    ours = [folder for folder in complete if KEPT_NAME.fullmatch(folder.name)]
    files.drop_oldest(ours, KEPT_BYTES, remove)
    for unfinished in FOLDER.glob(".gpt-tiny-*"):
        with contextlib.suppress(OSError):
            if time.time() - (unfinished / IDS).stat().st_mtime > A_DAY:  # of a killed training
                remove(unfinished)


def remove(folder: Path) -> None:
    """Removes a folder of ids, but no other files in it. Processes that have mapped the ids still
    read them; Windows removes no mapped file: OSError before anything is removed."""
    for name in (IDS, *tokenizers.FILES, FACTS):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()  # fails where other files are left
