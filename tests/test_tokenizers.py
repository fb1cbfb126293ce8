import inspect
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import (
    CHARACTERS,
    REFERENCE,
    SAVED,
    TEXTS,
    chunks,
    encode_chunks,
    few_examples,
    mixed_text,
    needs_a_learner,
    plain_vowel_tokens,
)

import tokenizers
from tokenizers import BytePairTokenizer, CharTokenizer, SimpleVowelTokenizer


def known(tokenizer, text: str) -> list[int]:
    return [id for id in tokenizer.encode(text).tolist() if id != tokenizer.unknown]


def vowel_tokenizer(text: str, vocab_size: int = 1 << 16) -> SimpleVowelTokenizer:
    return SimpleVowelTokenizer(SimpleVowelTokenizer.tokenize(text), vocab_size)


def bincode(tokens: dict[str, int]) -> bytes:
    def number(value: int) -> bytes:
        return value.to_bytes(8, "little")

    def string(text: str) -> bytes:
        return number(len(text.encode())) + text.encode()

    there = [string(token) + number(id) for token, id in tokens.items()]
    back = [number(id) + string(token) for token, id in tokens.items()]
    return number(len(tokens)) + b"".join(there) + number(len(tokens)) + b"".join(back)


def test_who_asks_for_hugging_faces_package_is_told_that_this_is_another():
    with pytest.raises(ImportError, match=r"tokenizers\.py is not Hugging Face's .* AddedToken"):
        from tokenizers import AddedToken  # noqa: F401
    with pytest.raises(ImportError, match=r"cannot import name 'no_such'"):
        from tokenizers import no_such  # noqa: F401
    assert not hasattr(tokenizers, "__path__") and not hasattr(tokenizers, "__version__")
    assert tokenizers.HUGGING_FACE_NAMES.isdisjoint(vars(tokenizers))
    assert dict(inspect.getmembers(tokenizers))["CharTokenizer"] is CharTokenizer
    assert pickle.loads(pickle.dumps(CharTokenizer)) is CharTokenizer


def test_the_103_characters_have_the_original_order():
    characters = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    characters += "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~0123456789äüöÄÖÜß"
    tokenizer = CharTokenizer()
    assert tokenizer.encode(characters).tolist() == list(range(103))
    assert tokenizer.decode(range(103)) == characters
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.unknown) == ("char", 104, 103)


@pytest.mark.parametrize("reference", [*REFERENCE, SAVED], ids=lambda each: each["text"][:20])
def test_character_ids_equal_the_originals(reference):
    assert CharTokenizer().encode(reference["text"]).tolist() == reference["char_ids"]


def test_every_other_code_point_is_unknown_and_never_printed():
    everything = "".join(map(chr, range(0x110000)))
    ids = CharTokenizer().encode(everything)
    assert ids.dtype == np.uint8
    assert np.count_nonzero(ids != 103) == 103
    assert CharTokenizer().decode([28, 103, 2]) == "Aa"
    assert CharTokenizer().tokens[103] == b""
    assert CharTokenizer().tokens[96] == "ä".encode()


def train(text: str, vocab_size: int | None = None) -> CharTokenizer:
    return CharTokenizer.train(chunks(text, 50), vocab_size)


@settings(few_examples, max_examples=50)
@given(mixed_text | st.text(), st.integers(2, 9) | st.none())
def test_a_texts_own_characters_are_the_most_frequent_in_sorted_order(text, vocab_size):
    text = text.encode(errors="ignore").decode() + "日日本"
    counts = Counter(text.replace("\r", ""))
    tokenizer = train(text, vocab_size)
    if (
        vocab_size is None
        and sum(counts[c] for c in tokenizers.CHARACTERS) * 200 >= 199 * counts.total()
    ):
        assert tokenizer.tokens == CharTokenizer().tokens
        return
    of_rank = sorted({*counts, "\n"}, key=lambda c: (c != "\n", -counts[c], c))
    known = [c for c in of_rank if c == "\n" or counts[c] > 1][: vocab_size and vocab_size - 1]
    assert tokenizer.decode(range(len(tokenizer.tokens))) == "".join(sorted(known))
    assert tokenizer.unknown == len(known)
    ids = {character: id for id, character in enumerate(sorted(known))}
    assert tokenizer.encode(text).tolist() == [ids.get(c, len(known)) for c in text]
    found = tokenizers.Unknown()
    known_ids = np.concatenate(list(tokenizer.encode_chunks([text], found)))
    assert known_ids.tolist() == [ids[c] for c in text if c in ids]
    lost = {c: n for c, n in counts.items() if c not in ids}
    assert (found.n, found.n_characters, found.counts) == (sum(lost.values()), counts.total(), lost)


