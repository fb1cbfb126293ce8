"""Texts as people have them: files, compressed or not, folders of them, and standard input."""

import codecs
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from backend.errors import UserError
from tokenizers import NotUTF8

CORPUS = Path(".data/corpus.txt")  # unless another is named
# by suffix, Python's own module, and the program
COMPRESSED = {".gz": ("gzip", "gzip"), ".bz2": ("bz2", "bzip2"), ".xz": ("lzma", "xz")}
STANDARD_INPUT = Path("-")
WHAT_IS_A_TEXT = (
    "a text is a file in UTF-8, or .jsonl, also compressed with the ending .gz, .bz2 or .xz, a "
    "folder of such .txt and .jsonl, or - for standard input"
)
BYTE_ORDER_MARKS = {  # UTF-32's before UTF-16's, with which it begins
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
WITHOUT_MARK = {  # by the first bytes, of which in these encodings a Latin letter has one alone
    rb"([^\0]\0){8}": "UTF-16LE",
    rb"(\0[^\0]){8}": "UTF-16BE",
    rb"([^\0]\0\0\0){4}": "UTF-32LE",
    rb"(\0\0\0[^\0]){4}": "UTF-32BE",
}
OTHER_KINDS = {  # by the first bytes
    rb"PK(\x03\x04|\x05\x06)": "a zip archive, as .docx, .odt and .epub are",
    rb".{257}ustar": "a tar archive",
    rb"%PDF-": "a PDF",
    rb"\xd0\xcf\x11\xe0": "a document of an old Office",
    rb"\x1f\x8b": "compressed by gzip",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2",
    rb"\xfd7zXZ\x00": "compressed by xz",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd",
    rb"7z\xbc\xaf": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
}
N_NAMED = 3  # of what is left out
CHUNK = 1 << 16
N_PARTS = 16  # of a file, whose checksum tells it from others of its size and time


@dataclass(frozen=True)
class Text:
    name: str
    open: Callable[[], BinaryIO]  # its bytes, as they are stored
    is_stream: bool = False  # which can't be read again by another training

    @property
    def is_jsonl(self) -> bool:
        return content_of(Path(self.name)).suffix.lower() == ".jsonl"

    @functools.cached_property
    def beginning(self) -> bytes:
        """Its first bytes, by which its kind is known."""
        with uncompressed(self) as (file, _):
            return file.read(512)

    @property
    def mark(self) -> bytes:
        """The byte order mark that it begins with, if any."""
        return next(filter(self.beginning.startswith, BYTE_ORDER_MARKS), b"")

    def facts(self) -> list:
        """Name, size, time and a checksum of parts, which tell a text from another unread; and what
        earlier versions did not look at."""
        with self.open() as file:
            size, checksum = file.seek(0, io.SEEK_END), 0
            for start in (*range(0, size, max(CHUNK, size // N_PARTS)), max(0, size - CHUNK)):
                file.seek(start)
                checksum = zlib.crc32(file.read(CHUNK), checksum)
            is_file = isinstance(file, io.BufferedReader)
            time = os.fstat(file.fileno()).st_mtime_ns if is_file else 0
        read_as = [*["jsonl"] * self.is_jsonl, *[self.mark.hex()] * bool(self.mark)]
        return [os.path.abspath(self.name), size, time, checksum, *read_as]

    def check(self) -> None:
        """UserError for a file of another kind, also a compressed one."""
        for pattern, kind in OTHER_KINDS.items():
            if re.match(pattern, self.beginning, re.DOTALL):
                raise UserError(f"{self.name} is {kind}: {WHAT_IS_A_TEXT}")
        for pattern, encoding in WITHOUT_MARK.items():
            if re.match(pattern, self.beginning, re.DOTALL):
                convert = self.conversion(encoding)
                raise UserError(f"{self.name} is {encoding} without a byte order mark; {convert}")

    def conversion(self, encoding: str = "WINDOWS-1252") -> str:
        """How to convert it to UTF-8, as the command that would if that is its encoding."""
        command = f"iconv -f {encoding} -t UTF-8"
        path, content = Path(self.name), content_of(Path(self.name))
        if path.is_file():
            target = content.with_name(f"{content.stem}-utf8{content.suffix}")
            source, target = shlex.quote(str(path)), shlex.quote(str(target))
            if content == path:
                command = f"{command} {source} > {target}"
            else:
                _, program = COMPRESSED[path.suffix.lower()]
                command = f"{program} -dc {source} | {command} > {target}"
        return f"convert it, here from {encoding}: {command}"


class Texts:
    """Texts, one after the other, as one file that can be read again from its start.

    A path is a file, plain or compressed as its suffix says; a folder, for all `.txt` and `.jsonl`
    below it, also compressed, that are not hidden, in sorted order; a pipe; or `-`, standard input.
    UserError for other paths. A line says what of a folder is left out, and that texts are joined.

    What is read is UTF-8 without byte order marks. A line of a `.jsonl` is a document, of which its
    `text` is read; so is each of several other texts. `end` follows each document; where it is
    empty, a line break follows that of a `.jsonl`, and nothing another.
    """

    end = b""

    def __init__(self, paths: Sequence[Path], flag: str = "--text-corpus"):
        """`flag` is how a user names them."""
        self.texts = [text for path in paths for text in texts_of(path, flag)]
        self.is_repeatable = not any(text.is_stream for text in self.texts)
        self.facts = [text.facts() for text in self.texts]  # as they are now
        self.n_stored = sum(size for _, size, *_ in self.facts)  # bytes
        self.names = [text.name for text in self.texts]
        others = f" and {len(self.names) - 1} more" if self.names[1:] else ""
        self.name = self.names[0] + others
        for text in self.texts:
            text.check()
        if others:
            print(f"{self.name} are joined into one text", file=sys.stderr)
        self.rewind()

    def rewind(self, bar: tqdm | None = None) -> None:
        """Goes to the start; `bar` shows the bytes read from then on, as they are stored."""
        self.bar, self.starts, self.n_read = bar, [], 0  # starts: of the first byte that is stored
        self.chunks, self.chunk = self._chunks(), b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none only at the end of the last text."""
        if size and not self.chunk:
            self.chunk = next(self.chunks, b"")
        data, self.chunk = self.chunk[:size], self.chunk[size:]
        self.n_read += len(data)
        return data

    def _chunks(self) -> Iterator[bytes]:
        n_bytes = 0
        for text in self.texts:
            self.starts.append((n_bytes - len(text.mark), text))
            before = 0
            with uncompressed(text) as (file, stored):
                chunks = in_utf8(file, text)
                if text.is_jsonl:
                    chunks = documents(chunks, text, self.end or b"\n")
                elif self.texts[1:]:
                    chunks = chain(chunks, [self.end])
                for chunk in filter(None, chunks):
                    if self.bar is not None:
                        self.bar.update(stored.tell() - before)
                        before = stored.tell()
                    n_bytes += len(chunk)
                    yield chunk

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Has NotUTF8 name the text that is not, and the offset in it."""
        try:
            yield
        except NotUTF8 as error:
            starts = reversed(self.starts)
            start, text = next(start for start in starts if start[0] <= error.offset)
            place = error.byte, error.offset - start
            raise NotUTF8(*place, text.name, text.conversion()) from None


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
        return [file_text(file) for file in files_below(path, flag)]
    if not path.is_file():
        raise UserError(f"there is no {path}: name a text with {flag}")
    return [file_text(path)]


def files_below(folder: Path, flag: str) -> list[Path]:
    """All `.txt` and `.jsonl` below a folder, also compressed, that are not hidden, in sorted
    order; says what else there is."""
    errors, found, others = [], [], []
    for place, folders, names in os.walk(folder, onerror=errors.append):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for file in (Path(place, name) for name in (*names, *links)):  # no link is walked into
            is_hidden = any(part[0] == "." for part in file.relative_to(folder).parts)
            is_text = content_of(file).suffix.lower() in (".txt", ".jsonl")
            if is_text and not is_hidden and os.path.isfile(file):
                found.append(file)
            elif is_text or not is_hidden:
                others.append(str(file))
    closed = [f"{error.filename} ({error.strerror})" for error in errors]
    if not found:
        beside = f", and no way into {', '.join(closed)}" if closed else ""
        reason = f"there is no .txt or .jsonl in {folder}{beside}"
        raise UserError(f"{reason}: name a text with {flag}; {WHAT_IS_A_TEXT}")
    if left_out := closed + sorted(others)[:N_NAMED]:
        more = f" and {len(others) - N_NAMED} more" if others[N_NAMED:] else ""
        rule = "a folder stands for its .txt and .jsonl, also compressed, that are not hidden"
        print(f"warning: left out: {', '.join(left_out)}{more}; {rule}", file=sys.stderr)
    return sorted(found)


def file_text(path: Path) -> Text:
    return Text(str(path), lambda: path.open("rb"))


def python_help() -> BinaryIO:
    from pydoc_data.topics import topics

    return io.BytesIO("\n\n".join(topics[name] for name in sorted(topics)).encode())


def spooled(stream: BinaryIO) -> Callable[[], BinaryIO]:
    """Copies a stream to a file without a name, which can be read again and again."""
    whole = tempfile.TemporaryFile()  # noqa: SIM115 - as long as there is the function
    shutil.copyfileobj(stream, whole)
    whole.flush()

    def opened() -> BinaryIO:
        file = open(whole.fileno(), "rb", closefd=False)  # noqa: SIM115 - for who opens it
        file.seek(0)  # where the one before has left it
        return file

    return opened


def content_of(path: Path) -> Path:
    """A name without the suffix of a compressed file."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


@contextmanager
def uncompressed(text: Text) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file to read, and the file as it is stored; UserError for a damaged one."""
    module, _ = COMPRESSED.get(Path(text.name).suffix.lower(), (None, None))
    with text.open() as stored:
        if module is None:
            yield stored, stored
            return
        try:
            with importlib.import_module(module).open(stored, "rb") as file:
                yield file, stored
        except UserError:
            raise
        except Exception as error:  # each module has its own, and a Python may lack a module
            raise UserError(f"{text.name} can't be read: {error}") from error


def in_utf8(file: BinaryIO, text: Text) -> Iterator[bytes]:
    """What a file holds after its byte order mark, in UTF-8 if that says which encoding it has."""
    encoding = BYTE_ORDER_MARKS.get(text.mark, "utf-8")
    position = len(file.read(len(text.mark)))
    chunks = iter(lambda: file.read(CHUNK), b"")
    if encoding == "utf-8":  # which the tokenizer looks through
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    for chunk in chain(chunks, [b""]):
        n_waiting = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk, final=not chunk).encode()
        except UnicodeDecodeError as error:
            offset, encoding = position - n_waiting + error.start, encoding.upper()
            raise UserError(
                f"{text.name} is not {encoding}, as its byte order mark has it: {error.reason} at "
                f"offset {offset}"
            ) from None
        position += len(chunk)


def documents(chunks: Iterable[bytes], text: Text, end: bytes) -> Iterator[bytes]:
    """The `text` of each line, an object of JSON, with `end` after it, in chunks; half a surrogate
    pair becomes a "?". UserError for another line."""
    ready, decode = bytearray(), json.JSONDecoder().raw_decode  # json.loads takes twice as long
    for number, line in enumerate(lines(chunks), 1):
        if not (line := line.strip()):
            continue
        try:
            document, length = decode(line := line.decode())
            if length < len(line):
                raise ValueError("there is more")
            ready += document["text"].encode(errors="replace") + end
        except UnicodeDecodeError as error:
            place, name = (error.object[error.start], error.start), f"line {number} of {text.name}"
            raise UserError(str(NotUTF8(*place, name, text.conversion()))) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            reason = f"no JSON object with a string named text: {line[:60]}"
            raise UserError(f"line {number} of {text.name} is {reason}") from None
        while len(ready) >= CHUNK:
            yield bytes(ready[:CHUNK])
            del ready[:CHUNK]
    yield bytes(ready)


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    begun = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        for line in others:
            yield b"".join(begun)
            begun = [line]
    yield b"".join(begun)
