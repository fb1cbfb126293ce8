"""One step of decoding: a model reads a few tokens more, and its caches hold all before these."""

import functools

import numpy as np
from tinygrad import Context, Tensor, Variable
from tinygrad.nn.state import get_parameters

from backend.arrays import from_numpy, zeros
from backend.matmul import few_vectors
from backend.quantized import QMAX, QuantizedMatrix
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
                setattr(layer, last, QuantizedMatrix.of(parameter, kind))


def child(parent: object, key: str) -> object:
    return parent[int(key)] if key.isdigit() else getattr(parent, key)
