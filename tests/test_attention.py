"""Attention in blocks is what the formula says: its values, its gradients, its dropout."""

import numpy as np
import pytest
from tinygrad import Context, Device, Tensor

from backend import attention
from gpt_tiny import Dropout, GPTConfig, MultiHeadAttention, no_dropout

pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tests the backend DEV=CPU")


def dropout(rate: float):
    return Dropout(rate, Tensor(np.array([12345], np.uint32)).realize()) if rate else no_dropout


def formula(query, key, value, factors, of_mixed) -> list[np.ndarray]:
    """The values and the three gradients, for what dropout multiplies weights by: (b, h, t, t)."""
    time, scale = query.shape[1], query.shape[-1] ** -0.5
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(time)
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("bqhd,bkhd->bhqk", of_mixed, value) * factors
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * scale
    return [
        np.einsum("bhqk,bkhd->bqhd", weights * factors, value),
        np.einsum("bhqk,bkhd->bqhd", of_scores, key),
        np.einsum("bhqk,bqhd->bkhd", of_scores, query),
        np.einsum("bhqk,bqhd->bkhd", weights * factors, of_mixed),
    ]


@pytest.mark.parametrize(
    ("shape", "rate"),
    [
        ((2, 1, 2, 4), 0),  # one token
        ((1, 97, 1, 5), 0.2),  # one head, and one row more than a block has
        ((2, 205, 3, 19), 0.2),  # three blocks, and heads that the cores share unevenly
        ((1, 192, 2, 16), 0),  # whole blocks and vectors
        ((1, 8, 2, 128), 0.7),  # as much as a head may have, and most of it dropped
    ],
)
def test_blocks_give_the_formulas_values_and_gradients(shape, rate):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    *operands, of_mixed = [Tensor(array).realize() for array in arrays]
    mixed = attention(*operands, dropout(rate))
    results = mixed, *mixed.gradient(*operands, gradient=of_mixed)
    Tensor.realize(*results)
    batch, time, n_heads, _ = shape
    factors = np.ones((batch, n_heads, time, time))
    if rate:
        factors = dropout(rate)(Tensor(factors.astype(np.float32)).realize()).numpy()
    query, key, value, of_mixed = (array.astype(np.float64) for array in arrays)
    expected = formula(query, key, value, factors, of_mixed)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-6 * (time**0.5 + 5))


def test_a_layer_computes_the_same_by_blocks_and_by_the_formula():
    rng = np.random.default_rng(1)
    layer = MultiHeadAttention(GPTConfig(d_model=4, n_heads=2))
    for linear in (layer.query, layer.key, layer.value, layer.out):
        linear.weight = Tensor(rng.standard_normal((4, 4), np.float32)).realize()
    x = Tensor(rng.standard_normal((2, 9, 4), np.float32)).realize()

    def value_and_gradient() -> list[np.ndarray]:
        y = layer(x, dropout(0.2), None, 0)
        tensors = y, *y.square().sum().gradient(x)
        Tensor.realize(*tensors)
        return [tensor.numpy() for tensor in tensors]

    ours = value_and_gradient()
    with Context(ATTENTION_BLOCKS=0):
        theirs = value_and_gradient()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(ours[1], theirs[1])  # they are two


def test_the_formula_is_left_what_blocks_have_no_room_for():
    x = Tensor(np.ones((1, 2, 1, 129), np.float32)).realize()
    assert attention(x, x, x, no_dropout) is None