def test_20_000_characters_keep_their_ids_in_a_models_folder(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) * 2 + "\n🔥🔥"
    tokenizer = train(text)
    tokenizer.save(tmp_path)
    loaded = tokenizers.load("char", tmp_path)
    assert loaded.tokens == tokenizer.tokens and loaded.digest() == tokenizer.digest()
    assert loaded.encode(text).dtype == np.uint16
    assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["ab", "<?>"], "'ab' is not one character"),
        (["b", "a", "<?>"], "its tokens are not in sorted order"),
    ],
)
def test_a_file_of_what_are_no_characters_is_refused(tmp_path, tokens, reason):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"tokens": tokens}))
    with pytest.raises(ValueError, match=f"is not a vocabulary: {reason}"):
        tokenizers.load("char", tmp_path)


def test_a_vocabulary_of_characters_has_a_line_break_and_what_is_unknown():
    assert train("ab" * 9, 2).tokens == [b"\n", b""]
    with pytest.raises(ValueError, match="vocabulary size must be 2 or more"):
        train("ab" * 9, 1)


@pytest.mark.parametrize(
    ("n", "of", "share"),
    [(1, 3, "33.3 %"), (3, 3, "100.0 %"), (1, 1999, "0.1 %"), (1, 2001, "less than 0.1 %")],
)
def test_what_is_unknown_is_said_with_its_share_and_so_that_one_sees_it(capsys, n, of, share):
    unknown = tokenizers.Unknown()
    unknown.warn("a.txt")
    assert capsys.readouterr().err == ""
    unknown.add(of, {"\t": n})
    unknown.warn("a.txt", " and left out")
    warning = f"warning: {share} of a.txt is not in the vocabulary and left out: U+0009\n"
    assert capsys.readouterr().err == warning


def test_of_what_is_unknown_the_five_most_frequent_tokens_are_named(monkeypatch, capsys):
    monkeypatch.setattr(tokenizers, "MAX_COUNTED", 20)
    tokenizer, unknown = SimpleVowelTokenizer(["so"], 2), tokenizers.Unknown()
    for number in range(100):
        text = f"x{number} hour\u200b so {'long words ' * 3}"
        assert np.concatenate(list(tokenizer.encode_chunks([text], unknown))).tolist() == [0]
    assert len(unknown.counts) <= 20
    unknown.warn("the prompt")
    assert ": U+0020 long words " in capsys.readouterr().err
    assert unknown.n_characters - unknown.n == 200


@few_examples
@given(st.text(st.sampled_from(tokenizers.CHARACTERS)))
def test_known_characters_survive_the_round_trip(text):
    assert CharTokenizer().decode(CharTokenizer().encode(text)) == text


@pytest.mark.parametrize("reference", [*REFERENCE, SAVED], ids=lambda each: each["text"][:20])
def test_vowel_tokens_begin_with_the_originals(reference):
    """The original leaves out a text's last token and may put an empty one before the first."""
    theirs = [token for token in reference["vowel_tokens"] if token]
    ours = SimpleVowelTokenizer.tokenize(reference["text"])
    assert ours[: len(theirs)] == theirs
    assert len(ours) <= len(theirs) + 1


@pytest.mark.parametrize("reference", [*REFERENCE, SAVED], ids=lambda each: each["text"][:20])
def test_vowel_ids_begin_with_the_originals(reference):
    tokenizer = SimpleVowelTokenizer(reference["vowel_tokens"], reference["vowel_vocab_size"])
    tokens = zip(reference["vowel_tokens"], reference["vowel_ids"], strict=True)
    theirs = [id for token, id in tokens if token]
    assert tokenizer.vocab_size == reference["vowel_vocab_size"]
    assert tokenizer.encode(reference["text"]).tolist()[: len(theirs)] == theirs


@few_examples
@given(mixed_text)
def test_joined_tokens_are_the_text(text):
    tokens = SimpleVowelTokenizer.tokenize(text)
    assert "".join(tokens) == text
    assert "" not in tokens


@few_examples
@given(st.text(st.characters(exclude_categories=[])) | mixed_text)
def test_tokens_equal_those_of_the_plain_rule(text):
    assert SimpleVowelTokenizer.tokenize(text) == plain_vowel_tokens(text)


@few_examples
@given(mixed_text, st.integers(1, 40))
def test_fast_ids_equal_a_dictionary_of_the_plain_tokens(text, vocab_size):
    tokenizer = vowel_tokenizer(text, vocab_size)
    ids = {token: id for id, token in enumerate(tokenizer.tokens[:-1])}
    tokens = plain_vowel_tokens(text)
    expected = [ids.get(token.encode(), tokenizer.unknown) for token in tokens]
    assert tokenizer.encode(text).tolist() == expected


