"""Memory: what is written to the views of a buffer is in the whole, and the other way round."""

import numpy as np
import pytest
from conftest import assert_equal
from tinygrad import Tensor, UOp, dtypes

from backend.arrays import FlatBuffer, as_numpy, copy_in, copy_out, from_numpy, zeros
from backend.cpu import patches

SHAPES = {"a": (3, 5), "b": (3, 5), "c": (17,), "d": (1,)}
ARRAYS = {name: np.full(SHAPES[name], ord(name), np.float32) for name in SHAPES}


@pytest.fixture
def buffer() -> FlatBuffer:
    buffer = FlatBuffer(SHAPES)
    assert list(buffer.shapes.items()) == list(SHAPES.items())
    assert not any(array.any() for array in buffer.read().values())
    buffer.write(ARRAYS)
    return buffer


def double(whole: list[Tensor]) -> None:
    Tensor.realize(*(tensor.assign(2 * tensor) for tensor in whole))


def test_views_and_whole_hold_the_same(buffer):
    assert_equal(buffer.read(), ARRAYS)
    double(buffer.whole)
    for name, view in buffer.views.items():
        np.testing.assert_array_equal(view.numpy(), 2 * ARRAYS[name])


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.int16])
def test_a_view_of_a_jits_memory_begins_where_tinygrads_rules_say(dtype):
    view = UOp.new_buffer("CPU", 4096, dtypes.int8)[256:320].bitcast(dtype)
    (buffer, start), expected = (
        patches.contiguous_view(view),
        patches.contiguous_view_by_rules(view),
    )
    assert (buffer.arg.slot, start) == (expected[0].arg.slot, expected[1])


def test_a_part_is_a_stack_and_the_rest_another_part(buffer):
    matrices, others = buffer.part("ab"), buffer.part("cd")
    stacked = matrices.stack(matrices.whole)
    np.testing.assert_array_equal(stacked.numpy(), [ARRAYS["a"], ARRAYS["b"]])
    doubled = zip(matrices.whole, matrices.unstack(2 * stacked), strict=True)
    Tensor.realize(*(whole.assign(new) for whole, new in doubled))
    assert_equal(buffer.read(), {name: ARRAYS[name] * (1 + (name in "ab")) for name in SHAPES})
    assert_equal(others.read(), {name: ARRAYS[name] for name in "cd"})
    double(others.whole)
    assert_equal(buffer.read(), {name: 2 * ARRAYS[name] for name in SHAPES})


def test_a_jit_is_told_of_all_tensors_over_the_memory_once(buffer):
    part = buffer.part("ab")
    tensors = {id(tensor) for tensor in buffer.tensors}
    assert len(tensors) == len(buffer.tensors)
    for tensor in (*buffer.whole, *buffer.views.values(), *part.whole, *part.views.values()):
        assert id(tensor) in tensors


def test_all_numbers_are_changed_in_one_array(buffer):
    arrays = []
    buffer.apply_in_place(lambda array: arrays.append(np.multiply(array, 3, out=array)))
    assert len(arrays) == 1 and arrays[0].ndim == 1
    assert_equal(buffer.read(), {name: 3 * ARRAYS[name] for name in SHAPES})


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
