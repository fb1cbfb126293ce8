"""Quantized weights: products of them are exact, and a model hardly notices."""

import ctypes

import numpy as np
import pytest
from conftest import GPT2
from tinygrad import Device, Tensor

import run
from backend import einsum, embedding
from backend.cpu import native
from backend.cpu.compiler import load_c
from backend.matmul import gemv
from backend.quantized import QMAX, QuantizedMatrix, quantize_matrix
from gpt_tiny import GPT, GPTConfig, initial_weights
from inference.generator import Generator, quantize

on_cpu = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tests the backend DEV=CPU")


def of(matrix: np.ndarray, kind: str) -> QuantizedMatrix:
    return quantize_matrix(Tensor(matrix).realize(), kind)


@on_cpu
@pytest.mark.parametrize(
    ("n", "k", "n_vectors"), [(5, 7, 1), (130, 141, 1), (131, 333, 6), (9, 3333, 5)]
)
@pytest.mark.parametrize(
    ("kind", "is_whole"),
    [("float32", False), ("float16", False), ("float16", True), ("int8", True)],
)
def test_a_product_is_numpys(n, k, n_vectors, kind, is_whole):
    rng = np.random.default_rng(0)
    matrix = rng.integers(-127, 128, (n, k)).astype(kind)
    x = rng.integers(-2000, 2000, (n_vectors, k)).astype(np.int16 if is_whole else np.float32)
    expected = x.astype(np.float64) @ matrix.T.astype(np.float64)
    ours = gemv(Tensor(matrix), Tensor(x)).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1)


@on_cpu
@pytest.mark.parametrize(
    ("matrix_dtype", "x_dtype"), [("f4", "f4"), ("f2", "f4"), ("f2", "i2"), ("i1", "i2")]
)
def test_gemv_gives_what_its_plain_loops_give(matrix_dtype, x_dtype):
    rng = np.random.default_rng(0)
    programs = load_c("gemv.c", "gemv", PLAIN=1), native.load("gemv")
    types = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 7
    plain, fast = (ctypes.CFUNCTYPE(None, *types)(program.addr) for program in programs)
    for n, k, n_vectors, first, last in [
        (5, 7, 1, 0, 5),
        (40, 333, 1, 3, 21),
        (41, 6400, 7, 2, 41),
    ]:
        matrix = (rng.standard_normal((n, k)) * 9).astype(matrix_dtype)
        x = (rng.standard_normal((n_vectors, k)) * 9).astype(x_dtype)
        expected, ours = np.full((2, n_vectors, n), 0.5, np.float32)
        sizes = n_vectors, first, last, n, k, matrix.itemsize, x_dtype == "i2"
        plain(*(array.ctypes.data for array in (expected, matrix, x)), *sizes)
        fast(*(array.ctypes.data for array in (ours, matrix, x)), *sizes)
        if x_dtype == "i2":
            np.testing.assert_array_equal(ours, expected)
        else:
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", QMAX)
def test_a_matrix_is_quantized_to_the_nearest(kind):
    matrix = np.random.default_rng(0).standard_normal((40, 50), np.float32)
    matrix[3] = 0
    quantized = of(matrix, kind)
    values, scales = quantized.values.numpy().astype(np.float32), quantized.scales.numpy()
    assert np.abs(values).max() <= QMAX[kind]
    if kind == "float16":
        assert np.array_equal(values * scales, matrix.astype(np.float16))
    else:
        assert np.all(np.abs(values * scales - matrix) <= scales * 0.500001)


@pytest.mark.parametrize("kind", QMAX)
@pytest.mark.parametrize("n_vectors", [1, 6])
def test_a_product_with_a_quantized_matrix_is_numpys(kind, n_vectors):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((130, 300), np.float32)
    x = rng.standard_normal((1, n_vectors, 300), np.float32)
    x[0, 0, 7] = 100  # one number far above the others
    quantized = of(matrix, kind)
    matrix = quantized.values.numpy().astype(np.float64) * quantized.scales.numpy()
    y = einsum("bti,oi->bto", Tensor(x), quantized).numpy()
    assert np.abs(y - x @ matrix.T).max() < 0.2


@pytest.mark.parametrize("kind", QMAX)
def test_the_greatest_sums_do_not_overflow(kind):
    matrix, x = np.ones((2, 6400), np.float32), np.ones((1, 2, 6400), np.float32)
    matrix[1] = x[0, 1] = -1
    y = einsum("bti,oi->bto", Tensor(x), of(matrix, kind)).numpy()
    np.testing.assert_allclose(y, 6400 * np.array([[[1, -1], [-1, 1]]]), rtol=1e-3)


def test_rows_are_looked_up_in_a_quantized_table():
    table = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    rows = embedding(Tensor([7, 0, 49]), of(table, "int8")).numpy()
    np.testing.assert_allclose(rows, table[[7, 0, 49]], atol=np.abs(table).max() / 127)


@pytest.mark.parametrize("gpt2", [False, True])
def test_prompts_and_tokens_agree_on_quantized_weights(gpt2):
    config = GPTConfig(
        context_length=20, vocab_size=31, n_layers=2, n_heads=2, d_model=12, d_hidden=48, gpt2=gpt2
    )
    weights = {name: 12 * values for name, values in initial_weights(config, 5).items()}
    model, prompt = GPT(config, weights), np.array([[1, 2, 3]], np.int32)
    quantize(model, "int8")
    generator, all_logits = Generator(model), []

    def choose(logits: np.ndarray) -> np.ndarray:
        all_logits.append(logits)
        return logits.argmax(-1)

    new = np.concatenate(list(generator(prompt, 8, choose)))
    assert len(np.unique(new)) > 2
    [again] = generator(np.concatenate([prompt[0], new[:-1]])[None], 1, choose)
    assert again == new[-1]
    np.testing.assert_allclose(all_logits[-1], all_logits[-2], atol=0.01 * all_logits[-1].std())


def test_weights_of_another_kind_are_refused(reference):
    with pytest.raises(ValueError, match="rounded to int8 or float16, not 'int4'"):
        quantize(reference[0], "int4")


def test_run_takes_quantized_weights(call):
    result = call(run.main, GPT2, "--weights", "int8", "-n", "20", "-p", "the value")
    assert result.status == 0, result.err
    assert len(result.out) > 20
