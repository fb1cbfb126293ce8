"""Layer norm by norm.c."""

import numpy as np
import pytest
from tinygrad import Context, Tensor

from gpt_tiny import GPTConfig, LayerNorm


@pytest.mark.parametrize("gpt2", [False, True])
def test_layer_norm_and_its_gradients_are_those_of_the_plain_formula(gpt2):
    rng, norm = np.random.default_rng(0), LayerNorm(GPTConfig(d_model=21, n_heads=1, gpt2=gpt2))
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((3, 300, 21), (21,), (21,))]
    arrays[0][1, 7] = 0  # as dropout may leave a row
    x, norm.gamma, norm.beta = (Tensor(array).realize() for array in arrays)
    of_y = Tensor(rng.standard_normal((3, 300, 21), np.float32))

    def results() -> list[np.ndarray]:
        y = norm(x)
        of_all = (y * of_y).sum().gradient(x, norm.gamma, norm.beta)
        return [tensor.numpy() for tensor in (y, *of_all)]

    with Context(NORM_OF_ROWS=0):
        expected = results()
    for result, plain in zip(results(), expected, strict=True):
        np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-5 * abs(plain).max())
