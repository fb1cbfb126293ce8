"""The text that a training reads, as ids."""

import io
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

import tokenizers
from models import hub
from tokenizers import Tokenizer
from training.settings import CORPUS, TrainingConfig

MAX_MEGA_BYTES = 999


def read(
    config: TrainingConfig, tokenizer: Tokenizer | None = None
) -> tuple[np.ndarray, Tokenizer]:
    """The ids of the corpus, in the smallest dtype that holds them, and their tokenizer: the given
    one, or else the one that the config names."""
    mega_bytes = min(config.files.n_mega_bytes or MAX_MEGA_BYTES, MAX_MEGA_BYTES)
    with open_text(config.files.text_corpus) as file:
        if tokenizer is None:
            tokenizer = make_tokenizer(config, file, mega_bytes << 20)
            file.seek(0)
        return tokenizer.encode_file(file, mega_bytes << 20), tokenizer


def open_text(path: Path) -> BinaryIO:
    if path == CORPUS and not path.exists():
        from pydoc_data.topics import topics

        print(f"{path} is missing: using the text of Python's own help", file=sys.stderr)
        return io.BytesIO("\n\n".join(topics[name] for name in sorted(topics)).encode())
    if not path.exists():
        raise ValueError(f"there is no {path}: name a text with --text-corpus")
    return path.open("rb")


def make_tokenizer(config: TrainingConfig, file: BinaryIO, size: int) -> Tokenizer:
    if config.tokenizer == "char":
        return tokenizers.CharTokenizer()
    if config.tokenizer == "vowel":
        return tokenizers.SimpleVowelTokenizer.train(file, size, config.max_vocab_size)
    return byte_pairs(config.tokenizer)


def byte_pairs(name: str) -> tokenizers.BytePairTokenizer:
    """The tokenizer of a folder, or of a name on the Hugging Face Hub."""
    folder, reason = Path(name), "there is no such folder"
    try:
        folder = hub.byte_pairs(folder)
    except ValueError as error:
        reason = str(error)
    if not folder.is_dir():
        raise ValueError(
            f"--tokenizer {name} is not known: name char, vowel, or a folder or a model of the "
            f"Hugging Face Hub with GPT-2's vocab.json and merges.txt ({reason})"
        )
    return tokenizers.BytePairTokenizer.load(folder)
