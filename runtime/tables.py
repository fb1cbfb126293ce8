"""What tokenizer.c reads: the tokens of a tokenizer, and the kind of each character."""

import unicodedata

import numpy as np

from tokenizers import SEPARATORS, VOWELS, WHITE_SPACE, Tokenizer

N_CODE_POINTS = 0x110000
OTHER, VOWEL, SEPARATOR, LETTER, NUMBER, SPACE = range(6)


def tables(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Arrays of uint32, and one of bytes, by the names that tokenizer.c has for their places.

    TOKEN_STARTS (vocab_size + 1) are the places of the tokens in TOKEN_BYTES. SORTED_TOKENS are
    the ids of all that a text can have, in the order of their bytes, and RANKS (vocab_size), of
    byte pairs, which of two is joined first. From each of KIND_STARTS, a code point, to before the
    next one characters are of the same one of KINDS.
    """
    tokens = tokenizer.tokens
    known, ranks = [id for id, token in enumerate(tokens) if token], np.zeros(len(tokens))
    kinds = np.full(N_CODE_POINTS, OTHER)
    if tokenizer.merges is not None:
        known = tokenizer.ids.tolist()
        ranks[known] = np.arange(len(known))
        letters = {"L": LETTER, "N": NUMBER}
        categories = map(unicodedata.category, map(chr, range(N_CODE_POINTS)))
        kinds[:] = [letters.get(category[0], OTHER) for category in categories]
        kinds[[ord(character) for character in WHITE_SPACE]] = SPACE
    else:
        kinds[[ord(character) for character in VOWELS]] = VOWEL
        kinds[[ord(character) for character in SEPARATORS]] = SEPARATOR
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    numbers = {
        "TOKEN_STARTS": np.cumsum([0, *map(len, tokens)]),
        "SORTED_TOKENS": sorted(known, key=lambda id: tokens[id]),
        "RANKS": ranks,
        "KIND_STARTS": starts,
        "KINDS": kinds[starts],
    }
    arrays = {name: np.array(array, "<u4") for name, array in numbers.items()}
    return {**arrays, "TOKEN_BYTES": np.frombuffer(b"".join(tokens), np.uint8)}
