"""Texts as they are read: documents in lines of JSON, and encodings."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import not_on_windows

from backend.errors import UserError
from data import texts
from data.texts import Texts

DOCUMENTS = ["Fell the lamp.", "", "日本 🔥\r\n\u2028", 'a "quoted" word \\', "x" * 200_000, "\n"]
END = "<|endoftext|>"
TEXT = "Wo wäre 日本, 🔥?\r\n" * 5000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*names: str, **options) -> str:
    return "".join(Texts(list(map(Path, names))).read(**options))


def jsonl(documents: list[str], **options) -> bytes:
    lines = [json.dumps({"id": 1, "text": text, "meta": [{}]}, **options) for text in documents]
    return "\n".join(lines).encode()


@pytest.mark.parametrize(("end", "after"), [("", "\n"), (END, END)])
@pytest.mark.parametrize("chunk_size", [1000, 1 << 20])
def test_each_line_of_a_jsonl_is_a_document(end, after, chunk_size, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK_SIZE", chunk_size)
    expected = "".join(text + after for text in DOCUMENTS)
    Path("a.jsonl").write_bytes(jsonl(DOCUMENTS))
    blank_lines = b"\xef\xbb\xbf\r\n" + jsonl(DOCUMENTS).replace(b"\n", b"\r\n\r\n ") + b"\r\n\r\n"
    Path("b.JSONL").write_bytes(blank_lines)
    Path("c.jsonl.gz").write_bytes(gzip.compress(jsonl(DOCUMENTS, ensure_ascii=False)))
    Path("d.jsonl.bz2").write_bytes(bz2.compress(jsonl(DOCUMENTS)))
    Path("e.jsonl.xz").write_bytes(lzma.compress(jsonl(DOCUMENTS)))
    Path("f.jsonl").write_bytes(jsonl(DOCUMENTS).decode().encode("utf-16"))
    for name in ("a.jsonl", "b.JSONL", "c.jsonl.gz", "d.jsonl.bz2", "e.jsonl.xz", "f.jsonl"):
        assert read(name, end=end) == expected, name


@pytest.mark.parametrize("size", [1, 3, 4, 1000])
def test_files_that_are_split_within_a_character_are_joined(size):
    data = TEXT[:40].encode()
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    names = [f"{number:02}" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        Path(name).write_bytes(part)
    assert read(*names) == TEXT[:40]


def test_each_of_several_files_is_a_document_and_a_single_one_is_none():
    Path("texts").mkdir()
    for name in ("a.txt", "c.TXT"):
        Path("texts", name).write_text(name)
    Path("texts", "b.jsonl").write_bytes(jsonl(["one", "two"]))
    Path("texts", "d.jsonl.gz").write_bytes(gzip.compress(jsonl(["three"])))
    for name, module in {"e.txt.xz": lzma, "f.txt.BZ2": bz2, "g.txt.gz": gzip}.items():
        Path("texts", name).write_bytes(module.compress(name.encode()))
    documents = ["a.txt", "one", "two", "c.TXT", "three", "e.txt.xz", "f.txt.BZ2", "g.txt.gz"]
    assert read("texts", end=END) == "".join(text + END for text in documents)
    assert read("texts") == "a.txtone\ntwo\nc.TXTthree\ne.txt.xzf.txt.BZ2g.txt.gz"
    assert read("texts/a.txt", "texts/c.TXT", end=END) == f"a.txt{END}c.TXT{END}"
    assert read("texts/a.txt", end=END) == "a.txt"


def test_half_a_surrogate_pair_in_a_jsonl_is_a_question_mark():
    Path("a.jsonl").write_text(r'{"text": "a\ud83db"}')
    assert read("a.jsonl") == "a?b\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"text": "The"',
            'line 3 of NAME is no JSON object with a string named text: {"text": "The"',
        ),
        (
            b'{"text": "The"} {"text": "a"}',
            "line 3 of NAME is no JSON object with a string named text: ",
        ),
        (b'{"content": "The"}', r'line 3 of NAME is no JSON .* named text: {"content": "The"}$'),
        (b'{"text": null}', "line 3 of NAME is no JSON object"),
        (b'{"text": ["The"]}', "line 3 of NAME is no JSON object"),
        (b'["text"]', "line 3 of NAME is no JSON object"),
        (b'"text"', "line 3 of NAME is no JSON object"),
        (b"The", "line 3 of NAME is no JSON object"),
        (b"[" * 100_000, "line 3 of NAME is no JSON object"),
        (b'{"text": "gr\xe4ss"}', "line 3 of NAME is not UTF-8: invalid byte 0xe4 at offset 12; "),
    ],
)
def test_another_line_of_a_jsonl_is_refused_with_its_number(line, message):
    data = jsonl(["a"]) + b"\n\n" + line + b"\n" + jsonl(["b"])
    Path("a.jsonl").write_bytes(data)
    Path("b.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("a.jsonl", "b.jsonl.gz"):
        with pytest.raises(UserError, match=message.replace("NAME", name)) as error:
            read(name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_is_dropped_and_says_which_encoding_it_is(encoding, chunk, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK_SIZE", chunk)
    text = TEXT[:90] if chunk < 9 else TEXT
    data = f"\ufeff{text}".encode(encoding)
    Path("texts").mkdir()
    Path("texts/a.txt").write_bytes(data)
    Path("texts/b.txt").write_text(text, encoding="utf-8", newline="")
    Path("c.gz").write_bytes(gzip.compress(data))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read("texts", "c.gz", "-") == 4 * text
    Path("nothing.txt").write_bytes("\ufeff".encode(encoding))
    assert read("nothing.txt") == ""


@pytest.mark.parametrize("chunk_size", [1, 4, 1 << 20])
def test_the_first_bytes_alone_are_read_without_a_character_that_they_cut(chunk_size, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK_SIZE", chunk_size)
    data = "aä日🔥ß. b".encode()
    Path("a.txt").write_bytes(data + b"\xff")
    Path("b.txt").write_bytes(data[:4])
    for size in range(len(data) + 1):
        a, b = Texts([Path("a.txt")]), Texts([Path("b.txt"), Path("a.txt")])
        assert "".join(a.read(size)) == data[:size].decode(errors="ignore")
        if size < 4:
            assert "".join(b.read(size)) == data[:size].decode(errors="ignore")
        assert a.is_cut
    whole = Texts([Path("b.txt")])
    with pytest.raises(UserError, match="offset 3"):
        list(whole.read(4))
    assert not whole.is_cut


@pytest.mark.parametrize("chunk_size", [1, 10, 1 << 20])
@pytest.mark.parametrize(
    ("data", "offset", "byte"),
    [
        (b"\xff", 0, 0xFF),
        (b"twenty five good bytes..." + b"\xff" + b"more", 25, 0xFF),
        ("nine bytes: äöü 日本".encode() + b"\xe3\x80z", 25, 0xE3),
        (b"a lone \x80 continuation", 7, 0x80),
        (b"half a pair \xed\xa0\x80", 12, 0xED),
        ("a truncated end: 🔥".encode()[:-1], 17, 0xF0),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_offset(monkeypatch, chunk_size, data, offset, byte):
    monkeypatch.setattr(texts, "CHUNK_SIZE", chunk_size)
    Path("a.txt").write_bytes(b"The")
    Path("b.txt").write_bytes(data)
    message = rf"^b\.txt is not UTF-8: invalid byte 0x{byte:02x} at offset {offset};"
    for size in (len(data), len(data) + 1):
        with pytest.raises(UserError, match=message):
            read("b.txt", n_bytes=size)
        with pytest.raises(UserError, match=message):
            read("a.txt", "b.txt", n_bytes=3 + size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("\ufeffThe".encode("utf-16-le") + b"\0", "is not UTF-16-LE, .*: truncated data .* 8$"),
        ("\ufeffThe".encode("utf-16-be") + b"\xdc\0aa", "is not UTF-16-BE, .* at offset 8$"),
        ("\ufeffThe".encode("utf-32-le") + b"aaaa", "is not UTF-32-LE, .* at offset 16$"),
        (b"\xef\xbb\xbfThe \xff", "not UTF-8: invalid byte 0xff at offset 7; "),
        ("The whole".encode("utf-16-le"), "is UTF-16LE without a byte order mark; convert it"),
        ("The whole".encode("utf-16-be"), "is UTF-16BE without a byte order mark; convert it"),
        ("The whole".encode("utf-32-le"), "is UTF-32LE without a byte order mark; convert it"),
        ("The whole".encode("utf-32-be"), "is UTF-32BE without a byte order mark; convert it"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_what_a_byte_order_mark_belies_or_should_have_said_is_refused(data, message, name):
    Path("b.txt").write_text("The")
    Path(name).write_bytes(gzip.compress(data) if name[-1] == "z" else data)
    with pytest.raises(UserError, match=rf"^{name} .*{message}") as error:
        read("b.txt", name, end=END)
    assert "\n" not in str(error.value)


@not_on_windows("Windows has no iconv")
@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
@pytest.mark.parametrize(
    ("name", "encoding", "converted"),
    [
        ("my.txt", "windows-1252", "my-utf8.txt"),
        ("my old text", "windows-1252", "my old text-utf8"),
        ("my.txt.gz", "windows-1252", "my-utf8.txt"),
        ("my.jsonl.bz2", "windows-1252", "my-utf8.jsonl"),
        ("my.txt.xz", "utf-16-be", "my-utf8.txt"),
    ],
)
def test_a_text_in_another_encoding_is_refused_with_the_command_that_converts_it(
    name, encoding, converted
):
    program = {"gz": "gzip", "z2": "bzip2", "xz": "xz"}.get(name[-2:], "iconv")
    if not shutil.which(program):
        pytest.skip(f"needs {program}")
    data = b'{"text": "one word, wo w\xe4re es?"}'.decode("latin-1").encode(encoding)
    compress = {"gz": gzip.compress, "z2": bz2.compress, "xz": lzma.compress}
    Path(name).write_bytes(compress.get(name[-2:], bytes)(data))
    with pytest.raises(UserError) as error:
        read(name)
    command = str(error.value).rpartition(": ")[2]
    assert command.startswith("iconv -f ") or shutil.which(command.split()[0]), command
    subprocess.run(["sh", "-c", command], check=True)
    assert "one word, wo wäre es?" in read(converted)


def test_what_has_no_name_is_converted_in_its_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w\xe4re")))
    with pytest.raises(UserError, match=r"^standard input is not .*: iconv -f \S+ -t UTF-8$"):
        read("-")
