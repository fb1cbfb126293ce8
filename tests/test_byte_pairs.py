"""GPT-2's byte pairs, beside the plain rule."""

import codecs
import json
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import GPT2
from hypothesis import given
from hypothesis import strategies as st
from mutate import mutated_bytes
from texts import CHARACTERS, SAVED, TEXTS, encode_file, few_examples, mixed_text

import tokenizers


@pytest.fixture(scope="module")
def byte_pairs():
    pytest.importorskip("tiktoken")
    return tokenizers.load("bpe", GPT2)


def pieces_joined(tokenizer, text: str) -> list[int]:
    """The ids of a text by the plain rule: in each word, the first pair in `merges` joins first."""
    import regex

    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    ids = []
    for word in regex.findall(tokenizer.pattern, text):
        parts = [tokenizers.BYTES[byte] for byte in word.encode()]
        while known := [pair for pair in pairwise(parts) if pair in ranks]:
            first = min(known, key=ranks.get)
            place = list(pairwise(parts)).index(first)
            parts[place : place + 2] = ["".join(first)]
        ids += [tokenizer.vocab[part] for part in parts]
    return ids


@few_examples
@given(st.text() | mixed_text | st.text(st.sampled_from("the ing's\n")))
def test_byte_pairs_are_those_of_the_plain_rule_and_survive_the_round_trip(byte_pairs, text):
    ids = byte_pairs.encode(text)
    assert ids.tolist() == pieces_joined(byte_pairs, text)
    assert ids.dtype == byte_pairs.dtype == np.uint16
    assert byte_pairs.decode(ids) == text


@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1 << 20])
def test_chunks_of_a_file_are_encoded_into_byte_pairs_as_the_whole(
    monkeypatch, chunk_size, byte_pairs
):
    monkeypatch.setattr(tokenizers, "CHUNK_SIZE", chunk_size)
    for text in [*TEXTS, CHARACTERS * 2, "it's  the\n\n end \x1c 's\u3000\u3000x\n"]:
        assert encode_file(byte_pairs, text.encode()) == byte_pairs.encode(text).tolist()


def test_the_end_of_a_text_is_never_encoded_from_a_text(byte_pairs):
    assert (byte_pairs.end, byte_pairs.unknown, byte_pairs.vocab_size) == (511, None, 512)
    ids = byte_pairs.encode("<|endoftext|>")
    assert 511 not in ids
    assert byte_pairs.decode([*ids, 511]) == "<|endoftext|>"


def test_a_byte_order_mark_before_the_files_changes_nothing(tmp_path, byte_pairs):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (GPT2 / name).read_bytes())
    loaded = tokenizers.load("bpe", tmp_path)
    assert (loaded.vocab, loaded.merges) == (byte_pairs.vocab, byte_pairs.merges)


def test_half_a_surrogate_pair_is_encoded_as_a_question_mark(byte_pairs):
    assert byte_pairs.decode(byte_pairs.encode("a\ud83d")) == "a?"


def test_ids_in_another_order_than_the_merges_are_the_vocabularys(byte_pairs):
    vocab = {token: 511 - id for token, id in byte_pairs.vocab.items()}
    shuffled = tokenizers.BytePairTokenizer(vocab, byte_pairs.merges)
    assert shuffled.end == 0
    text = "The quick brown fox"
    assert shuffled.encode(text).tolist() == (511 - byte_pairs.encode(text)).tolist()
    assert shuffled.decode(shuffled.encode(text)) == text


def test_without_tiktoken_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[bpe\]'"):
        tokenizers.load("bpe", GPT2)


ALL_BYTES = {character: id for id, character in enumerate(tokenizers.BYTES)}


@pytest.mark.parametrize(
    ("vocab", "merges", "reason"),
    [
        ([], "", "no map of tokens to ids"),
        ({"a": "0"}, "", "no map of tokens to ids"),
        ({"a": True}, "", "no map of tokens to ids"),
        ({"a": 0}, "", "lacks the token"),
        (ALL_BYTES | {"ab": 255}, "a b", "ids are not 0, 1, 2"),
        (ALL_BYTES | {"ab": 10**30}, "a b", "ids are not 0, 1, 2"),
        (ALL_BYTES | {"日": 256}, "", "stands for no byte"),
        (ALL_BYTES, "a b", "lacks the token 'ab'"),
        (ALL_BYTES, "a b c", "no list of pairs"),
        (ALL_BYTES, "ab", "no list of pairs"),
        (ALL_BYTES, "a ", "no list of pairs"),
        (ALL_BYTES | {"<|endoftext|>": 256}, "<|endoftext |>", "lacks the token '<.endoftext.>'"),
    ],
)
def test_malformed_byte_pairs_are_refused_with_a_reason(tmp_path, vocab, merges, reason):
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ValueError, match=f"is not a vocabulary: .*{reason}"):
        tokenizers.load("bpe", tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damaged_byte_pairs_load_or_are_refused(tmp_path, byte_pairs, name):
    byte_pairs.save(tmp_path)
    intact = (tmp_path / name).read_bytes()
    for damaged in mutated_bytes(intact, 200, 0):
        (tmp_path / name).write_bytes(damaged)
        try:
            tokenizer = tokenizers.load("bpe", tmp_path)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        assert max(tokenizer.encode(SAVED["text"])) < tokenizer.vocab_size
