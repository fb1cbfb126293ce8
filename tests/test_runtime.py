"""The C of exported models beside the Python that it stands for: tokens, sampling, cores."""

import ctypes
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, GPT2
from hypothesis import given
from hypothesis import strategies as st
from texts import TEXTS, few_examples, mixed_text

import tokenizers
from gpt_tiny import GPT, GPTConfig, initial_weights
from inference.generator import Decoder, sample
from runtime import build
from runtime.sources import write_sources

SPECIALS = ("<|", "<| b", "b <|", "  ", "日\n")
# a digit, a fraction and letters that are not ASCII's, a mark that joins, a space of no width
MARKS = "the ing's 've\n\r \u0661\xbd\xb2x \u017f\u0308 \u200b\U0001f525"


def tokenizer_of(name: str) -> tokenizers.Tokenizer:
    if name == "bpe":
        pytest.importorskip("tiktoken")
        tokenizer = tokenizers.load("bpe", GPT2)
        for spelling in SPECIALS:
            tokenizer.specials = {**tokenizer.specials, spelling: len(tokenizer.tokens)}
            tokenizer.tokens.append(spelling.encode())
        tokenizer.padding, tokenizer.n_surplus = (512, 514), 59
        return tokenizer
    if name == "vowel":
        return tokenizers.SimpleVowelTokenizer.read(DATA / "tokenizers" / "vowel.bin")
    return tokenizers.CharTokenizer(sorted({"\n", *"".join(TEXTS)} - set("\réß \u3000")))


class Sampling(ctypes.Structure):
    _fields_ = (("temperature", ctypes.c_double), ("top_p", ctypes.c_double))
    _fields_ += (("top_k", ctypes.c_int),)


@pytest.fixture(scope="module", params=["char", "vowel", "bpe"])
def both(request, tmp_path_factory):
    """A tokenizer, and the C for a model with it, in this process."""
    tokenizer, folder = tokenizer_of(request.param), tmp_path_factory.mktemp(request.param)
    config = GPTConfig(4, tokenizer.vocab_size, n_layers=1, n_heads=1, d_model=4, d_hidden=4)
    write_sources(Decoder(GPT(config, initial_weights(config, 0))), tokenizer, "", folder)
    files = ["-shared", "-fPIC", "-DKERNELS=kernels_any", "-DHALVES_ARE_SINGLE", "-Wno-everything"]
    files += ["-nostdlib"]  # the little that it needs of one is in this process
    files += [build.RUNTIME / name for name in ("page.c", "steps.c")] + build.SHARED_FILES
    library = ctypes.CDLL(str(build.compile_c(folder, folder / "model.so", *files)))
    library.model_address.restype = ctypes.c_void_p
    model = (folder / "model.bin").read_bytes()
    ctypes.memmove(library.model_address(), model, len(model))
    return tokenizer, library


class Text(ctypes.Structure):
    _fields_ = (("text", ctypes.c_void_p), ("n", ctypes.c_long))


def encoded(library: ctypes.CDLL, text: bytes) -> list[int]:
    ids = np.zeros(5 * len(text) + 1, np.int32)
    prompt = Text(ctypes.cast(text, ctypes.c_void_p), len(text))
    return ids[: library.encode(prompt, ids.ctypes)].tolist()


@few_examples
@given(st.text() | mixed_text | st.text(st.sampled_from(MARKS + "<|b日\n")))
def test_texts_are_encoded_as_in_python(both, text):
    tokenizer, library = both
    text = text.encode(errors="replace")
    assert encoded(library, text) == tokenizer.encode(text.decode()).tolist()


class Count(ctypes.Structure):
    _fields_ = (("token", Text), ("n", ctypes.c_int))


class Unknown(ctypes.Structure):
    _fields_ = (("n", ctypes.c_long), ("n_characters", ctypes.c_long), ("counts", 5 * Count))


