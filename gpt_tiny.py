"""A GPT, whole: the model, its loss, its optimizer and its generation of text.

Read it from the top: the GPT first, its parts after.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from cpu import einsum  # first of all: it prepares the CPU backend for tinygrad
from tinygrad import Tensor, TinyJit, Variable, dtypes
from tinygrad.nn.state import get_state_dict


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT. Raises ValueError for sizes that no model can have."""

    context_length: int = 64
    vocab_size: int = 104
    n_layers: int = 2
    n_heads: int = 2
    d_model: int = 64
    d_hidden: int = 256
    dropout: float = 0.2

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number above 0, not {value!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")

    @property
    def n_parameters(self) -> int:
        d_model, d_hidden = self.d_model, self.d_hidden
        block = 4 * d_model**2 + 2 * d_model * d_hidden + d_hidden + 5 * d_model
        embeddings = (self.vocab_size + self.context_length) * d_model
        head = (d_model + 1) * self.vocab_size
        return embeddings + self.n_layers * block + 2 * d_model + head


def no_dropout(x: Tensor) -> Tensor:
    return x


class GPT:
    """GPT-2 (Radford et al., 2019) as gpt-burn builds it: the head is a layer of its own."""

    def __init__(self, config: GPTConfig, weights: dict[str, np.ndarray] | None = None):
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.positional_embedding = Embedding(config.context_length, config.d_model)
        self.blocks = [Block(config) for _ in range(config.n_layers)]
        self.norm = LayerNorm(config.d_model)
        self.linear = Linear(config.d_model, config.vocab_size)
        for name, array in (weights or {}).items():
            self.parameters()[name].replace(Tensor(array).realize())

    def __call__(self, ids: Tensor, dropout: Callable = no_dropout) -> Tensor:
        """ids (batch, time) -> logits (batch, time, vocab_size)"""
        return self.head(self.trunk(ids, dropout))

    def trunk(self, ids: Tensor, dropout: Callable = no_dropout, cache=None, start=0) -> Tensor:
        """ids (batch, time) at the positions from `start` on -> (batch, time, d_model)"""
        positions = self.positional_embedding.weight[start : start + ids.shape[1]]
        x = dropout(self.token_embedding(ids) + positions)
        for block, block_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, dropout, block_cache, start)
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def loss(self, ids: Tensor, targets: Tensor, dropout: Callable = no_dropout) -> Tensor:
        """ids, targets (batch, time) -> mean cross-entropy, nats a token"""
        logits = self(ids, dropout)
        return logits.sparse_categorical_crossentropy(targets)

    def parameters(self) -> dict[str, Tensor]:
        """Name -> parameter. The names are gpt-burn's; a linear's weight is (out, in)."""
        return get_state_dict(self)


