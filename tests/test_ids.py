"""Texts as ids: files, folders and pipes that are read, and ids cached on disk."""

import bz2
import errno
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, ROOT, not_on_windows
from texts import needs_a_learner

from backend import files
from backend.errors import UserError
from data import ids
from data.ids import Corpus
from data.texts import CORPUS
from models.checkpoint import find_tokenizer
from tokenizers import (
    TOKENIZERS,
    BytePairTokenizer,
    CharTokenizer,
    SimpleVowelTokenizer,
    Tokenizer,
)

TEXT = "The context of the containers, und über das Übrige. " * 50


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(
    *paths: str,
    tokenizer: str | Tokenizer = "char",
    n_mega_bytes: int | None = None,
    keep: bool = True,
    special: bool = True,
) -> Corpus:
    if isinstance(tokenizer, str):
        tokenizer = TOKENIZERS.get(tokenizer) or find_tokenizer(tokenizer)
    n_bytes = n_mega_bytes and n_mega_bytes << 20
    paths = list(map(Path, paths)) or [CORPUS]
    return ids.read(paths, n_bytes, tokenizer, None, keep, {"disable": True}, special)


def decoded(text: Corpus) -> str:
    return text.tokenizer.decode(text.ids)


def kept() -> set[str]:
    return {str(path.relative_to(ids.FOLDER)) for path in ids.FOLDER.rglob("*")}


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """List that grows by one number per encoded text."""
    calls, encode = [], ids.Encoder.encode

    def encode_and_count(*arguments):
        calls.append(len(calls))
        return encode(*arguments)

    monkeypatch.setattr(ids.Encoder, "encode", encode_and_count)
    return calls


def test_m_limits_the_bytes_even_within_a_character(folder, capsys):
    data = b"a" * ((1 << 20) - 1) + "ä".encode() + b"\xff"
    (folder / "a.txt").write_bytes(data)
    assert decoded(read("a.txt", n_mega_bytes=1)) == "a" * ((1 << 20) - 1)
    assert capsys.readouterr().err == ""


def test_the_default_limit_of_bytes_is_a_message(monkeypatch, capsys):
    monkeypatch.setattr(ids, "DEFAULT_MEGA_BYTES", 1)
    Path("a.txt").write_bytes(b"a" * (1 << 20))
    assert len(read("a.txt").ids) == 1 << 20
    assert capsys.readouterr().err == ""
    Path("b.txt").write_bytes(b"a" * (1 << 20) + b"b")
    for _ in ("the first time", "from the file of ids"):
        assert len(read("b.txt").ids) == 1 << 20
        message = "b.txt: only the first 1 MiB are used; --n-mega-bytes takes more\n"
        assert capsys.readouterr().err == message
    assert len(read("b.txt", n_mega_bytes=2).ids) == (1 << 20) + 1


def test_unknown_characters_are_a_warning_for_cached_ids_as_well(capsys):
    Path("a.txt").write_text("a日b" * 500 + "\r本\u200b\t日", encoding="utf-8")
    share = f"{100 * 504 / 1504:.1f} %"
    kept_as = "日 U+0009 U+200B 本"
    line = f"warning: {share} of a.txt is not in the vocabulary and left out: {kept_as}\n"
    for version in ("new", "kept", "an earlier one's", "kept again"):
        text = read("a.txt", tokenizer=CharTokenizer())
        assert decoded(text) == "ab" * 500
        assert capsys.readouterr().err == line, version
        facts = text.stored.with_name(ids.FACTS)
        old = json.loads(facts.read_text())
        if version == "kept":
            del old["unknown"], old["reason"], old["is_cut"]
            facts.write_text(json.dumps(old))
    assert text.ids.dtype == np.uint8
    assert len(list(ids.FOLDER.iterdir())) == 1

    Path("b.txt").write_text(TEXT)
    given = read("b.txt", tokenizer=CharTokenizer())
    assert read("b.txt").stored == given.stored  # gpt-burn's vocabulary is enough


