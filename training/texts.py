"""Texts as people have them: files, compressed or not, folders of them, and standard input."""

import importlib
import io
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from backend.errors import UserError
from tokenizers import NotUTF8
from training.settings import CORPUS

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}  # by suffix, Python's own modules
STANDARD_INPUT = Path("-")
CHUNK = 1 << 16
N_PARTS = 16  # of a file, whose checksum tells it from others of its size and time


@dataclass(frozen=True)
class Text:
    name: str
    open: Callable[[], BinaryIO]  # its bytes, as they are stored
    is_stream: bool = False  # which comes once

    def facts(self) -> list:
        """What tells it from another text, without reading all of it."""
        with self.open() as file:
            size, checksum = file.seek(0, io.SEEK_END), 0
            for start in (*range(0, size, max(CHUNK, size // N_PARTS)), max(0, size - CHUNK)):
                file.seek(start)
                checksum = zlib.crc32(file.read(CHUNK), checksum)
            is_file = isinstance(file, io.BufferedReader)
            time = os.fstat(file.fileno()).st_mtime_ns if is_file else 0
        return [os.path.abspath(self.name), size, time, checksum]


class Texts:
    """Several texts, one after the other, as one file that can be read again from its start.

    Each path is a file, plain or compressed as its suffix says; a folder, for all `.txt` below it
    that are not hidden, in sorted order; a pipe; or `-`, standard input. ValueError for others.
    """

    def __init__(self, paths: Sequence[Path], flag: str = "--text-corpus"):
        """`flag` is how a user names them."""
        self.texts = [text for path in paths for text in texts_of(path, flag)]
        self.is_repeatable = not any(text.is_stream for text in self.texts)
        self.facts = [text.facts() for text in self.texts]  # as they are now
        self.names = [text.name for text in self.texts]
        others = f" and {len(self.names) - 1} more" if self.names[1:] else ""
        self.name = self.names[0] + others
        self.rewind()

    def rewind(self, bar: tqdm | None = None) -> None:
        """To the start; the bar is told how many bytes, as they are stored, have been read."""
        self.bar, self.starts, self.n_read = bar, [], 0
        self.chunks, self.chunk = self._chunks(), b""

    @property
    def n_stored(self) -> int:
        """Bytes."""
        return sum(size for _, size, *_ in self.facts)

    def read(self, size: int) -> bytes:
        """At most so many bytes; no more than none only at the end of the last text."""
        if size and not self.chunk:
            self.chunk = next(self.chunks, b"")
        data, self.chunk = self.chunk[:size], self.chunk[size:]
        self.n_read += len(data)
        return data

    def _chunks(self) -> Iterator[bytes]:
        n_bytes = 0
        for text in self.texts:
            self.starts.append((n_bytes, text.name))
            before = 0
            with uncompressed(text) as (file, stored):
                while chunk := file.read(CHUNK):
                    if self.bar is not None:
                        self.bar.update(stored.tell() - before)
                        before = stored.tell()
                    n_bytes += len(chunk)
                    yield chunk

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """NotUTF8 of what was read has the name of the text, and the offset in that."""
        try:
            yield
        except NotUTF8 as error:
            starts = reversed(self.starts)
            start, name = next(start for start in starts if start[0] <= error.offset)
            raise NotUTF8(error.byte, error.offset - start, name) from None


def texts_of(path: Path, flag: str) -> list[Text]:
    if path == CORPUS and not path.exists():
        print(f"{path} is missing: using the text of Python's own help", file=sys.stderr)
        return [Text("Python's own help", python_help)]
    if path == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise UserError(f"{flag} -: standard input is a terminal: pipe a text into it")
        return [Text("standard input", spooled(sys.stdin.buffer), is_stream=True)]
    if path.is_fifo():
        with path.open("rb") as stream:
            return [Text(str(path), spooled(stream), is_stream=True)]
    if path.is_dir():
        found = {file.relative_to(path).parts: file for file in path.rglob("*.txt")}
        shown = [parts for parts in sorted(found) if not any(part[0] == "." for part in parts)]
        if texts := [found[parts] for parts in shown if found[parts].is_file()]:
            return [file_text(file) for file in texts]
        raise UserError(f"there is no .txt in {path}: name a text with {flag}")
    if not path.is_file():
        raise UserError(f"there is no {path}: name a text with {flag}")
    return [file_text(path)]


def file_text(path: Path) -> Text:
    return Text(str(path), lambda: path.open("rb"))


def python_help() -> BinaryIO:
    from pydoc_data.topics import topics

    return io.BytesIO("\n\n".join(topics[name] for name in sorted(topics)).encode())


def spooled(stream: BinaryIO) -> Callable[[], BinaryIO]:
    """What comes once, in a file without a name, for it may be read twice."""
    whole = tempfile.TemporaryFile()  # noqa: SIM115 - as long as there is the function
    shutil.copyfileobj(stream, whole)
    whole.flush()

    def opened() -> BinaryIO:
        file = open(whole.fileno(), "rb", closefd=False)  # noqa: SIM115 - for who opens it
        file.seek(0)
        return file

    return opened


@contextmanager
def uncompressed(text: Text) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file to read, and the one that is stored; ValueError for one that is damaged."""
    module = COMPRESSED.get(Path(text.name).suffix.lower())
    with text.open() as stored:
        if module is None:
            yield stored, stored
            return
        try:
            with importlib.import_module(module).open(stored, "rb") as file:
                yield file, stored
        except Exception as error:  # each module has its own, and a Python may lack a module
            raise UserError(f"{text.name} can't be read: {error}") from error
