"""What tokenizer.c reads: the tokens of a tokenizer, and the kind of each character."""

import sys
import unicodedata

import numpy as np

from tokenizers import SEPARATORS, VOWELS, WHITE_SPACE, Tokenizer

OTHER, VOWEL, SEPARATOR, LETTER, NUMBER, SPACE, UNSEEN = range(7)


def tables(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Arrays of uint32, and one of bytes, by the names that tokenizer.c has for their places.

    TOKEN_STARTS are the places in TOKEN_BYTES of the tokens, then of the spellings of the special
    ones, the longest first, and the end; SPECIALS are the ids of these. SORTED_TOKENS are the ids
    of the other tokens that a text can have, in the order of their bytes, and RANKS (n_tokens), of
    byte pairs, which of two is joined first. From each of KIND_STARTS, a code point, to before the
    next one characters are of the same one of KINDS.
    """
    tokens, specials = tokenizer.tokens, sorted(tokenizer.specials, key=len, reverse=True)
    in_bytes = [*tokens, *(spelling.encode() for spelling in specials)]
    known, ranks = [id for id, token in enumerate(tokens) if token], np.zeros(len(tokens))
    characters = list(map(chr, range(sys.maxunicode + 1)))
    kinds = np.full(len(characters), OTHER)
    if tokenizer.merges is not None:
        known = tokenizer.ids.tolist()
        ranks[known] = np.arange(len(known))
        letters = {"L": LETTER, "N": NUMBER}
        categories = map(unicodedata.category, characters)
        kinds[:] = [letters.get(category[0], OTHER) for category in categories]
    else:
        kinds[~np.array(list(map(str.isprintable, characters)))] = UNSEEN
        kinds[[ord(character) for character in VOWELS]] = VOWEL
        kinds[[ord(character) for character in SEPARATORS]] = SEPARATOR
    kinds[[ord(character) for character in WHITE_SPACE]] = SPACE
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    numbers = {
        "TOKEN_STARTS": np.cumsum([0, *map(len, in_bytes)]),
        "SPECIALS": [tokenizer.specials[spelling] for spelling in specials],
        "SORTED_TOKENS": sorted(known, key=lambda id: tokens[id]),
        "RANKS": ranks,
        "KIND_STARTS": starts,
        "KINDS": kinds[starts],
    }
    arrays = {name: np.array(array, "<u4") for name, array in numbers.items()}
    return {**arrays, "TOKEN_BYTES": np.frombuffer(b"".join(in_bytes), np.uint8)}