class Block:
    """Attention, then a feed-forward network, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPTConfig):
        self.norm_1 = LayerNorm(config.d_model)
        self.multi_head = MultiHeadAttention(config)
        self.norm_2 = LayerNorm(config.d_model)
        self.pwff = PositionWiseFeedForward(config)

    def __call__(self, x: Tensor, dropout: Callable, cache, start) -> Tensor:
        x = x + self.multi_head(self.norm_1(x), dropout, cache, start)
        return x + self.pwff(self.norm_2(x), dropout)


class MultiHeadAttention:
    """Causal scaled dot-product attention (Vaswani et al., 2017)."""

    def __init__(self, config: GPTConfig):
        self.n_heads = config.n_heads
        for name in ("query", "key", "value", "out"):
            setattr(self, name, Linear(config.d_model, config.d_model, bias=False))

    def __call__(self, x: Tensor, dropout: Callable, cache, start) -> Tensor:
        batch, time, d_model = x.shape
        d_k = d_model // self.n_heads
        query, key, value = (
            project(x).reshape(batch, time, self.n_heads, d_k)
            for project in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = cache.store(key, value, start)
        scores = einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(d_k)
        is_past = Tensor.arange(key.shape[1]) <= (Tensor.arange(time) + start).unsqueeze(-1)
        weights = dropout(softmax(is_past.where(scores, -math.inf)))
        mixed = einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, time, d_model)
        return self.out(dropout(mixed))


class PositionWiseFeedForward:
    def __init__(self, config: GPTConfig):
        self.linear_1 = Linear(config.d_model, config.d_hidden)
        self.linear_2 = Linear(config.d_hidden, config.d_model)

    def __call__(self, x: Tensor, dropout: Callable) -> Tensor:
        # the boundary keeps the sum that is the bias's gradient from computing GELU's anew
        return dropout(self.linear_2(gelu(self.linear_1(x).contiguous_backward())))


class LayerNorm:
    """Burn's layer norm: it adds epsilon to the standard deviation, not to the variance."""

    def __init__(self, d_model: int):
        self.gamma = Tensor.empty(d_model)
        self.beta = Tensor.empty(d_model)

    def __call__(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = centred.square().mean(-1, keepdim=True).sqrt()
        return centred / (deviation + 1e-5) * self.gamma + self.beta


class Linear:
    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        self.weight = Tensor.empty(n_out, n_in)
        self.bias = Tensor.empty(n_out) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = einsum("bti,oi->bto", x, self.weight)
        return y if self.bias is None else y + self.bias


class Embedding:
    """A row of the table for each id, as a product of one-hot rows: so is its gradient."""

    def __init__(self, n_rows: int, d_model: int):
        self.weight = Tensor.empty(n_rows, d_model)

    def __call__(self, ids: Tensor) -> Tensor:
        one_hot = (ids.unsqueeze(-1) == Tensor.arange(self.weight.shape[0])).cast(dtypes.float32)
        return einsum("btv,vd->btd", one_hot, self.weight)


def softmax(x: Tensor) -> Tensor:
    # stored, so that no sum over a row, here and in the gradient, computes exponentials anew
    exponentials = (x - x.max(-1, keepdim=True).detach()).exp().contiguous()
    return exponentials / exponentials.sum(-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + (x / math.sqrt(2)).erf())


class Dropout:
    """Zeroes a share `rate` of what it is called with, and scales the rest to keep the mean.

    Its random numbers are a hash of `key` (a uint32 tensor, new for each batch), of the number of
    the call and of the element's index: the same on every backend, and there is no state to save.
    """

    def __init__(self, rate: float, key: Tensor):
        self.rate, self.key, self.n_calls = rate, key, 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        self.n_calls += 1
        start = hash_32(self.key + self.n_calls)
        bits = hash_32(Tensor.arange(x.numel(), dtype=dtypes.uint32) + start).reshape(x.shape)
        return (bits >= int(self.rate * 2**32)).where(x / (1 - self.rate), 0)


def hash_32(x: Tensor) -> Tensor:
    """A bijection of uint32 in which every bit in changes every bit out (C. Wellons, lowbias32)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


def initial_weights(config: GPTConfig, seed: int) -> dict[str, np.ndarray]:
    """Normal(0, 0.02), also for biases; what ends a residual branch by sqrt(2 n_layers) less."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, parameter in GPT(config).parameters().items():
        if ".gamma" in name or ".beta" in name:
            weights[name] = np.full(parameter.shape, ".gamma" in name, np.float32)
            continue
        ends_branch = "multi_head.out." in name or "pwff.linear_2." in name
        deviation = 0.02 / math.sqrt(2 * config.n_layers) if ends_branch else 0.02
        normal = rng.standard_normal(parameter.shape, np.float32)
        weights[name] = np.multiply(normal, deviation, out=normal)
    return weights


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017), on every parameter alike."""

    def __init__(
        self,
        parameters: list[Tensor],
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-5,
        weight_decay: float = 1e-4,
    ):
        self.parameters = parameters
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.epsilon, self.weight_decay = epsilon, weight_decay
        self.moments_1, self.moments_2 = (
            [Tensor.zeros(p.shape).contiguous().realize() for p in parameters] for _ in range(2)
        )

    def rates(self, learning_rate: float, number: int) -> list[float]:
        """What `step` needs for the update with this number, counted from 1."""
        return [
            learning_rate,
            1 / (1 - self.beta_1**number),  # the moments start at 0: these undo the bias of that
            1 / (1 - self.beta_2**number),
        ]

    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        """Updates the parameters in place; `rates` (3,) holds the numbers of the method above."""
        learning_rate, unbias_1, unbias_2 = rates.split(1)
        for p, m, v, g in zip(
            self.parameters, self.moments_1, self.moments_2, gradients, strict=True
        ):
            m.assign(self.beta_1 * m + (1 - self.beta_1) * g)
            v.assign(self.beta_2 * v + (1 - self.beta_2) * g.square())
            update = m * unbias_1 / ((v * unbias_2).sqrt() + self.epsilon)
            p.assign(p - learning_rate * (update + self.weight_decay * p))
        Tensor.realize(*self.parameters, *self.moments_1, *self.moments_2)


class KeyValueCache:
    """The keys and values of one block for the tokens so far."""

    def __init__(self, config: GPTConfig, batch: int):
        shape = (batch, config.context_length, config.n_heads, config.d_model // config.n_heads)
        self.keys, self.values = (Tensor.zeros(shape).contiguous().realize() for _ in range(2))

    def store(self, key: Tensor, value: Tensor, start) -> tuple[Tensor, Tensor]:
        """Puts (batch, time, n_heads, d_k) at position `start`; returns (batch, context, ...)."""
        return self._put(self.keys, key, start), self._put(self.values, value, start)

    @staticmethod
    def _put(cache: Tensor, new: Tensor, start) -> Tensor:
        place = cache[:, start : start + new.shape[1]]
        return Tensor(cache.uop.after(place.uop.store(new.uop)))


class Generator:
    """Continues texts with a model.

    While the context has room, a token costs one row through the model; the rest is in the cache.
    Then every new token shifts all positions, which are learned and absolute, and the window is
    computed anew: for each token, or with `stride` N once for N, the N oldest dropped at a time.
    """

    def __init__(self, model: GPT, batch: int = 1, stride: int = 1):
        self.model, self.stride = model, stride
        self.context_length = model.config.context_length
        self.chunk = min(self.context_length, 128)  # tokens of a prompt that are read at once
        self.cache = [KeyValueCache(model.config, batch) for _ in model.blocks]
        self.read, self.extend = captured(self.logits), captured(self.logits)

    def logits(self, ids: Tensor, start: Variable, last: Variable) -> Tensor:
        """ids (batch, time) at the positions from `start` on -> logits (batch, vocab_size) after
        the one with index `last`. What stands to its right cannot matter: the mask is causal."""
        x = self.model.trunk(ids, cache=self.cache, start=start)
        return self.model.head(x[:, last : last + 1])[:, 0].realize()

    def __call__(
        self, ids: np.ndarray, n_new_tokens: int, choose: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Yields the new ids (batch,) one by one; ids (batch, time) are the prompts.

        `choose` takes logits (batch, vocab_size) and returns ids (batch,).
        """
        window, n_cached = ids[:, -self.context_length :], 0
        for _ in range(n_new_tokens):
            if window.shape[1] > self.context_length:
                window, n_cached = window[:, self.stride :], 0
            logits, n_cached = self._next(window, n_cached), window.shape[1]
            new = choose(logits)
            yield new
            window = np.concatenate([window, new[:, None]], axis=1)

    def _next(self, window: np.ndarray, n_cached: int) -> np.ndarray:
        """Brings the cache up to the window's end; the logits after it."""
        if window.shape[1] - n_cached == 1:
            return self._run(self.extend, window[:, n_cached:], n_cached, 0)
        for start in range(n_cached, window.shape[1], self.chunk):
            start = min(start, self.context_length - self.chunk)
            piece = window[:, start : start + self.chunk]
            padded = np.pad(piece, ((0, 0), (0, self.chunk - piece.shape[1])))
            logits = self._run(self.read, padded, start, piece.shape[1] - 1)
        return logits

    def _run(self, step: TinyJit, ids: np.ndarray, start: int, last: int) -> np.ndarray:
        start = Variable("start", 0, max(1, self.context_length - 1)).bind(start)
        last = Variable("last", 0, max(1, self.chunk - 1)).bind(last)
        return step(Tensor(ids.astype(np.int32)).realize(), start, last).numpy()


def sample(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """logits (batch, vocab_size) -> ids (batch,), drawn from softmax(logits / temperature).

    Temperature 0 takes the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weights = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float64) / temperature)
    totals = weights.cumsum(-1)
    draws = rng.random(len(logits)) * totals[:, -1]
    return (totals <= draws[:, None]).sum(-1)


def captured(function: Callable) -> TinyJit:
    """A TinyJit that captures at its first call.

    TinyJit would run the function plainly once before, which only state that is not realised needs.
    """
    jit = TinyJit(function)
    jit.cnt = 1
    return jit
