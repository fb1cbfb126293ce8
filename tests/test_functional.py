"""Attention, layer norm, embedding and erf equal the plain formulas, and so do the gradients."""

import math

import numpy as np
import pytest
from tinygrad import Context, Device, Tensor

from backend import attention, einsum, embedding, erf
from gpt_tiny import Dropout, GPTConfig, LayerNorm, MultiHeadAttention, no_dropout

on_the_cpu = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tests the backend DEV=CPU")


def dropout(rate: float):
    return Dropout(rate, Tensor(np.array([12345], np.uint32)).realize()) if rate else no_dropout


def formula(query, key, value, factors, grad_output) -> list[np.ndarray]:
    """The output and the three gradients; dropout multiplies weights by factors (b, h, t, t)."""
    time, scale = query.shape[1], query.shape[-1] ** -0.5
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(time)
    weights /= weights.sum(-1, keepdims=True)
    grad_weights = np.einsum("bqhd,bkhd->bhqk", grad_output, value) * factors
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdims=True)) * scale
    return [
        np.einsum("bhqk,bkhd->bqhd", weights * factors, value),
        np.einsum("bhqk,bkhd->bqhd", grad_scores, key),
        np.einsum("bhqk,bqhd->bkhd", grad_scores, query),
        np.einsum("bhqk,bqhd->bkhd", weights * factors, grad_output),
    ]


@on_the_cpu
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
def test_attention_gives_the_formulas_values_and_gradients(shape, rate):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    *operands, grad_output = [Tensor(array).realize() for array in arrays]
    output = attention(*operands, dropout(rate))
    results = output, *output.gradient(*operands, gradient=grad_output)
    Tensor.realize(*results)
    batch, time, n_heads, _ = shape
    factors = np.ones((batch, n_heads, time, time))
    if rate:
        factors = dropout(rate)(Tensor(factors.astype(np.float32)).realize()).numpy()
    query, key, value, grad_output = (array.astype(np.float64) for array in arrays)
    expected = formula(query, key, value, factors, grad_output)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-6 * (time**0.5 + 5))


@on_the_cpu
def test_attention_computes_the_same_in_c_and_by_the_plain_formula():
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


@on_the_cpu
def test_attention_c_leaves_larger_heads_to_the_plain_formula():
    x = Tensor(np.ones((1, 2, 1, 129), np.float32)).realize()
    assert attention(x, x, x, no_dropout) is None


@pytest.mark.parametrize("gpt2", [False, True])
def test_layer_norm_and_its_gradients_are_those_of_the_plain_formula(gpt2):
    rng, norm = np.random.default_rng(0), LayerNorm(GPTConfig(d_model=21, n_heads=1, gpt2=gpt2))
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((3, 300, 21), (21,), (21,))]
    arrays[0][1, 7] = 0  # as dropout may leave a row
    x, norm.gamma, norm.beta = (Tensor(array).realize() for array in arrays)
    grad_y = Tensor(rng.standard_normal((3, 300, 21), np.float32))

    def results() -> list[np.ndarray]:
        y = norm(x)
        gradients = (y * grad_y).sum().gradient(x, norm.gamma, norm.beta)
        return [tensor.numpy() for tensor in (y, *gradients)]

    with Context(NORM_OF_ROWS=0):
        expected = results()
    for result, plain in zip(results(), expected, strict=True):
        np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-5 * abs(plain).max())


def test_rows_of_a_large_table_and_their_gradient_are_those_of_numpy():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((5000, 24), np.float32)
    ids = rng.integers(0, 5000, (3, 40)) // 7 * 7  # some of them more than once
    grad_rows = rng.standard_normal((3, 40, 24), np.float32)
    weight = Tensor(table)
    rows = embedding(Tensor(ids.astype(np.uint16)), weight)
    [grad_table] = (rows * Tensor(grad_rows)).sum().gradient(weight)

    expected = np.zeros_like(table)
    np.add.at(expected, ids, grad_rows)
    np.testing.assert_array_equal(rows.numpy(), table[ids])
    np.testing.assert_allclose(grad_table.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(
            lambda x: attention(*[x.reshape(1, 2, 1, 1)] * 3, no_dropout),
            marks=on_the_cpu,
            id="attention",
        ),
        pytest.param(
            lambda x: einsum("bti,oi->bto", x.reshape(1, 2, 1), Tensor.empty(1, 1)), id="einsum"
        ),
        pytest.param(lambda x: embedding(Tensor([[0, 1]]), x), id="embedding"),
    ],
)
def test_the_constant_gradient_of_a_norm_over_one_value_reaches_a_kernel(function):
    x = Tensor(np.ones((2, 1), np.float32)).realize()
    y = function(x)
    [grad_x] = (y - y.mean(-1, keepdim=True)).square().sum().gradient(x)
    assert not grad_x.numpy().any()


def test_erf_and_its_derivative_are_those_of_mathematics():
    numbers = np.concatenate([np.linspace(-6, 6, 4801), [-np.inf, np.inf, np.nan]])
    x = Tensor(numbers.astype(np.float32)).realize()
    y = erf(x)
    [derivative] = y.sum().gradient(x)
    expected = [math.erf(number) for number in x.numpy()]
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=3e-7)
    expected = 2 / math.sqrt(math.pi) * np.exp(-(x.numpy().astype(np.float64) ** 2))
    np.testing.assert_allclose(derivative.numpy(), expected, rtol=0, atol=3e-7)
