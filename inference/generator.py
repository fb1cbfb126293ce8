"""Continues texts with a model: the window of tokens that it sees."""

from collections.abc import Callable, Iterator

import numpy as np

from backend.arrays import copy_in, copy_out
from backend.errors import UserError
from backend.jit_cache import CachedJit
from gpt_tiny import GPT
from inference.decoder import Decoder


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
