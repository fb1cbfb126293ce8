"""Scores a model on a text in bits per byte, which compare models with different tokenizers."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from tinygrad import Tensor, Variable

from backend.arrays import copy_in, copy_out, from_numpy, zeros
from backend.errors import UserError
from backend.jit_cache import CachedJit
from gpt_tiny import GPT
from tokenizers import Tokenizer, Unknown

BATCH_TOKENS = 2048  # tokens in a batch of windows
BATCH_LOGITS = 1 << 24  # logits of a batch, 64 MB; one window may have more


def known_ids(tokenizer: Tokenizer, chunks: Iterable[str]) -> tuple[np.ndarray, Unknown]:
    """Ids (n,) of the known tokens of a text, and counts of the unknown tokens."""
    ids, unknown = bytearray(), Unknown()  # a bytearray grows in place
    for known in tokenizer.encode_chunks(chunks, unknown):
        ids += known.tobytes()
    return np.frombuffer(ids, tokenizer.dtype), unknown


def losses(model: GPT, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """ids (n,) -> batches of ids[1:] and of their losses in nats, together (n - 1,) each.

    Windows of the context's length move by half a window, and count new tokens only: past the first
    window, each token is predicted from at least half a window. UserError for logits that are not
    finite.
    """
    if len(ids) < 2:
        return
    context_length, vocab_size = model.config.context_length, model.config.vocab_size
    n_seen = context_length // 2  # tokens of a window that the previous window has seen
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
    # the first half of the first window is a batch by itself; later batches are second halves
    offset, start, n_counted = 0, 0, n_seen
    while offset < len(ids) - 1:
        first = offset + half * np.arange(n_windows)[:, None]  # (n_windows, 1): before the targets
        copy_in(inputs, take_clipped(ids, first - start + np.arange(context_length)))
        copy_in(targets, take_clipped(ids, first + 1 + np.arange(half)))
        jit(inputs, targets, start=start)
        counted = ids[offset + 1 :][:n_counted]
        loss = copy_out(nats).ravel()[: len(counted)]
        if not np.isfinite(loss).all():
            raise UserError("the model's logits are not finite: its weights are far too large")
        yield counted, loss
        offset, start, n_counted = offset + n_counted, n_seen, n_windows * half


def take_clipped(ids: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """ids at the indices; past the end the last id, masked in inputs and not counted in targets."""
    return ids.take(indices, mode="clip").astype(np.int32)


class Score:
    """Sums the losses of tokens, their bytes and their characters.

    The end of a document has a loss but no bytes: predicting a text includes predicting its end.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.bits, self.n_tokens, self.n_bytes, self.n_characters = 0.0, 0, 0, 0
        self.sizes = np.array([len(token) for token in tokenizer.tokens])
        # a character counts where its first byte is: tokens may split characters
        is_first = [[byte & 0xC0 != 0x80 for byte in token] for token in tokenizer.tokens]
        self.n_first = np.array([sum(flags) for flags in is_first])

    def add(self, ids: np.ndarray, nats: np.ndarray) -> None:
        """Adds ids (n,) and their losses (n,) in nats."""
        self.bits += nats.sum(dtype=np.float64) / math.log(2)
        self.n_tokens += len(ids)
        self.n_bytes += self.sizes[ids].sum()
        self.n_characters += self.n_first[ids].sum()

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite if the exponential overflows."""
        with np.errstate(over="ignore"):
            return np.exp2(self.bits / self.n_tokens)
