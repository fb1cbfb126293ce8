"""How well a model predicts a text: bits per byte, which compare models whatever their tokens."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from tinygrad import Tensor, Variable

from backend.arrays import copy_in, copy_out, from_numpy, zeros
from backend.errors import UserError
from backend.jit_cache import CachedJit
from gpt_tiny import GPT
from tokenizers import Tokenizer, Unknown

BATCH_TOKENS = 2048  # that the model reads at once, in as many windows
BATCH_LOGITS = 1 << 24  # that it gives at once, 64 MB of them, but for one window at least


def known_ids(tokenizer: Tokenizer, chunks: Iterable[str]) -> tuple[np.ndarray, Unknown]:
    """The ids of a text of any size, without the unknown ones, and the counts of these."""
    ids, unknown = bytearray(), Unknown()  # grows in place
    for known in tokenizer.encode_chunks(chunks, unknown):
        ids += known.tobytes()
    return np.frombuffer(ids, tokenizer.dtype), unknown


def losses(model: GPT, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """ids (n,) -> ids[1:] and the loss of each, in nats: (n - 1,) both, in batches.

    Windows of the context's length move by half of it, and count what they have not seen before:
    past the first window, each token is predicted from at least half a window. UserError where
    logits are not finite.
    """
    if len(ids) < 2:
        return
    context_length, vocab_size = model.config.context_length, model.config.vocab_size
    n_seen = context_length // 2  # of a window, by the one before
    half = context_length - n_seen
    n_windows = min(BATCH_TOKENS // context_length, BATCH_LOGITS // (half * vocab_size)) or 1
    inputs = from_numpy(np.zeros((n_windows, context_length), np.int32))
    targets = from_numpy(np.zeros((n_windows, half), np.int32))
    nats = zeros(n_windows, half)

    def compute_nats(inputs: Tensor, targets: Tensor, start: Variable) -> None:
        logits = model.head(model.hidden_states(inputs)[:, start : start + half])
        loss = logits.sparse_categorical_crossentropy(targets, reduction="none")
        nats.assign(loss).realize()

    buffers = [*model.parameters().values(), nats]
    jit = CachedJit(compute_nats, buffers, (model.config, n_windows), start=range(n_seen + 1))
    # the first window's first half is a batch of its own, the second is one like the others'
    place, start, n_counted = 0, 0, n_seen
    while place < len(ids) - 1:
        first = place + half * np.arange(n_windows)[:, None]  # that a target is predicted after
        copy_in(inputs, at(ids, first - start + np.arange(context_length)))
        copy_in(targets, at(ids, first + 1 + np.arange(half)))
        jit(inputs, targets, start=start)
        counted = ids[place + 1 :][:n_counted]
        loss = copy_out(nats).ravel()[: len(counted)]
        if not np.isfinite(loss).all():
            raise UserError("the model's logits are not finite: its weights are far too large")
        yield counted, loss
        place, start, n_counted = place + n_counted, n_seen, n_windows * half


def at(ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The ids there; past the end any will do: the mask is causal, and their loss not counted."""
    return ids[np.minimum(places, len(ids) - 1)].astype(np.int32)


class Score:
    """Sums up the losses of tokens, and the bytes and the characters that they stand for.

    The end of a document stands for none, and its loss counts: to foretell a text is to foretell
    where it ends.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.bits, self.n_tokens, self.n_bytes, self.n_characters = 0.0, 0, 0, 0
        self.sizes = np.array([len(token) for token in tokenizer.tokens])
        # a character is counted with its first byte: a token may end or begin in its midst
        is_first = [[byte & 0xC0 != 0x80 for byte in token] for token in tokenizer.tokens]
        self.n_first = np.array([sum(flags) for flags in is_first])

    def add(self, ids: np.ndarray, nats: np.ndarray) -> None:
        """ids (n,), and the loss of each: (n,)"""
        self.bits += nats.sum(dtype=np.float64) / math.log(2)
        self.n_tokens += len(ids)
        self.n_bytes += self.sizes[ids].sum()
        self.n_characters += self.n_first[ids].sum()

    @property
    def perplexity(self) -> float:
        """Infinite for a model that is sure of the wrong tokens."""
        with np.errstate(over="ignore"):
            return np.exp2(self.bits / self.n_tokens)
