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
from texts import CHARACTERS, SAVED, TEXTS, chunks, encode_chunks, few_examples, mixed_text

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


@pytest.fixture
def with_specials():
    """A tokenizer with more special tokens, which overlap, and hold white space."""
    pytest.importorskip("tiktoken")
    tokenizer = tokenizers.load("bpe", GPT2)
    for spelling in ("<a>", "<a> b", "b <a", "  "):
        tokenizer.specials |= {spelling: len(tokenizer.tokens)}
        tokenizer.tokens.append(spelling.encode())
    return tokenizer


@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1 << 20])
def test_chunks_are_encoded_into_byte_pairs_as_the_whole(chunk_size, with_specials):
    texts = [*TEXTS, CHARACTERS * 2, "it's  the\n\n end \x1c 's\u3000\u3000x\n"]
    texts += [
        " <a> b <|endoftext|> b <a <a>\n  <|endof text|>  \n<",
        "b <a> b <a>我们去。'll!" * 9,
    ]
    for text in texts:
        ids = with_specials.encode(text).tolist()
        assert encode_chunks(with_specials, text, chunk_size) == ids


def test_a_text_without_spaces_is_cut_where_letters_end(byte_pairs):
    text = "我们去。" * 100 + "他们也去<|endoftext|>" * 100
    pieces = list(byte_pairs.whole_tokens(chunks(text, 32)))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 64


def test_special_tokens_are_found_as_by_hugging_face(with_specials):
    """By its package tokenizers 0.23: the first in the text, of those the longest."""
    for text, ids in {
        "<a>b <a日\n<a> bb <a<a>": [512, 514, 162, 245, 98, 198, 513, 514, 512],
        "<a> b b <a<a>日 the !  ": [513, 220, 514, 512, 162, 245, 98, 267, 220, 0, 515],
        "<ab<a<a> b <a> b's": [27, 64, 65, 27, 64, 513, 220, 513, 6, 82],
        "b ingb <a日<a> b\n  b": [65, 220, 288, 514, 162, 245, 98, 513, 198, 515, 65],
    }.items():
        assert with_specials.encode(text).tolist() == ids
        assert with_specials.encode(text).dtype == np.uint16


@pytest.fixture(scope="module")
def theirs(byte_pairs):
    """tiktoken's own, with the end as the last rank."""
    import tiktoken

    return tiktoken.Encoding(
        "with the end",
        pat_str=byte_pairs.pattern,
        mergeable_ranks={byte_pairs.tokens[id]: rank for rank, id in enumerate(byte_pairs.ids)},
        special_tokens={"<|endoftext|>": len(byte_pairs.ids)},
    )


pieces = st.sampled_from(["<|endoftext|>", "<|endof", "text|>", " ", "\n", "the", "'s", "日"])


@few_examples
@given(st.lists(pieces))
def test_the_end_of_a_text_is_a_token_as_by_tiktoken(byte_pairs, theirs, pieces):
    ranks = theirs.encode("".join(pieces), allowed_special="all")
    ids = np.append(byte_pairs.ids, byte_pairs.end)
    assert byte_pairs.encode("".join(pieces)).tolist() == ids[ranks].tolist()


def test_without_special_tokens_the_end_of_a_text_is_text(byte_pairs):
    assert (byte_pairs.end, byte_pairs.unknown, byte_pairs.vocab_size) == (511, None, 512)
    plain = tokenizers.load("bpe", GPT2)
    assert (plain.document_end, plain.specials) == ("<|endoftext|>", {"<|endoftext|>": 511})
    plain.specials = {}
    assert plain.document_end == "" and plain.digest() != byte_pairs.digest()
    ids = plain.encode("<|endoftext|>")
    assert ids.tolist() == pieces_joined(plain, "<|endoftext|>")
    assert plain.decode([*ids, 511]) == "<|endoftext|>"


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
