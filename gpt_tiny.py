"""A GPT in one file: the model, its loss and its KV cache.

Read top-down: the GPT first, its parts after.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from backend import attention, einsum, embedding, erf, from_numpy, layer_norm, positions, zeros


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT: gpt-burn's or, with `gpt2`, OpenAI's GPT-2.

    GPT-2 has biases in its attention, the tanh approximation of GELU unless `exact_gelu`, the
    standard layer norm, and a head tied to the token embedding. ValueError for impossible sizes.
    """

    context_length: int = 64
    vocab_size: int = 104
    n_layers: int = 2
    n_heads: int = 2
    d_model: int = 64
    d_hidden: int = 256
    dropout: float = 0.2
    gpt2: bool = False
    exact_gelu: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number above 0, not {value!r:.60}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} must be true or false, not {value!r:.60}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r:.60}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")

    @property
    def n_parameters(self) -> int:
        """In closed form: a damaged config may ask for more layers than can be built."""
        d_model, d_hidden = self.d_model, self.d_hidden
        block = 4 * d_model**2 + 2 * d_model * d_hidden + d_hidden + 5 * d_model
        block += 4 * d_model if self.gpt2 else 0
        embeddings = (self.vocab_size + self.context_length) * d_model
        head = 0 if self.gpt2 else (d_model + 1) * self.vocab_size
        return embeddings + self.n_layers * block + 2 * d_model + head


def no_dropout(x: Tensor) -> Tensor:
    return x


class Layers:
    """The layers of a GPT. Their parameters have shapes, but no memory yet."""

    def __init__(self, config: GPTConfig):
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.positional_embedding = Embedding(config.context_length, config.d_model)
        self.blocks = [Block(config) for _ in range(config.n_layers)]
        self.norm = LayerNorm(config)
        self.linear = None if config.gpt2 else Linear(config.d_model, config.vocab_size)

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by gpt-burn's names. The weight of a linear layer is (out, in)."""
        return get_state_dict(self)


class GPT(Layers):
    """GPT-2 (Radford et al., 2019), to the letter or as gpt-burn builds it.

    `weights` maps each name in `shapes(config)` to an array, which is copied, or to a tensor, which
    is shared. ValueError for missing or additional names and for wrong shapes.
    """

    def __init__(self, config: GPTConfig, weights: Mapping[str, np.ndarray | Tensor]):
        super().__init__(config)
        self.config, parameters = config, self.parameters()
        if unmatched := parameters.keys() ^ weights.keys():
            raise ValueError(f"the config and the weights do not agree on {min(unmatched)}")
        for name, parameter in parameters.items():
            weight = weights[name]
            if weight.shape != parameter.shape:
                raise ValueError(f"{name} is {weight.shape}, and must be {parameter.shape}")
            parameter.replace(weight if isinstance(weight, Tensor) else from_numpy(weight))

    def __call__(self, ids: Tensor, dropout: Callable = no_dropout) -> Tensor:
        """ids (batch, time) -> logits (batch, time, vocab_size)"""
        return self.head(self.hidden_states(ids, dropout))

    def hidden_states(
        self, ids: Tensor, dropout: Callable = no_dropout, cache=None, start=0
    ) -> Tensor:
        """ids (batch, time) at the positions from `start` on -> (batch, time, d_model)"""
        positional = self.positional_embedding.weight[start : start + ids.shape[1]]
        x = dropout(self.token_embedding(ids) + positional)
        for block, block_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, dropout, block_cache, start)
        return x

    def head(self, x: Tensor) -> Tensor:
        """x (batch, time, d_model) -> logits (batch, time, vocab_size)"""
        x = self.norm(x)
        if self.linear:
            return self.linear(x)
        return einsum("btd,vd->btv", x, self.token_embedding.weight)

    def loss(self, ids: Tensor, targets: Tensor, dropout: Callable = no_dropout) -> Tensor:
        """ids, targets (batch, time) -> mean cross-entropy in nats per token"""
        return self(ids, dropout).sparse_categorical_crossentropy(targets)


class Block:
    """Attention, then a feed-forward network; both read the normalised residual stream."""

    def __init__(self, config: GPTConfig):
        self.norm_1 = LayerNorm(config)
        self.multi_head = MultiHeadAttention(config)
        self.norm_2 = LayerNorm(config)
        self.pwff = PositionWiseFeedForward(config)

    def __call__(self, x: Tensor, dropout: Callable, cache, start) -> Tensor:
        x = x + self.multi_head(self.norm_1(x), dropout, cache, start)
        return x + self.pwff(self.norm_2(x), dropout)


