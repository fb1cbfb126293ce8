"""Rows of a large table by their numbers."""

import numpy as np
from tinygrad import Tensor

from gpt_tiny import Embedding


def test_rows_of_a_large_table_and_their_gradient_are_those_of_numpy():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((5000, 24), np.float32)
    ids = rng.integers(0, 5000, (3, 40)) // 7 * 7  # some of them more than once
    of_rows = rng.standard_normal((3, 40, 24), np.float32)
    embedding = Embedding(*table.shape)
    embedding.weight = Tensor(table)
    rows = embedding(Tensor(ids.astype(np.uint16)))
    of_table = (rows * Tensor(of_rows)).sum().gradient(embedding.weight)[0]

    expected = np.zeros_like(table)
    np.add.at(expected, ids, of_rows)
    np.testing.assert_array_equal(rows.numpy(), table[ids])
    np.testing.assert_allclose(of_table.numpy(), expected, rtol=0, atol=1e-6)


def test_a_gradient_that_is_a_constant_reaches_a_large_table():
    embedding, ids = Embedding(5000, 1), Tensor(np.array([[0, 1]], np.uint16))
    embedding.weight = Tensor(np.ones((5000, 1), np.float32)).realize()
    rows = embedding(ids)
    [of_table] = (rows - rows.mean(-1, keepdim=True)).square().sum().gradient(embedding.weight)
    assert not of_table.numpy().any()