def test_the_vocabulary_is_learned_where_gpt_burns_lacks_more_than_1_in_200(capsys):
    few, many = "abcdefgh" * 199 + "é" * 8, "abcdefgh" * 199 + "é" * 8 + "ñ"
    Path("few.txt").write_text(few, encoding="utf-8")
    Path("many.txt").write_text(many, encoding="utf-8")
    own = "many.txt: the vocabulary is its own 10 characters, for gpt-burn's 103 leave out 0.6 %\n"
    lost = "warning: 0.1 % of many.txt is not in the vocabulary and left out: ñ\n"
    for _ in ("new", "kept"):
        assert read("few.txt").tokenizer.tokens == CharTokenizer().tokens
        assert capsys.readouterr().err.endswith("vocabulary and left out: é\n")
        text = read("many.txt")
        assert capsys.readouterr().err == own + lost
        assert decoded(text) == many[:-1]
        assert text.tokenizer.decode(range(10)) == "\nabcdefghé"
    read("many.txt", tokenizer=text.tokenizer)  # as in a resumed run
    assert len(list(ids.FOLDER.iterdir())) == 2


def test_ids_of_a_given_vocabulary_are_not_reused_for_a_learned_one():
    Path("a.txt").write_text(TEXT, encoding="utf-8")
    given = SimpleVowelTokenizer(["The", " "], 3)
    read("a.txt", tokenizer=given)
    assert decoded(read("a.txt", tokenizer="vowel")) == TEXT


def test_the_default_corpus_is_pythons_help(capsys):
    assert len(read().ids) > 300_000
    message = capsys.readouterr().err
    missing, left_out = message.splitlines()
    assert missing.startswith(str(Path(".data/corpus.txt"))) and "Python" in missing
    assert left_out.startswith("warning: ") and "of Python's own help is not in" in left_out

    Path(".data/corpus.txt").write_text("My own. " * 100)
    assert decoded(read()) == "My own. " * 100
    assert capsys.readouterr().err == ""


def test_plain_and_compressed_texts_are_joined_in_the_given_order(monkeypatch):
    pieces = [TEXT[i::4] for i in range(4)]
    for piece, name, module in zip(
        pieces, ["c.txt", "b.txt.gz", "a.bz2", "d.XZ"], [io, gzip, bz2, lzma], strict=True
    ):
        with module.open(name, "wb") as file:
            file.write(piece.encode())
    assert decoded(read("c.txt", "b.txt.gz", "a.bz2", "d.XZ")) == "".join(pieces)
    assert decoded(read("d.XZ", "c.txt")) == pieces[3] + pieces[0]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pieces[1].encode())))
    assert decoded(read("c.txt", "-")) == pieces[0] + pieces[1]


def test_a_folder_is_the_sorted_txt_files_below_it(folder):
    for name in ("b.txt", "a.txt", "a/z.txt", "notes.md", "a/b/c.txt", ".git/d.txt", "a/.e.txt"):
        (folder / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "texts" / name).write_text(f"{name} " * 9)
    expected = [f"{name} " * 9 for name in ("a/b/c.txt", "a/z.txt", "a.txt", "b.txt")]
    assert decoded(read("texts")) == "".join(expected)


def in_folder(*names: str) -> list[str]:
    return [str(Path("texts", name)) for name in names]


