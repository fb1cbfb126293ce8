"""What all cores compute together is what one computes."""

from types import SimpleNamespace

import numpy as np
import pytest
from tinygrad import Context, Device, Tensor, TinyJit, Variable

from backend.cpu import threads
from backend.matmul import einsum

pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tests the backend DEV=CPU")


@pytest.mark.parametrize("n_columns", [1, 6, 17])
def test_columns_of_any_number_are_summed(n_columns):
    rows = np.random.default_rng(0).standard_normal((2000, n_columns), np.float32)
    sums = Tensor(rows).realize().sum(0).numpy()
    np.testing.assert_allclose(sums, rows.sum(0, dtype=np.float64), atol=1e-3)


@pytest.mark.parametrize("n_cores", [1, 2, 3, 6])
@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 30_011), (5, 4001), (1733, 64), (2, 20_000)])
def test_cores_share_any_size(n_cores, n_rows, n_columns):
    rows = np.random.default_rng(0).standard_normal((n_rows, n_columns), np.float32)
    with Context(NUM_CPU_THREADS=n_cores, NOOPT=0):
        x = Tensor(rows).realize() * 2
        sums, doubled = x.sum(-1).numpy(), x.numpy()
    np.testing.assert_array_equal(doubled, 2 * rows)
    np.testing.assert_allclose(sums, 2 * rows.sum(-1, dtype=np.float64), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("n_cores", [2, 3])
def test_products_share_any_size(n_cores):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1, 65, 37), np.float32), rng.standard_normal((59, 37), np.float32)
    with Context(NUM_CPU_THREADS=n_cores):
        product = einsum("bti,oi->bto", Tensor(a).realize(), Tensor(b).realize()).numpy()
    np.testing.assert_allclose(product, a @ b.T, rtol=1e-4, atol=1e-4)


@pytest.fixture
def jit_and_plain():
    """A step as a captured jit, and as plain calls: each gives its results for four arguments."""
    rng = np.random.default_rng(0)
    table = Tensor(rng.standard_normal((16, 64, 128), np.float32)).realize()
    weight = Tensor(rng.standard_normal((128, 128), np.float32)).realize()
    rows = [Tensor(rng.standard_normal(128, np.float32)).realize() for _ in range(4)]

    def step(x: Tensor, start) -> Tensor:
        y = einsum("bti,oi->bto", table * x, weight).softmax(-1)
        return (y.sum(0) + table[start] + y.max()).realize()

    def results(step) -> list[np.ndarray]:
        starts = (Variable("start", 0, 15).bind(3 * number) for number in range(4))
        return [step(x, start).numpy() for x, start in zip(rows, starts, strict=True)]

    jit = TinyJit(step)
    jit.cnt = 1
    with Context(JIT=0):
        plain = results(step)
    return lambda: results(jit), plain


@pytest.mark.parametrize("n_cores", [1, 2, 7])  # or more than there are, so that threads must wait
def test_a_captured_jit_on_all_cores_gives_what_plain_calls_give(jit_and_plain, n_cores):
    jit, plain = jit_and_plain
    with Context(NUM_CPU_THREADS=n_cores):
        for _ in range(3):
            np.testing.assert_allclose(jit(), plain, rtol=1e-5, atol=1e-5)


def test_a_core_that_never_comes_holds_nobody_up(jit_and_plain, monkeypatch):
    jit, plain = jit_and_plain
    jit()
    _, *rest = threads.thread_pool()
    nobody = SimpleNamespace(submit=lambda *_: None)
    monkeypatch.setattr(threads, "thread_pool", lambda: (nobody, *rest))
    with Context(NUM_CPU_THREADS=2):
        np.testing.assert_allclose(jit(), plain, rtol=1e-5, atol=1e-5)


def test_threads_give_what_the_plain_loop_over_kernels_and_chunks_gives(jit_and_plain, monkeypatch):
    jit, _ = jit_and_plain
    with Context(NUM_CPU_THREADS=3):
        results, plain = jit(), threads.thread_pool(PLAIN=1)
        monkeypatch.setattr(threads, "thread_pool", lambda: plain)
        np.testing.assert_array_equal(jit(), results)
