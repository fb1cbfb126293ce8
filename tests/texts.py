"""Texts for tokenizers: those that gpt-burn's were recorded with, and arbitrary ones."""

import json
from importlib import metadata

import numpy as np
import pytest
from conftest import DATA
from hypothesis import settings
from hypothesis import strategies as st

from tokenizers import SEPARATORS, VOWELS, Unknown

REFERENCE = json.loads((DATA / "tokenizers" / "texts.json").read_text(encoding="utf-8"))
SAVED = json.loads((DATA / "tokenizers" / "vowel.json").read_text(encoding="utf-8"))
TEXTS = [reference["text"] for reference in REFERENCE]
# Long runs of vowels, characters of 1 to 4 bytes, every kind of separator, half a surrogate pair.
CHARACTERS = "aeiouäöüAbcdéß日🔥 \n.<\t\x00\x1c\x85\xa0\u1680\u2003\u2028\u3000"
mixed_text = st.text(st.sampled_from(CHARACTERS), max_size=80)
few_examples = settings(max_examples=150, deadline=None)


def chunks(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def encode_chunks(tokenizer, text: str, size: int) -> list[int]:
    arrays = list(tokenizer.encode_chunks(chunks(text, size), Unknown()))
    assert {ids.dtype for ids in arrays} == {tokenizer.dtype}
    return np.concatenate(arrays).tolist()


def needs_a_learner() -> None:
    """Skips where byte pairs cannot be learned."""
    for package in ("tiktoken", "tokenizers"):  # the second has the name of our file
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")


def plain_vowel_tokens(text: str) -> list[str]:
    """What `SimpleVowelTokenizer.tokenize` says it does, in its plain form."""
    tokens, token, after_separator = [], "", False
    for character in text:
        separator = character in SEPARATORS
        if token and (
            separator
            or after_separator
            or (character in VOWELS and len(token.encode("utf-8", "surrogatepass")) > 3)
        ):
            tokens.append(token)
            token = ""
        token += character
        after_separator = separator
    return [*tokens, token] if token else tokens
