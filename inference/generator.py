"""Continues texts with a model: one step with KV caches, the window, and the next token."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tinygrad import Context, Tensor, Variable
from tinygrad.nn.state import get_parameters, get_state_dict

from backend.arrays import copy_in, copy_out, from_numpy, zeros
from backend.errors import UserError
from backend.jit_cache import CachedJit
from backend.matmul import few_vectors
from backend.quantized import QMAX, quantize_matrix
from gpt_tiny import GPT, KeyValueCache, Linear


class Decoder:
    """A model with KV caches for `batch` texts. A step reads n tokens of each text: one, or
    `n_prefill` of a prompt.

    `ids[n]` is the buffer (batch, n) of a step's ids, `ranges[n]` the ranges of a step's variables.
    A step writes `logits` (batch, vocab_size), and uses no tensors but `ids[n]` and `buffers`.
    """

    def __init__(self, model: GPT, batch: int = 1, n_prefill: int = 128):
        self.model, self.context_length = model, model.config.context_length
        self.n_prefill = min(n_prefill, self.context_length)
        self.caches = [KeyValueCache(model.config, batch) for _ in model.blocks]
        self.logits = zeros(batch, model.config.vocab_size)
        self.ids = {n: from_numpy(np.zeros((batch, n), np.int32)) for n in (1, self.n_prefill)}
        self.ranges = {
            n: {"end": range(n, self.context_length + 1), "last": range(n)} for n in self.ids
        }
        self.weights = list(model.parameters().values())
        self.buffers = [*self.weights, *get_parameters(self.caches), self.logits]

    def step(self, ids: Tensor, end: Variable, last: Variable) -> None:
        """Reads ids (batch, n) at the n positions before `end`; writes the logits after the id with
        index `last`. Ids behind `last` are padding: the mask is causal."""
        with few_vectors():
            x = self.model.hidden_states(ids, cache=self.caches, start=end - ids.shape[1])
            self.logits.assign(self.model.head(x[:, last : last + 1])[:, 0]).realize()


class Generator:
    """Continues `batch` texts with a model.

    While the context has room, the model computes one position per new token, with the KV caches.
    In a full window each new token shifts all positions, which are learned and absolute: the caches
    are refilled, for every token or, with `stride` N, after each drop of the N oldest tokens.
    UserError for a stride beyond the model's context.
    """

    def __init__(self, model: GPT, batch: int = 1, stride: int = 1):
        self.context_length, self.stride = model.config.context_length, stride
        if stride > self.context_length:
            raise UserError(f"a stride of {stride} is beyond the context of {self.context_length}")
        n_refilled = self.context_length - stride + 1  # tokens that refill the caches
        self.decoder = Decoder(model, batch, n_prefill=min(128, max(32, n_refilled)))
        self.steps = {
            n: CachedJit(self.decoder.step, self.decoder.buffers, (model.config, n), **ranges)
            for n, ranges in self.decoder.ranges.items()
        }

    def __call__(
        self, ids: np.ndarray, n_new_tokens: int, sampler: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Yields new ids (batch,) one by one; ids (batch, time) are the prompts.

        `sampler` maps logits (batch, vocab_size) to ids (batch,). UserError for logits that are not
        finite.
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
        """Fills the caches to the end of the window; returns the logits (batch, vocab_size)."""
        n = 1 if window.shape[1] - n_cached == 1 else self.decoder.n_prefill
        ids, step = self.decoder.ids[n], self.steps[n]
        for start in range(n_cached, window.shape[1], n):
            start = min(start, self.context_length - n)
            read = window[:, start : start + n]
            padded = np.zeros(ids.shape, np.int32)
            padded[:, : read.shape[1]] = read
            copy_in(ids, padded)
            step(ids, end=start + n, last=read.shape[1] - 1)
        return copy_out(self.decoder.logits)


def sample(
    logits: np.ndarray,
    temperature: float,
    rng: np.random.Generator,
    top_k: int | None = None,
    top_p: float | None = None,
    excluded: Sequence[int] = (),
) -> np.ndarray:
    """logits (batch, vocab_size) -> ids (batch,), drawn from softmax(logits / temperature).

    Temperature 0 takes the likeliest id. `top_k` draws from the k likeliest ids, `top_p` from the
    fewest likeliest ids with that share of the probability (nucleus sampling, Holtzman et al.,
    2019). `excluded` ids are never drawn.
    """
    if len(excluded):
        logits = logits.copy()
        logits[:, excluded] = -np.inf
    if temperature == 0:
        return logits.argmax(-1)
    weights = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float64) / temperature)
    order = np.argsort(-weights, axis=-1, kind="stable")
    weights = np.take_along_axis(weights, order, -1)  # the likeliest first
    if top_k is not None:
        weights[:, top_k:] = 0
    totals = weights.cumsum(-1)
    if top_p is not None:
        weights[:, 1:][(totals - weights >= top_p * totals[:, -1:])[:, 1:]] = 0
    totals = weights.cumsum(-1)
    indices = (totals <= (rng.random(len(logits)) * totals[:, -1])[:, None]).sum(-1)
    return np.take_along_axis(order, indices[:, None], -1)[:, 0]


def quantize(model: GPT, kind: str) -> None:
    """Quantizes the matrices of all products to "int8" or "float16"; ValueError for other kinds."""
    if kind not in QMAX:
        raise ValueError(f"weights are rounded to {' or '.join(QMAX)}, not {kind!r}")
    layers = list(get_state_dict(model, tensor_type=Linear).values())
    if model.config.gpt2:  # the token embedding is the head as well
        layers.append(model.token_embedding)
    with Context(LRU=0):  # frees the memory of replaced tensors
        for layer in layers:
            layer.weight = quantize_matrix(layer.weight, kind)