@few_examples
@given(mixed_text | st.text(st.sampled_from("abé日\r 🔥\u3000x.")))
def test_what_is_unknown_is_counted_as_in_python(both, text):
    tokenizer, library = both
    text = text.encode(errors="replace")
    encoded(library, text)
    tokenizer.encode(text.decode(), theirs := tokenizers.Unknown())
    ours = Unknown.in_dll(library, "unknown")
    counts = [
        (ctypes.string_at(each.token.text, each.token.n).decode(), each.n)
        for each in ours.counts
        if each.n
    ]
    assert (ours.n, counts) == (theirs.n, list(theirs.most_frequent().items()))
    if tokenizer.unknown is not None:
        assert ours.n_characters == theirs.n_characters


def test_a_long_text_is_encoded_as_in_python(both):
    tokenizer, library = both
    text = "".join(TEXTS) + " " * 300 + "the ing" * 300 + "a" * 3000 + "日本語" * 3000
    data = text.encode(errors="replace")
    assert encoded(library, data) == tokenizer.encode(data.decode()).tolist()


@few_examples
@given(
    seed=st.integers(0, 2**70),
    temperature=st.sampled_from([0, 1e-3, 0.7, 1.0, 50.0, 1e12]),
    top_k=st.none() | st.integers(1, 200),
    top_p=st.none() | st.floats(0, 1.5),
    spread=st.sampled_from([0, 1, 30]),
)
def test_a_seed_draws_the_tokens_that_it_draws_in_python(
    both, seed, temperature, top_k, top_p, spread
):
    tokenizer, library = both
    rng = np.random.default_rng(seed)
    digits = str(seed).encode()
    assert library.seed(digits, len(digits))
    sampling = Sampling(temperature, math.inf if top_p is None else top_p, top_k or 0)
    logits = np.random.default_rng(0).normal(0, spread, (20, 1, tokenizer.vocab_size))
    for row in np.round(logits.astype(np.float32), 1):  # so that some are equal
        ours = library.sample(row.ctypes, ctypes.byref(sampling))
        assert ours == sample(row, temperature, rng, top_k, top_p, tokenizer.excluded)[0]


def test_what_is_no_number_is_no_seed(both):
    _, library = both
    assert not any(library.seed(text, len(text)) for text in (b"-1", b"x", b"1.5", b"", b"9" * 999))


SYSTEM = """
#include <stdio.h>
#include <unistd.h>
#define fopen(path, mode) fopen(QUOTA, mode)
#define sysconf(name) 8
#include "system.c"
const byte *model;
void kernels_sse2(Step *step, int core) {}
void kernels_avx2(Step *step, int core) {}
void kernels_avx512(Step *step, int core) {}
void kernels_any(Step *step, int core) {}
int cores(void) { return n_cores(); }
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> tuple[ctypes.CDLL, Path]:
    """system.c on a machine of 8 cores, and the file with the quota of its control group."""
    folder = tmp_path_factory.mktemp("machine")
    sizes = "enum { N_CHUNKS = 24, IS_LARGE = 1, MEMORY_BYTES = 64, N_HALVES = 0 };"
    (folder / "model.h").write_text(sizes)
    (folder / "machine.c").write_text(SYSTEM)
    quota = folder / "cpu.max"
    options = ["-shared", "-fPIC", f'-DQUOTA="{quota.as_posix()}"', folder / "machine.c"]
    return ctypes.CDLL(str(build.compile_c(folder, folder / "machine.so", *options))), quota


@pytest.mark.parametrize(
    ("quota", "limit", "n"),
    [
        ("", None, 8),
        ("max 100000", None, 8),
        ("350000 100000", None, 3),
        ("50000 100000", None, 1),
        ("350000 100000", "5", 5),
        ("max 100000", "5", 5),
    ],
)
def test_a_program_takes_the_cores_that_its_container_has(machine, monkeypatch, quota, limit, n):
    library, file = machine
    file.write_text(quota)
    monkeypatch.delenv("NUM_CPU_THREADS", raising=False)
    if limit:
        monkeypatch.setenv("NUM_CPU_THREADS", limit)
    assert library.cores() == n