def test_thousands_of_tokens_of_every_length_keep_their_own_ids():
    """NULs, which pad nothing, among them."""
    choose = random.Random(0).choices
    words = {"".join(choose("bcdfgh\x00", k=1 + i % 12)) for i in range(20_000)}
    text = " ".join(sorted(words))
    tokenizer = vowel_tokenizer(text)
    assert tokenizer.encode(text).dtype == np.uint16
    assert tokenizer.decode(tokenizer.encode(text)) == text
    strangers = vowel_tokenizer(" ".join(sorted(words)[::2]))
    n_known = np.count_nonzero(strangers.encode(text)[::2] != strangers.unknown)
    assert n_known == (len(words) + 1) // 2


def test_white_space_is_unicodes_and_not_pythons():
    assert SimpleVowelTokenizer.tokenize("a\x85b\u3000c\x1cd") == [
        "a",
        "\x85",
        "b",
        "\u3000",
        "c\x1cd",
    ]


def test_a_long_run_of_vowels_is_cut_every_four():
    text = "a" * 10_001
    assert tokenizers.token_offsets(text, text.encode()).tolist() == [*range(0, 10_001, 4), 10_001]


def test_of_equally_frequent_tokens_the_first_in_sorted_order_are_kept():
    tokens = ["d", "c", "b", "a", "d"]
    assert SimpleVowelTokenizer(tokens, 3).tokens == [b"a", b"d", b""]
    assert SimpleVowelTokenizer(tokens[::-1], 3).tokens == [b"a", b"d", b""]
    text = "".join(f"{token} " for token in tokens)
    assert SimpleVowelTokenizer.train([text], 4).tokens == [
        b" ",
        b"a",
        b"d",
        b"",
    ]


def test_a_vocabulary_holds_no_more_than_its_text():
    tokenizer = vowel_tokenizer("so so", 2000)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.unknown) == ("vowel", 3, 2)
    assert tokenizer.decode([1, 2, 0]) == "so "


def test_a_vocabulary_of_one_knows_nothing_and_of_none_is_refused():
    assert vowel_tokenizer("so it is", 1).encode("so it").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="vocabulary size must be 1 or more"):
        vowel_tokenizer("so it is", 0)
    with pytest.raises(ValueError, match="stands for unknown tokens"):
        SimpleVowelTokenizer(["<?>"], 10)


@pytest.mark.parametrize("chunk_size", [1, 7, 1 << 20])
def test_a_vocabulary_trained_on_chunks_equals_one_of_the_texts_tokens(chunk_size):
    text = "\n".join(TEXTS)
    for vocab_size in (1, 2, 50, 1000):
        trained = SimpleVowelTokenizer.train(chunks(text, chunk_size), vocab_size)
        assert trained.tokens == vowel_tokenizer(text, vocab_size).tokens


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 64, 1 << 20])
def test_chunks_encode_as_the_whole_without_unknown_tokens(chunk_size):
    for text in [*TEXTS, CHARACTERS * 2, "\n".join(TEXTS)]:
        for tokenizer in (CharTokenizer(), vowel_tokenizer(text), vowel_tokenizer(text, 9)):
            assert encode_chunks(tokenizer, text, chunk_size) == known(tokenizer, text)


def test_an_empty_text_has_no_ids():
    assert encode_chunks(CharTokenizer(), "", 9) == []
    assert SimpleVowelTokenizer.train([], 10).vocab_size == 1


def test_a_saved_vocabulary_loads_as_it_was(tmp_path):
    tokenizer = vowel_tokenizer('a"\\\x00\n\u2028 日本 ' + SAVED["text"], 15)
    tokenizer.save(tmp_path)
    loaded = tokenizers.load("vowel", tmp_path)
    assert type(loaded) is SimpleVowelTokenizer
    assert loaded.tokens == tokenizer.tokens
    assert loaded.encode(SAVED["text"]).tolist() == tokenizer.encode(SAVED["text"]).tolist()


def test_the_character_tokenizer_needs_no_file(tmp_path):
    CharTokenizer().save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert type(tokenizers.load("char", tmp_path)) is CharTokenizer


THEIRS = """
import json, sys
from tokenizers import ByteLevelBPETokenizer
tokenizer = ByteLevelBPETokenizer.from_file("vocab.json", "merges.txt")
print(json.dumps(tokenizer.encode(json.load(sys.stdin)).ids))
"""


