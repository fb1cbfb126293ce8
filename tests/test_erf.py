"""The error function and its derivative."""

import math

import numpy as np
from tinygrad import Tensor

from backend import erf


def test_erf_and_its_derivative_are_those_of_mathematics():
    numbers = np.concatenate([np.linspace(-6, 6, 4801), [-np.inf, np.inf, np.nan]])
    x = Tensor(numbers.astype(np.float32)).realize()
    y = erf(x)
    [derivative] = y.sum().gradient(x)
    expected = [math.erf(number) for number in x.numpy()]
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=3e-7)
    expected = 2 / math.sqrt(math.pi) * np.exp(-(x.numpy().astype(np.float64) ** 2))
    np.testing.assert_allclose(derivative.numpy(), expected, rtol=0, atol=3e-7)
