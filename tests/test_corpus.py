"""What a training reads of a text."""

from pathlib import Path

import numpy as np

from tokenizers import Tokenizer
from training import corpus
from training.settings import Files, TrainingConfig


def read(**files) -> tuple[np.ndarray, Tokenizer]:
    return corpus.read(TrainingConfig(files=Files(**files)))


def test_m_uses_the_first_mebibytes_alone_even_if_they_end_within_a_character(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "ä".encode() + b"\xff")
    ids, tokenizer = read(text_corpus=path, n_mega_bytes=1)
    assert tokenizer.decode(ids) == "a" * ((1 << 20) - 1)


def test_characters_that_the_tokenizer_does_not_know_are_dropped(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("a日b" * 500, encoding="utf-8")
    ids, tokenizer = read(text_corpus=path)
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == "ab" * 500


def test_without_a_corpus_it_says_what_it_takes_instead(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ids, _ = read()
    assert len(ids) > 300_000
    message = capsys.readouterr().err
    assert str(Path(".data/corpus.txt")) in message
    assert "Python" in message
    assert len(message.splitlines()) == 1

    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "corpus.txt").write_text("My own. " * 100)
    ids, tokenizer = read()
    assert tokenizer.decode(ids) == "My own. " * 100
    assert capsys.readouterr().err == ""
