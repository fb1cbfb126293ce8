"""Memory: what is written to the parts of a whole is in the whole, and the other way round."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from backend.arrays import Flat, Groups, as_numpy, copy_in, copy_out, from_numpy, zeros

SHAPES = [(3, 5), (17,), (3, 5), (1,)]


@pytest.mark.parametrize("flat", [Flat(SHAPES), Groups(SHAPES, [[2, 0], [3, 1]]).like()])
def test_parts_and_whole_hold_the_same(flat):
    arrays = [np.full(shape, number + 1, np.float32) for number, shape in enumerate(SHAPES)]
    flat.write(arrays)
    for ours, array in zip(flat.read(), arrays, strict=True):
        np.testing.assert_array_equal(ours, array)
    doubled = [whole.assign(2 * whole) for whole in flat.whole]
    Tensor.realize(*doubled)
    for part, array in zip(flat.parts, arrays, strict=True):
        np.testing.assert_array_equal(part.numpy(), 2 * array)


def test_the_parts_of_a_group_are_a_stack_and_the_rest_another_flat():
    flat = Groups(SHAPES, [[2, 0], [1, 3]])
    arrays = [np.full(shape, number + 1, np.float32) for number, shape in enumerate(SHAPES)]
    flat.write(arrays)
    matrices, others = flat.groups
    stacked = matrices.stack(matrices.whole)
    np.testing.assert_array_equal(stacked.numpy(), [arrays[2], arrays[0]])
    doubled = zip(matrices.whole, matrices.unstack(2 * stacked), strict=True)
    Tensor.realize(*(whole.assign(new) for whole, new in doubled))
    for number, ours in enumerate(flat.read()):
        np.testing.assert_array_equal(ours, arrays[number] * (2 if number in (0, 2) else 1))
    for ours, array in zip(others.read(), (arrays[1], arrays[3]), strict=True):
        np.testing.assert_array_equal(ours, array)


def test_get_copies_what_put_copied():
    tensor, array = zeros(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert not tensor.numpy().any()
    copy_in(tensor, array.T.copy().T)  # in another order in memory
    ours = copy_out(tensor)
    np.testing.assert_array_equal(ours, array)
    copy_in(tensor, np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(ours, array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "int8"])
@pytest.mark.parametrize("n", [7, 1201])  # the greater one is shared by all cores
def test_a_filled_tensor_holds_the_array(dtype, n):
    array = np.random.default_rng(0).integers(0, 100, (n, 999)).astype(dtype).T
    tensor = from_numpy(array)
    np.testing.assert_array_equal(tensor.numpy(), array)
    np.testing.assert_array_equal(as_numpy(tensor), array)
    assert tensor.dtype == getattr(dtypes, dtype)