def test_files_of_a_folder_that_are_left_out_are_named(folder, monkeypatch, capsys):
    for name in ("a.txt", "B.TXT", "notes.md", "c.csv.gz", ".d.txt", ".git/x", "closed/e.txt"):
        (folder / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "texts" / name).write_text(f"{name} " * 9)
    scandir = os.scandir

    def with_one_closed(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", with_one_closed)
    assert decoded(read("texts")) == "B.TXT " * 9 + "a.txt " * 9
    warning, joined = capsys.readouterr().err.splitlines()
    left_out = in_folder("closed")[0] + " (Permission denied), "
    left_out += ", ".join(in_folder(".d.txt", "c.csv.gz", "notes.md"))
    rule = "a folder stands for its .txt and .jsonl, also compressed, that are not hidden"
    assert warning == f"warning: left out: {left_out}; {rule}"
    assert joined == f"{in_folder('B.TXT')[0]} and 1 more are joined into one text"

    for name in in_folder("a.txt", "B.TXT"):
        os.remove(name)
    with pytest.raises(
        UserError, match=r"no \.txt or \.jsonl in texts, and no way into .* \(Permission denied"
    ):
        read("texts")


@pytest.mark.skipif(sys.platform == "win32", reason="links are for administrators")
def test_a_linked_file_is_read_and_a_linked_folder_left_out(capsys):
    for name in ("texts", "elsewhere"):
        Path(name).mkdir()
        Path(name, "a.txt").write_text(f"{name} " * 9)
    os.symlink(Path("elsewhere", "a.txt").absolute(), Path("texts", "b.txt"))
    os.symlink(Path("elsewhere").absolute(), Path("texts", "c"))
    for number in range(9):
        Path("texts", f"d{number}").touch()
    assert decoded(read("texts")) == "texts " * 9 + "elsewhere " * 9
    assert f": {', '.join(in_folder('c', 'd0', 'd1'))} and 7 more;" in capsys.readouterr().err


def zipped(name: str) -> bytes:
    with zipfile.ZipFile(data := io.BytesIO(), "w") as archive:
        archive.writestr(name, TEXT)
    return data.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(data := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.zip", zipped("a.txt"), "a zip archive"),
        ("a.docx", zipped("word/document.xml"), r"a zip archive, as \.docx"),
        ("a.tar", tarred(), "a tar archive"),
        ("a.tar.gz", gzip.compress(tarred(), mtime=0), "a tar archive"),
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF"),
        ("a.txt", gzip.compress(TEXT.encode(), mtime=0), "compressed by gzip"),
        ("a", bz2.compress(TEXT.encode()), "compressed by bzip2"),
        ("a.txt.xy", lzma.compress(TEXT.encode()), "compressed by xz"),
    ],
)
def test_another_file_type_is_refused_with_the_types_that_are_read(name, data, kind):
    Path(name).write_bytes(data)
    pattern = rf"^{re.escape(name)} is {kind}.*: a text is .*UTF-8.*\.gz, \.bz2 or \.xz.*\.txt.* -"
    with pytest.raises(UserError, match=pattern):
        read(name)