def test_byte_pairs_learned_from_a_text_are_read_by_hugging_face_with_equal_ids(tmp_path):
    needs_a_learner()
    text = "\n".join(TEXTS) + "日本語のテキスト。чайник на плите поёт<|endoftext|>" * 50
    tokenizer = BytePairTokenizer.train(chunks(text, 1000), 400)
    assert (tokenizer.vocab_size, tokenizer.end) == (400, 399)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|endoftext|>", "")
    assert tokenizer.encode(text).tolist().count(399) == 50
    assert not [token for token in tokenizer.tokens if b"|" in token[1:] or b"endof" in token]
    assert len(tokenizer.encode(text)) < len(text.encode()) / 3
    tokenizer.save(tmp_path)
    assert tokenizers.load("bpe", tmp_path).digest() == tokenizer.digest()
    command = [sys.executable, "-P", "-c", THEIRS]
    given = json.dumps(text.replace("<|endoftext|>", " "))
    run = subprocess.run(command, input=given, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(run.stdout) == tokenizer.encode(json.loads(given)).tolist()


def test_what_learning_byte_pairs_needs_is_said(monkeypatch):
    with pytest.raises(ValueError, match="vocabulary size must be 257 or more"):
        BytePairTokenizer.train(["text"], 256)
    monkeypatch.setattr(tokenizers.metadata, "version", raise_not_found)
    with pytest.raises(ValueError, match=r"package tokenizers: pip install '\.\[bpe\]'"):
        BytePairTokenizer.train(["text"], 300)


def raise_not_found(name: str):
    raise tokenizers.metadata.PackageNotFoundError(name)


def test_an_unknown_tokenizer_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        ValueError, match="unknown tokenizer 'word': there are 'char', 'vowel' and 'bpe'"
    ):
        tokenizers.load("word", tmp_path)


def test_a_vocabulary_saved_by_the_original_gives_its_ids():
    tokenizer = SimpleVowelTokenizer.read(DATA / "tokenizers" / "vowel.bin")
    ids = SAVED["vowel_ids"]
    assert tokenizer.vocab_size == SAVED["vowel_vocab_size"]
    assert tokenizer.encode(SAVED["text"]).tolist()[: len(ids)] == ids
    assert tokenizer.decode(ids) == "".join(SAVED["vowel_tokens"])


def test_a_vocabulary_with_the_originals_empty_token_loads(tmp_path):
    path = tmp_path / "vowel.bin"
    path.write_bytes(bincode({"so": 1, "": 0, "<?>": 2}))
    assert SimpleVowelTokenizer.read(path).encode("so as").tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[]", "no list of strings"),
        (b'{"tokens": "ab"}', "no list of strings"),
        (b'{"tokens": ["a", 1, "<?>"]}', "no list of strings"),
        (b'{"tokens": []}', "last token is not <[?]>"),
        (b'{"tokens": ["a", "b"]}', "last token is not <[?]>"),
        (b'{"tokens": ["b", "a", "<?>"]}', "not in sorted order"),
        (b'{"tokens": ["a", "a", "<?>"]}', "not in sorted order"),
        (b'{"tokens": ["<?>", "<?>"]}', "stands for unknown tokens"),
        (b'{"tokens": ["\\ud800", "<?>"]}', "surrogates not allowed"),
        (b'{"tokens": ["\xff", "<?>"]}', "invalid start byte"),
        (b"[" * 100_000, "recursion"),
        (bytes(7), "ends too early"),
        (bytes(16), "last token is not <[?]>"),
        (b"\0" + b"\xff" * 40, "ends too early"),
        ((1).to_bytes(8, "little") + b"\0" + b"\xff" * 40, "ends too early"),
        (bincode({"<?>": 0}) + b"\0", "two halves do not agree"),
        (bincode({"<?>": 0})[:-1] + b"!", "two halves do not agree"),
        (bincode({"<?>": 1}), "ids are not 0, 1, 2"),
        (bincode({"b": 0, "a": 1, "<?>": 2}), "not in sorted order"),
    ],
)
def test_a_malformed_vocabulary_is_refused_with_a_reason(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.json is not a vocabulary: .*{reason}"):
        SimpleVowelTokenizer.read(path)


def test_a_missing_vocabulary_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the vocabulary .*tokenizer.json: No such"):
        tokenizers.load("vowel", tmp_path)


@pytest.mark.parametrize("name", ["vowel.bin", "tokenizer.json"])
def test_a_damaged_vocabulary_loads_or_is_refused(tmp_path, name):
    path = tmp_path / name
    SimpleVowelTokenizer.read(DATA / "tokenizers" / "vowel.bin").save(tmp_path)
    intact = path.read_bytes() if path.exists() else (DATA / "tokenizers" / name).read_bytes()
    chance = random.Random(0)
    for _ in range(int(os.environ.get("GPT_TINY_MUTATIONS", "300"))):
        damaged = bytearray(intact[: chance.choice([len(intact), chance.randrange(len(intact))])])
        for _ in range(chance.randrange(4)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.choice([0, 1, 127, 128, 255])
        path.write_bytes(damaged)
        try:
            tokenizer = SimpleVowelTokenizer.read(path)
        except ValueError:
            continue
        assert max(tokenizer.encode(SAVED["text"])) < tokenizer.vocab_size
