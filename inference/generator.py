"""Continues texts with a model: the window of tokens that it sees, and the choice of the next."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from tinygrad import Context, Tensor, Variable
from tinygrad.nn.state import get_parameters

from backend.arrays import copy_in, copy_out, from_numpy, zeros
from backend.cpu.gemv import few_vectors
from backend.errors import UserError
from backend.jit_cache import CachedJit
from backend.matmul import FEW_VECTORS
from backend.quantized import QMAX, QuantizedMatrix
from gpt_tiny import GPT, KeyValueCache


class Generator:
    """Continues texts with a model.

    While the context has room, a token costs one row through the model; the rest is in the cache.
    Then every new token shifts all positions, which are learned and absolute, and the window is
    computed anew: for each token, or with `stride` N once for N, the N oldest dropped at a time.
    `weights`, "int8" or "float16", is what the model's matrices are rounded to, in place.
    ValueError for other weights, and for a stride beyond the model's context.
    """

    def __init__(self, model: GPT, batch: int = 1, stride: int = 1, weights: str | None = None):
        if weights not in (None, *QMAX):
            raise UserError(f"weights are rounded to {' or '.join(QMAX)}, not {weights!r}")
        if weights:
            quantize(model, weights)
        self.model, self.stride = model, stride
        self.context_length = model.config.context_length
        if stride > self.context_length:
            raise UserError(f"a stride of {stride} is beyond the context of {self.context_length}")
        # tokens of a prompt that are read at once: past the window, what a stride leaves
        left = self.context_length - stride + 1
        self.chunk = min(self.context_length, 128, max(32, left))
        self.cache = [KeyValueCache(model.config, batch) for _ in model.blocks]
        self.logits = zeros(batch, model.config.vocab_size)
        state = [*model.parameters().values(), *get_parameters(self.cache), self.logits]
        self.steps = {}  # by the number of tokens that they take, with a buffer for these
        for n in (1, self.chunk):
            ids = from_numpy(np.zeros((batch, n), np.int32))
            values = {"end": range(n, self.context_length + 1), "last": range(n)}
            self.steps[n] = ids, CachedJit(self.step, state, (model.config, n), **values)

    def step(self, ids: Tensor, end: Variable, last: Variable) -> None:
        """ids (batch, time) at the positions to before `end`; leaves the logits after the one with
        index `last` in `self.logits`. What stands to its right can't matter: the mask is causal."""
        with Context(FEW_VECTORS=FEW_VECTORS.value or few_vectors()):
            x = self.model.hidden_states(ids, cache=self.cache, start=end - ids.shape[1])
            self.logits.assign(self.model.head(x[:, last : last + 1])[:, 0]).realize()

    def __call__(
        self, ids: np.ndarray, n_new_tokens: int, choose: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Yields the new ids (batch,) one by one; ids (batch, time) are the prompts.

        `choose` takes logits (batch, vocab_size) and returns ids (batch,). ValueError where
        logits are not finite.
        """
        window, n_cached = ids[:, -self.context_length :], 0
        for _ in range(n_new_tokens):
            if window.shape[1] > self.context_length:
                window, n_cached = window[:, self.stride :], 0
            logits, n_cached = self._next(window, n_cached), window.shape[1]
            if not np.isfinite(logits).all():
                raise UserError("the model's logits are not finite: its weights are far too large")
            new = choose(logits)
            yield new
            window = np.concatenate([window, new[:, None]], axis=1)

    def _next(self, window: np.ndarray, n_cached: int) -> np.ndarray:
        """Brings the cache up to the window's end; the logits after it."""
        if window.shape[1] - n_cached == 1:
            return self._run(window[:, n_cached:], n_cached, 0)
        for start in range(n_cached, window.shape[1], self.chunk):
            start = min(start, self.context_length - self.chunk)
            piece = window[:, start : start + self.chunk]
            padded = np.pad(piece, ((0, 0), (0, self.chunk - piece.shape[1])))
            logits = self._run(padded, start, piece.shape[1] - 1)
        return logits

    def _run(self, ids: np.ndarray, start: int, last: int) -> np.ndarray:
        buffer, step = self.steps[ids.shape[1]]
        copy_in(buffer, ids.astype(np.int32, copy=False))
        step(buffer, end=start + ids.shape[1], last=last)
        return copy_out(self.logits)


def quantize(model: GPT, kind: str) -> None:
    """Puts QuantizedMatrix in the place of all that tokens are multiplied by."""
    tables = {"positional_embedding.weight"}
    if not model.config.gpt2:  # whose head is its token embedding
        tables.add("token_embedding.weight")
    parameters = model.parameters()
    with Context(LRU=0):  # tinygrad keeps no memory of what is replaced
        for name in list(parameters):
            parameter = parameters.pop(name)
            if name.endswith(".weight") and name not in tables:
                *path, last = name.split(".")
                rounded = QuantizedMatrix.of(parameter, kind)
                setattr(functools.reduce(child, path, model), last, rounded)


def child(parent: object, key: str) -> object:
    return parent[int(key)] if key.isdigit() else getattr(parent, key)


def sample(
    logits: np.ndarray,
    temperature: float,
    rng: np.random.Generator,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """logits (batch, vocab_size) -> ids (batch,), drawn from softmax(logits / temperature).

    Temperature 0 takes the likeliest token. `top_k` leaves as many of the likeliest in the draw,
    `top_p` as few of them as have that share of the probability (Holtzman et al., 2019).
    """
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
    places = (totals <= (rng.random(len(logits)) * totals[:, -1])[:, None]).sum(-1)
    return np.take_along_axis(order, places[:, None], -1)[:, 0]
