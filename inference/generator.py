"""Continues texts with a model: one step with its caches, and the window of tokens that it sees."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from tinygrad import Context, Tensor, Variable
from tinygrad.nn.state import get_parameters

from backend.arrays import copy_in, copy_out, from_numpy, zeros
from backend.errors import UserError
from backend.jit_cache import CachedJit
from backend.matmul import few_vectors
from backend.quantized import QMAX, quantize_matrix
from gpt_tiny import GPT, KeyValueCache


class Decoder:
    """A model with its caches for `batch` texts, which it reads by 1 or by `chunk` tokens at once.

    By this number n, `ids` has a buffer (batch, n) for a step's ids, and `ranges` the values that
    its numbers may have. A step leaves `logits` (batch, vocab_size); beside its ids, it reads and
    writes `buffers`.
    """

    def __init__(self, model: GPT, batch: int = 1, chunk: int = 128):
        self.model, self.context_length = model, model.config.context_length
        self.chunk = min(chunk, self.context_length)
        self.caches = [KeyValueCache(model.config, batch) for _ in model.blocks]
        self.logits = zeros(batch, model.config.vocab_size)
        self.ids = {n: from_numpy(np.zeros((batch, n), np.int32)) for n in (1, self.chunk)}
        self.ranges = {
            n: {"end": range(n, self.context_length + 1), "last": range(n)} for n in self.ids
        }
        self.weights = list(model.parameters().values())
        self.buffers = [*self.weights, *get_parameters(self.caches), self.logits]

    def step(self, ids: Tensor, end: Variable, last: Variable) -> None:
        """ids (batch, n) at the positions to before `end`; leaves the logits after the one with
        index `last`. The tokens to its right do not matter: the mask is causal."""
        with few_vectors():
            x = self.model.hidden_states(ids, cache=self.caches, start=end - ids.shape[1])
            self.logits.assign(self.model.head(x[:, last : last + 1])[:, 0]).realize()


class Generator:
    """Continues `batch` texts with a model.

    While the context has room, a token costs one row through the model; the rest is in the caches.
    Then every new token shifts all positions, which are learned and absolute, and the window is
    computed anew: for each token, or with `stride` N once for N, the N oldest dropped at a time.
    UserError for a stride beyond the model's context.
    """

    def __init__(self, model: GPT, batch: int = 1, stride: int = 1):
        self.context_length, self.stride = model.config.context_length, stride
        if stride > self.context_length:
            raise UserError(f"a stride of {stride} is beyond the context of {self.context_length}")
        n_refilled = self.context_length - stride + 1  # of a full window, read anew
        self.decoder = Decoder(model, batch, chunk=min(128, max(32, n_refilled)))
        self.steps = {
            n: CachedJit(self.decoder.step, self.decoder.buffers, (model.config, n), **ranges)
            for n, ranges in self.decoder.ranges.items()
        }

    def __call__(
        self, ids: np.ndarray, n_new_tokens: int, sampler: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Yields the new ids (batch,) one by one; ids (batch, time) are the prompts.

        `sampler` takes logits (batch, vocab_size) and returns ids (batch,). UserError where logits
        are not finite.
        """
        window, n_cached = ids[:, -self.context_length :], 0
        for _ in range(n_new_tokens):
            if window.shape[1] > self.context_length:
                window, n_cached = window[:, self.stride :], 0
            logits, n_cached = self._read(window, n_cached), window.shape[1]
            if not np.isfinite(logits).all():
                raise UserError("the model's logits are not finite: its weights are far too large")
            new = sampler(logits)
            yield new
            window = np.concatenate([window, new[:, None]], axis=1)

    def _read(self, window: np.ndarray, n_cached: int) -> np.ndarray:
        """Brings the caches up to the window's end; the logits after it."""
        n = 1 if window.shape[1] - n_cached == 1 else self.decoder.chunk
        ids, step = self.decoder.ids[n], self.steps[n]
        for start in range(n_cached, window.shape[1], n):
            start = min(start, self.context_length - n)
            chunk = window[:, start : start + n]
            padded = np.zeros(ids.shape, np.int32)
            padded[:, : chunk.shape[1]] = chunk
            copy_in(ids, padded)
            step(ids, end=start + n, last=chunk.shape[1] - 1)
        return copy_out(self.decoder.logits)


def quantize(model: GPT, kind: str) -> None:
    """Puts a QuantizedMatrix, "int8" or "float16", in the place of each matrix of a product.

    ValueError for another kind.
    """
    if kind not in QMAX:
        raise ValueError(f"weights are rounded to {' or '.join(QMAX)}, not {kind!r}")
    tables = {"positional_embedding.weight"}
    if not model.config.gpt2:  # whose head is its token embedding
        tables.add("token_embedding.weight")
    parameters = model.parameters()
    with Context(LRU=0):  # tinygrad keeps no memory of what is replaced
        for name in list(parameters):
            parameter = parameters.pop(name)
            if name.endswith(".weight") and name not in tables:
                *path, last = name.split(".")
                layer = functools.reduce(child, path, model)
                setattr(layer, last, quantize_matrix(parameter, kind))


def child(parent: object, key: str) -> object:
    return parent[int(key)] if key.isdigit() else getattr(parent, key)