def test_compressed_standard_input_is_refused(monkeypatch):
    data = io.BytesIO(gzip.compress(TEXT.encode()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    with pytest.raises(UserError, match=r"^standard input is compressed by gzip: "):
        read("-")


@pytest.mark.parametrize("tokenizer", ["char", "vowel", "bpe"])
def test_ids_are_cached_until_the_text_changes(encodings, tokenizer):
    if tokenizer == "bpe":
        needs_a_learner()
    Path("a.txt").write_text(TEXT)
    first, second = (read("a.txt", tokenizer=tokenizer) for _ in range(2))
    assert encodings == [0]
    assert second.checksum == first.checksum
    assert second.tokenizer.tokens == first.tokenizer.tokens
    np.testing.assert_array_equal(second.ids, first.ids)
    read("a.txt", tokenizer=first.tokenizer)  # as in a resumed run
    assert encodings == [0]

    changed = TEXT.replace("context", "kontext")  # of the same size and time
    status = os.stat("a.txt")
    Path("a.txt").write_text(changed)
    os.utime("a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "kontext" in decoded(read("a.txt", tokenizer=tokenizer))
    assert encodings == [0, 1]
    assert len(list(ids.FOLDER.iterdir())) == 1  # the former ids are removed


def test_concurrent_runs_share_the_ids_written_first(monkeypatch):
    Path("a.txt").write_text(TEXT)
    encode, inodes = ids.Encoder.encode, []

    def encode_after_another(*arguments):
        monkeypatch.setattr(ids.Encoder, "encode", encode)
        inodes.append((text := read("a.txt")).stored.stat().st_ino)
        assert decoded(text) == TEXT
        return encode(*arguments)

    monkeypatch.setattr(ids.Encoder, "encode", encode_after_another)
    text = read("a.txt")
    assert [text.stored.stat().st_ino] == inodes
    assert len(list(ids.FOLDER.iterdir())) == 1


@not_on_windows("removes no file that is mapped")
def test_the_least_recently_used_ids_are_removed_beyond_a_size(monkeypatch):
    def write(name: str, n: int) -> tuple[Corpus, Path]:
        Path(name).write_text(TEXT * n)
        text = read(name)
        os.utime(text.stored.parent, (0, 0))
        return text, text.stored.parent

    (a, folder_a), (b, folder_b), (_, folder_c) = (write(name, 10) for name in ("a", "b", "c"))
    (folder_c / "notes").write_text("mine")
    for name in ("mine/corpus.json", "mine-0123456789abcdef/ids", "mine.txt"):
        (ids.FOLDER / name).parent.mkdir(exist_ok=True)
        (ids.FOLDER / name).write_text("mine")
    of_killed, of_another = (ids.FOLDER / f".gpt-tiny-{name}" for name in ("killed", "another"))
    for folder in (of_killed, of_another):
        folder.mkdir()
        (folder / "ids").write_text(TEXT)
    os.utime(of_killed / "ids", (0, 0))
    others = {x for x in ids.FOLDER.iterdir() if x not in (folder_a, folder_b, of_killed)}

    monkeypatch.setattr(ids, "KEPT_BYTES", 3 * len(a.ids))
    read("a")
    _, folder_d = write("d", 10)
    assert set(ids.FOLDER.iterdir()) == {folder_a, folder_d} | others
    assert decoded(b) == TEXT * 10  # removed files stay mapped in a running process
    assert [path.name for path in folder_c.iterdir()] == ["notes"]
    _, folder_e = write("e", 100)
    assert set(ids.FOLDER.iterdir()) == {folder_e} | others


def test_ids_that_another_run_removes_are_encoded_again(monkeypatch):
    Path("a.txt").write_text(TEXT)
    read("a.txt")
    find = ids.Encoder.kept

    def find_and_remove(encoder, folder, tokenizer):
        monkeypatch.setattr(ids.Encoder, "kept", find)
        found = find(encoder, folder, tokenizer)
        ids.remove(folder)
        return found

    monkeypatch.setattr(ids.Encoder, "kept", find_and_remove)
    assert decoded(read("a.txt")) == TEXT


@not_on_windows("removes no file that is mapped")
def test_an_unpickled_corpus_has_no_ids_after_their_file_is_removed():
    Path("a.txt").write_text(TEXT)
    text = read("a.txt")
    sent = pickle.dumps(text)
    assert decoded(pickle.loads(sent)) == TEXT
    ids.remove(text.stored.parent)
    assert pickle.loads(sent).ids is None
    assert decoded(text) == TEXT


def test_each_tokenizer_has_separate_ids(encodings):
    Path("a.txt").write_text(TEXT)
    other = SimpleVowelTokenizer(SimpleVowelTokenizer.tokenize(TEXT), 7)
    texts = [read("a.txt"), read("a.txt", tokenizer="vowel"), read("a.txt", tokenizer=other)]
    assert encodings == [0, 1, 2]
    assert len({text.checksum for text in texts}) == 3
    assert [decoded(text) == TEXT for text in texts] == [True, True, False]


@pytest.mark.parametrize("damage", ["cut", "facts", "tokenizer"])
def test_damaged_ids_are_encoded_again(encodings, damage):
    Path("a.txt").write_text(TEXT)
    expected = read("a.txt", tokenizer="vowel").ids.tolist()
    [folder] = ids.FOLDER.iterdir()
    if damage == "cut":
        os.truncate(folder / "ids", 100)
    else:
        name = "corpus.json" if damage == "facts" else "tokenizer.json"
        (folder / name).write_text((folder / name).read_text()[:-9])
    assert read("a.txt", tokenizer="vowel").ids.tolist() == expected
    assert encodings == [0, 1]


def test_byte_pairs_of_chunks_equal_the_whole_texts():
    pytest.importorskip("tiktoken")
    tokenizer = BytePairTokenizer.load(GPT2)
    text = f"{TEXT * 4}<|endoftext|>" * 100  # a megabyte: rounds of chunks on all cores
    Path("a.txt").write_text(text)
    ids = read("a.txt", tokenizer=tokenizer).ids
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.fixture
def byte_pairs() -> BytePairTokenizer:
    pytest.importorskip("tiktoken")
    return BytePairTokenizer.load(GPT2)


def test_an_end_token_follows_each_document_unless_no_special(byte_pairs, encodings):
    end, (a, b) = [byte_pairs.end], (byte_pairs.encode(text).tolist() for text in ("The a", "b."))
    Path("a.txt").write_text("The a")
    Path("both.txt").write_text("The a<|endoftext|>b.")
    Path("both.jsonl").write_text('{"text": "The a"}\n{"text": "b."}\n')
    Path("b.txt").write_text("b.")
    assert read("a.txt", tokenizer=byte_pairs).ids.tolist() == a
    assert read("both.txt", tokenizer=byte_pairs).ids.tolist() == a + end + b
    assert read("both.jsonl", tokenizer=byte_pairs).ids.tolist() == a + end + b + end
    assert read("a.txt", "b.txt", tokenizer=byte_pairs).ids.tolist() == a + end + b + end
    assert decoded(read("both.jsonl")) == "The a\nb.\n"

    for name in ("both.txt", "both.jsonl"):
        text = read(name, tokenizer=byte_pairs, special=False)
        assert 511 not in text.ids and text.tokenizer.specials == {}
        content = Path(name).read_text() if name == "both.txt" else "The a\nb.\n"
        assert text.ids.tolist() == text.tokenizer.encode(content).tolist()
    assert read("a.txt", "b.txt", tokenizer=byte_pairs).ids.tolist() == [*a, *b]
    assert encodings == list(range(8))


@pytest.mark.parametrize(
    ("tokenizer", "place"),
    [
        (CharTokenizer(), "a.txt-49345fff4706406f"),
        ("vowel", "a.txt-1db029460c7eb2b0"),
        (GPT2, "a.txt-b05beafbeaa061d5"),
    ],
)
def test_ids_of_an_earlier_version_are_reused(encodings, tokenizer, place):
    if tokenizer == GPT2:
        pytest.importorskip("tiktoken")
    Path("a.txt").write_text("The context. " * 50)
    tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    text = read("a.txt", tokenizer=tokenizer, special=False)
    assert text.stored.parent.name == place
    facts = json.loads((text.stored.parent / "corpus.json").read_text())
    assert [len(text) for text in facts["texts"]] == [4]


def test_texts_without_facts_of_this_version_are_encoded_again(encodings):
    Path("a.jsonl").write_text('{"text": "The"}')
    Path("b.txt").write_bytes(b"\xef\xbb\xbfThe")
    for name, n_characters in (("a.jsonl", 4), ("b.txt", 3)):
        folder = read(name).stored.parent
        facts = json.loads((folder / "corpus.json").read_text())
        facts["texts"] = [text[:4] for text in facts["texts"]]
        (folder / "corpus.json").write_text(json.dumps(facts))
        assert len(read(name).ids) == n_characters
    assert encodings == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_windows_of_ids_in_memory_and_on_disk_are_equal(folder, dtype):
    ids = np.random.default_rng(0).integers(2**8, size=10_000).astype(dtype)
    ids.tofile(folder / "ids")
    tokenizer = SimpleVowelTokenizer([], 1)
    tokenizer.tokens = range({np.uint8: 200, np.uint16: 60_000, np.uint32: 70_000}[dtype])
    starts = np.random.default_rng(1).integers(9_990, size=700)
    expected = np.stack([ids[start : start + 9] for start in starts])
    for stored in (ids, folder / "ids"):
        windows = Corpus("made up", tokenizer, 0, stored).windows(starts, 9)
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(windows, expected)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("tokenizer", ["char", "vowel"])
def test_a_pipe_is_read_once(tokenizer):
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text(TEXT, encoding="utf-8"))
    writer.start()
    assert decoded(read("pipe", tokenizer=tokenizer)) == TEXT
    writer.join()
    assert not ids.FOLDER.exists()


def test_x_and_standard_input_leave_no_file(monkeypatch, tmp_path):
    Path("a.txt").write_text(TEXT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for text in (read("a.txt", keep=False), read("-", tokenizer="vowel")):
        assert decoded(pickle.loads(pickle.dumps(text))) == TEXT  # as sent to another worker
        text.temporary.cleanup()
        assert isinstance(text.stored, Path) and not text.stored.exists()
        assert decoded(text) == TEXT
    text = read("a.txt", keep=False)
    assert os.listdir(tmp_path / "temporary")
    del text
    assert os.listdir(tmp_path / "temporary") == []
    assert not ids.FOLDER.exists()


def test_on_a_full_disk_ids_stay_in_memory(monkeypatch, capsys):
    def fail(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", fail)
    Path("a.txt").write_text(TEXT)
    assert decoded(read("a.txt")) == TEXT
    message = capsys.readouterr().err
    assert "No space left on device: ids stay in memory" in message and message.count("\n") == 1
    assert kept() == set()

    monkeypatch.setattr(ids.machine, "memory", lambda: 100)
    Path("b.txt").write_text("b" * (1 << 20))
    with pytest.raises(ValueError, match=r"b\.txt fits neither on the disk nor in memory"):
        read("b.txt")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["missing.txt"], r"there is no missing\.txt: name a text with --text-corpus"),
        (["empty"], r"there is no \.txt or \.jsonl in empty"),
        (["a.txt", "latin.txt"], r"latin\.txt is not UTF-8: invalid byte 0xe4 at offset 7;"),
        (["latin.txt", "a.txt"], r"latin\.txt is not UTF-8: invalid byte 0xe4 at offset 7;"),
        (["a.txt", "cut.txt", "a.txt"], r"cut\.txt is not UTF-8: invalid byte 0xf0 at offset 2;"),
        (["cut.gz"], r"cut\.gz can't be read: Compressed file ended"),
        (["no.xz"], r"no\.xz can't be read: "),
        (["no.bz2"], r"no\.bz2 can't be read: "),
    ],
)
def test_unreadable_texts_are_named_with_the_offset(folder, paths, message):
    Path("a.txt").write_text(TEXT)
    Path("latin.txt").write_bytes("Kein gr\xe4ssliches.".encode("latin-1"))
    Path("cut.txt").write_bytes("ab🔥".encode()[:-1])
    Path("cut.gz").write_bytes(gzip.compress(TEXT.encode())[:-20])
    for name in ("no.xz", "no.bz2"):
        Path(name).write_text(TEXT)
    Path("empty").mkdir()
    for tokenizer in ("char", "vowel"):
        with pytest.raises(ValueError, match=message):
            read(*paths, tokenizer=tokenizer)
    assert not ids.FOLDER.exists() or kept() == set()


def test_a_terminal_as_input_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="standard input is a terminal: pipe a text into it"):
        read("-")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for a process's memory")
def test_a_corpus_is_not_held_in_memory(folder):
    """Peak memory of encoding the text and of reading random windows."""
    code = """
import re, sys
import numpy as np
from pathlib import Path
from data import ids
from tokenizers import CharTokenizer
text = ids.read([Path(sys.argv[1])], None, CharTokenizer, None, keep=True, bar={"disable": True})
for seed in range(4):
    text.windows(np.random.default_rng(seed).integers(len(text.ids) - 9, size=3000), 9)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    peaks = []
    for n in (1, 50_000):
        with open("text.txt", "w", encoding="utf-8") as file:
            file.writelines(itertools.repeat(TEXT, n))
        command = [sys.executable, "-c", code, "text.txt"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout) << 10)
    size = os.path.getsize("text.txt")
    assert size > 100 << 20
    assert peaks[1] - peaks[0] < size / 4
