"""Texts to read: files, compressed or not, folders of files, and standard input."""

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
from itertools import chain, zip_longest
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from backend.errors import UserError, not_utf8

CORPUS = Path(".data/corpus.txt")  # the default
STANDARD_INPUT = Path("-")
# by suffix, Python's module and the program
COMPRESSED = {".gz": ("gzip", "gzip"), ".bz2": ("bz2", "bzip2"), ".xz": ("lzma", "xz")}
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
WITHOUT_MARK = {  # by the first bytes: a Latin letter has one byte that is not 0
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
N_NAMED = 3  # files left out of a folder
# bytes read at a time; with more, numpy's arrays are fresh memory from the system at each step,
# which takes up to half of the time of encoding
CHUNK_SIZE = 1 << 16
N_PARTS = 16  # of a file, in its checksum


class Texts:
    """Texts, one after the other, that can be read again and again.

    A path is a file, plain or compressed as its suffix says; a folder, for all `.txt` and `.jsonl`
    below it, also compressed, that are not hidden, in sorted order; a pipe; or `-`, standard input.
    UserError for other paths. A line says which files of a folder are left out, and that texts are
    joined.
    """

    is_cut = False  # whether the last `read` has left bytes after its limit

    def __init__(self, paths: Sequence[Path], flag: str = "--text-corpus"):
        """`flag` names the texts in errors."""
        self.texts = [text for path in paths for text in texts_of(path, flag)]
        self.is_repeatable = not any(text.is_stream for text in self.texts)
        self.facts = [text.facts() for text in self.texts]  # before any text can change
        self.n_stored = sum(size for _, size, *_ in self.facts)  # bytes
        self.names = [text.name for text in self.texts]
        more = f" and {len(self.names) - 1} more" if self.names[1:] else ""
        self.name = self.names[0] + more
        for text in self.texts:
            text.check()
        if more:
            print(f"{self.name} are joined into one text", file=sys.stderr)

    def read(
        self, n_bytes: int = sys.maxsize, end: str = "", bar: tqdm | None = None
    ) -> Iterator[str]:
        """Yields the first `n_bytes` bytes of UTF-8 as text, in chunks; drops a character that the
        limit cuts.

        Documents are the `text` of each line of a `.jsonl`, and each of several other texts. `end`
        follows each document; without `end`, a line break follows documents of a `.jsonl`. `bar`
        shows the stored bytes that are read. UserError for a text that is damaged or not UTF-8.
        """
        is_split = False
        for text, following in zip_longest(self.texts, self.texts[1:]):
            position = len(text.mark)
            if not is_split:
                decoder = codecs.getincrementaldecoder("utf-8")()
            # a character may begin in one file and end in the next, as `split` leaves them
            is_split = not end and following and re.match(rb"[\x80-\xbf]", following.beginning)
            with uncompressed(text) as (file, stored):
                chunks, n_shown = in_utf8(file, text), 0
                if text.is_jsonl:
                    chunks = documents(chunks, text, end or "\n")
                elif self.texts[1:]:
                    chunks = chain(chunks, [end.encode()])
                for chunk in chain(filter(None, chunks), [b""]):
                    if bar is not None:
                        bar.update(stored.tell() - n_shown)
                        n_shown = stored.tell()
                    self.is_cut = len(chunk) > n_bytes
                    data = chunk[:n_bytes]
                    n_waiting = len(decoder.getstate()[0])  # bytes of a character cut by a chunk
                    try:
                        yield decoder.decode(data, final=not chunk and not is_split)
                    except UnicodeDecodeError as error:
                        offset = position - n_waiting
                        raise not_utf8(error, text.name, text.conversion(), offset) from None
                    if self.is_cut:
                        return
                    position, n_bytes = position + len(data), n_bytes - len(data)


@dataclass(frozen=True)
class Text:
    name: str
    open: Callable[[], BinaryIO]  # the bytes as they are stored
    is_stream: bool = False  # another training can't read it again

    @property
    def is_jsonl(self) -> bool:
        return content_path(Path(self.name)).suffix.lower() == ".jsonl"

    @functools.cached_property
    def beginning(self) -> bytes:
        """The first bytes, by which `check` knows the kind of file."""
        with uncompressed(self) as (file, _):
            return file.read(512)

    @property
    def mark(self) -> bytes:
        """The byte order mark at the beginning, if any."""
        return next(filter(self.beginning.startswith, BYTE_ORDER_MARKS), b"")

    def facts(self) -> list:
        """Name, size, time and a checksum of parts, by which kept ids are found; and the kind, if
        earlier versions read it as plain UTF-8."""
        with self.open() as file:
            size, checksum = file.seek(0, io.SEEK_END), 0
            step = max(CHUNK_SIZE, size // N_PARTS)
            for start in (*range(0, size, step), max(0, size - CHUNK_SIZE)):
                file.seek(start)
                checksum = zlib.crc32(file.read(CHUNK_SIZE), checksum)
            is_file = isinstance(file, io.BufferedReader)
            time = os.fstat(file.fileno()).st_mtime_ns if is_file else 0
        kind = filter(None, ["jsonl" if self.is_jsonl else "", self.mark.hex()])
        return [os.path.abspath(self.name), size, time, checksum, *kind]

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
        """The command that converts the text from this encoding to UTF-8."""
        command = f"iconv -f {encoding} -t UTF-8"
        path, content = Path(self.name), content_path(Path(self.name))
        if path.is_file():
            target = content.with_name(f"{content.stem}-utf8{content.suffix}")
            source, target = shlex.quote(str(path)), shlex.quote(str(target))
            if content == path:
                command = f"{command} {source} > {target}"
            else:
                _, program = COMPRESSED[path.suffix.lower()]
                command = f"{program} -dc {source} | {command} > {target}"
        return f"convert it, here from {encoding}: {command}"


def content_path(path: Path) -> Path:
    """The path without the suffix of a compressed file."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


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
    if not path.is_dir() and not path.is_file():
        raise UserError(f"there is no {path}: name a text with {flag}")
    files = files_below(path, flag) if path.is_dir() else [path]
    return [Text(str(file), functools.partial(file.open, "rb")) for file in files]


def files_below(folder: Path, flag: str) -> list[Path]:
    """All `.txt` and `.jsonl` below a folder, also compressed, that are not hidden, in sorted
    order; a line says which files are left out."""
    errors, found, ignored = [], [], []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for file in (Path(parent, name) for name in (*names, *links)):  # os.walk enters no link
            is_hidden = any(part[0] == "." for part in file.relative_to(folder).parts)
            is_text = content_path(file).suffix.lower() in (".txt", ".jsonl")
            if is_text and not is_hidden and os.path.isfile(file):
                found.append(file)
            elif is_text or not is_hidden:
                ignored.append(str(file))
    closed = [f"{error.filename} ({error.strerror})" for error in errors]
    if not found:
        beside = f", and no way into {', '.join(closed)}" if closed else ""
        reason = f"there is no .txt or .jsonl in {folder}{beside}"
        raise UserError(f"{reason}: name a text with {flag}; {WHAT_IS_A_TEXT}")
    if left_out := closed + sorted(ignored)[:N_NAMED]:
        more = f" and {len(ignored) - N_NAMED} more" if ignored[N_NAMED:] else ""
        rule = "a folder stands for its .txt and .jsonl, also compressed, that are not hidden"
        print(f"warning: left out: {', '.join(left_out)}{more}; {rule}", file=sys.stderr)
    return sorted(found)


def python_help() -> BinaryIO:
    from pydoc_data.topics import topics

    return io.BytesIO("\n\n".join(topics[name] for name in sorted(topics)).encode())


def spooled(stream: BinaryIO) -> Callable[[], BinaryIO]:
    """Copies a stream to an unnamed file; returns a function that opens the copy."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the function
    shutil.copyfileobj(stream, copy)
    copy.flush()

    def open_copy() -> BinaryIO:
        file = open(copy.fileno(), "rb", closefd=False)  # noqa: SIM115 - closed by the caller
        file.seek(0)  # all share one position
        return file

    return open_copy


@contextmanager
def uncompressed(text: Text) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens the file to read, and the file as it is stored; UserError for a damaged one."""
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
    """Yields a file's content after the byte order mark, converted to UTF-8 if the mark says so."""
    encoding = BYTE_ORDER_MARKS.get(text.mark, "utf-8")
    position = len(file.read(len(text.mark)))
    chunks = iter(lambda: file.read(CHUNK_SIZE), b"")
    if encoding == "utf-8":
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


def documents(chunks: Iterable[bytes], text: Text, end: str) -> Iterator[bytes]:
    """Yields the `text` of each line, a JSON object, and `end`, in chunks; half a surrogate pair
    becomes a "?". UserError for another line."""
    ready, decode = bytearray(), json.JSONDecoder().raw_decode  # json.loads takes twice as long
    for number, line in enumerate(lines(chunks), 1):
        if not (line := line.strip()):
            continue
        try:
            document, length = decode(line := line.decode())
            if length < len(line):
                raise ValueError("there is more")
            ready += (document["text"] + end).encode(errors="replace")
        except UnicodeDecodeError as error:
            raise not_utf8(error, f"line {number} of {text.name}", text.conversion()) from None
        except (ValueError, TypeError, KeyError, RecursionError):
            reason = f"no JSON object with a string named text: {line[:60]}"
            raise UserError(f"line {number} of {text.name} is {reason}") from None
        while len(ready) >= CHUNK_SIZE:
            yield bytes(ready[:CHUNK_SIZE])
            del ready[:CHUNK_SIZE]
    yield bytes(ready)


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts = []
    for chunk in chunks:
        first, *following = chunk.split(b"\n")
        parts.append(first)
        for line in following:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)
