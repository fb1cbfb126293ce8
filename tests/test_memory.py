"""Memory: what is written to the parts of a whole is in the whole, and the other way round."""

import numpy as np
from tinygrad import Tensor

from backend.memory import Flat, get, put, zeros

SHAPES = [(3, 5), (17,), (1,)]


def test_parts_and_whole_hold_the_same():
    flat = Flat(SHAPES)
    arrays = [np.full(shape, number + 1, np.float32) for number, shape in enumerate(SHAPES)]
    flat.write(arrays)
    for ours, array in zip(flat.read(), arrays, strict=True):
        np.testing.assert_array_equal(ours, array)
    doubled = [whole.assign(2 * whole) for whole in flat.whole]
    Tensor.realize(*doubled)
    for part, array in zip(flat.parts, arrays, strict=True):
        np.testing.assert_array_equal(part.numpy(), 2 * array)


def test_get_copies_what_put_copied():
    tensor, array = zeros(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert not tensor.numpy().any()
    put(tensor, array.T.copy().T)  # in another order in memory
    ours = get(tensor)
    np.testing.assert_array_equal(ours, array)
    put(tensor, np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(ours, array)