class MultiHeadAttention:
    """Causal scaled dot-product attention (Vaswani et al., 2017)."""

    def __init__(self, config: GPTConfig):
        self.n_heads = config.n_heads
        for name in ("query", "key", "value", "out"):
            setattr(self, name, Linear(config.d_model, config.d_model, bias=config.gpt2))

    def __call__(self, x: Tensor, dropout: Callable, cache, start) -> Tensor:
        batch, time, d_model = x.shape
        query, key, value = (
            project(x).reshape(batch, time, self.n_heads, -1)
            for project in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = cache.store(key, value, start)  # of all positions so far: (b, k, h, d)
        if cache or (mixed := attention(query, key, value, dropout)) is None:  # no kernel here
            scores = einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
            is_past = positions(key.shape[1]) <= (positions(time) + start).unsqueeze(-1)  # (q, k)
            weights = dropout(softmax(is_past.where(scores, -math.inf)))  # (b, h, q, k)
            mixed = einsum("bhqk,bkhd->bqhd", weights, value)  # (b, q, h, d)
        return self.out(dropout(mixed.reshape(batch, time, d_model)))


class PositionWiseFeedForward:
    def __init__(self, config: GPTConfig):
        self.linear_1 = Linear(config.d_model, config.d_hidden)
        self.linear_2 = Linear(config.d_hidden, config.d_model)
        self.gelu = gelu_tanh if config.gpt2 and not config.exact_gelu else gelu

    def __call__(self, x: Tensor, dropout: Callable) -> Tensor:
        # stores the gradient: its sum for the bias would otherwise recompute GELU's
        return dropout(self.linear_2(self.gelu(self.linear_1(x).contiguous_backward())))


class LayerNorm:
    """Layer norm (Ba et al., 2016). GPT-2 adds epsilon to the variance, Burn to the deviation;
    1e-30 gives Burn's square root a gradient in rows that dropout has zeroed."""

    def __init__(self, config: GPTConfig):
        self.epsilons = (1e-5, 0) if config.gpt2 else (1e-30, 1e-5)
        self.gamma = Tensor.empty(config.d_model)
        self.beta = Tensor.empty(config.d_model)

    def __call__(self, x: Tensor) -> Tensor:
        if (y := layer_norm(x, self.gamma, self.beta, self.epsilons)) is None:  # no kernel here
            centred = x - x.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            deviation = (variance + self.epsilons[0]).sqrt() + self.epsilons[1]
            y = centred / deviation * self.gamma + self.beta
        return y


class Linear:
    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        self.weight = Tensor.empty(n_out, n_in)
        self.bias = Tensor.empty(n_out) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = einsum("bti,oi->bto", x, self.weight)
        return y if self.bias is None else y + self.bias


class Embedding:
    """ids (batch, time) -> rows of the table (batch, time, d_model)"""

    def __init__(self, n_rows: int, d_model: int):
        self.weight = Tensor.empty(n_rows, d_model)

    def __call__(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


def softmax(x: Tensor) -> Tensor:
    # stored: the sum below and the gradient would otherwise recompute the exponentials
    exponentials = (x - x.max(-1, keepdim=True).detach()).exp().contiguous()
    return exponentials / exponentials.sum(-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, from the same paper."""
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


class Dropout:
    """Zeroes elements with probability `rate`, and scales the others to keep the mean.

    A hash of `key` (uint32, new for each batch), of the number of the call and of the element's
    index decides: the same on every backend, without a state to save.
    """

    def __init__(self, rate: float, key: Tensor):
        self.rate, self.key = rate, key

    def __call__(self, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        bits = hash_32(Tensor.arange(x.numel(), dtype=dtypes.uint32) + self.next_key())
        return (bits.reshape(x.shape) >= int(self.rate * 2**32)).where(x / (1 - self.rate), 0)

    def next_key(self) -> Tensor:
        # stored: all blocks then share one kernel, compiled once
        self.key = hash_32(self.key + 0x9E3779B9).contiguous()
        return self.key


def hash_32(x: Tensor) -> Tensor:
    """Bijective hash of uint32; each input bit affects each output bit (C. Wellons, lowbias32)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by name."""
    return {name: parameter.shape for name, parameter in Layers(config).parameters().items()}


def initial_weights(config: GPTConfig, seed: int) -> dict[str, np.ndarray]:
    """Draws weights and biases from Normal(0, 0.02); norms are 1 and 0. In layers that end a
    residual branch the deviation is divided by sqrt(2 n_layers)."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config).items():
        if ".gamma" in name or ".beta" in name:
            weights[name] = np.full(shape, ".gamma" in name, np.float32)
            continue
        ends_branch = "multi_head.out." in name or "pwff.linear_2." in name
        deviation = 0.02 / math.sqrt(2 * config.n_layers) if ends_branch else 0.02
        normal = rng.standard_normal(shape, np.float32)
        weights[name] = np.multiply(normal, deviation, out=normal)
    return weights


class KeyValueCache:
    """Keys and values of one block for all tokens so far."""

    def __init__(self, config: GPTConfig, batch: int):
        shape = (batch, config.context_length, config.n_heads, config.d_model // config.n_heads)
        self.keys, self.values = zeros(*shape), zeros(*shape)

    def store(self, key: Tensor, value: Tensor, start) -> tuple[Tensor, Tensor]:
        """Writes (batch, time, n_heads, d_k) to the positions from `start` on; returns keys and
        values of all positions so far: (batch, start + time, n_heads, d_k)."""
        return self._put(self.keys, key, start), self._put(self.values, value, start)

    @staticmethod
    def _put(cache: Tensor, new: Tensor, start) -> Tensor:
        end = start + new.shape[1]
        written = cache[:, start:end].uop.store(new.uop)
        return Tensor(cache.uop.after(written))[:, :end]
