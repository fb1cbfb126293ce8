"""Products are what their definition says, with BLAS and without."""

import numpy as np
import pytest
from tinygrad import Context, Device, Tensor

from backend import blas
from backend.blas import einsum

pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tests the backend DEV=CPU")


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)


def assert_product(spec: str, shape_a, shape_b, dtype: str = "float32") -> None:
    """The product and both gradients equal numpy's, in double precision."""
    rng = np.random.default_rng(0)
    operands, letters_c = spec.split("->")
    letters_a, letters_b = operands.split(",")
    a, b = (rng.standard_normal(shape, np.float32) for shape in (shape_a, shape_b))
    tensor_a, tensor_b = (Tensor(x).realize() for x in (a, b))
    if dtype == "bfloat16":
        a, b = rounded_to_bfloat16(a), rounded_to_bfloat16(b)
    expected = np.einsum(spec, a, b, dtype=np.float64)
    of_c = rng.standard_normal(expected.shape, np.float32)
    of_a = np.einsum(f"{letters_c},{letters_b}->{letters_a}", of_c, b, dtype=np.float64)
    of_b = np.einsum(f"{letters_c},{letters_a}->{letters_b}", of_c, a, dtype=np.float64)

    with Context(PRODUCT_DTYPE=dtype):
        c = einsum(spec, tensor_a, tensor_b)
        gradients = c.gradient(tensor_a, tensor_b, gradient=Tensor(of_c).realize())
    Tensor.realize(c, *gradients)
    np.testing.assert_allclose(c.numpy(), expected, rtol=1e-4, atol=1e-4)
    error = 2**-8 if dtype == "bfloat16" else 1e-4  # gradients are rounded, too
    for ours, theirs in zip(gradients, (of_a, of_b), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=error, atol=1e-4)


SPECS = [
    ("bti,oi->bto", (3, 5, 7), (9, 7)),
    ("bqhd,bkhd->bhqk", (3, 5, 3, 7), (3, 11, 3, 7)),
    ("bhqk,bkhd->bqhd", (3, 3, 5, 11), (3, 11, 3, 7)),
    ("btv,vd->btd", (3, 5, 11), (11, 7)),
]
ONE_TOKEN = [
    ("bti,oi->bto", (1, 1, 7), (9, 7)),
    ("bqhd,bkhd->bhqk", (1, 1, 3, 7), (1, 11, 3, 7)),
    ("bhqk,bkhd->bqhd", (1, 3, 1, 11), (1, 11, 3, 7)),
    ("btv,vd->btd", (1, 1, 11), (11, 7)),
]
OF_SIZE_1 = [  # a stride can't tell a single row from a single column
    ("bti,oi->bto", (2, 5, 1), (4, 1)),
    ("bti,oi->bto", (2, 5, 4), (1, 4)),
    ("bqhd,bkhd->bhqk", (2, 1, 3, 4), (2, 1, 3, 4)),
    ("bhqk,bkhd->bqhd", (2, 3, 1, 1), (2, 1, 3, 4)),
    ("btv,vd->btd", (2, 5, 3), (3, 1)),
]
SHARED = [  # large enough for the cores to share the work
    ("bti,oi->bto", (4, 33, 64), (65, 64)),
    ("bqhd,bkhd->bhqk", (4, 33, 2, 32), (4, 33, 2, 32)),
]


@pytest.mark.parametrize(("spec", "shape_a", "shape_b"), [*SPECS, *ONE_TOKEN, *OF_SIZE_1, *SHARED])
def test_blas_gives_the_product_and_its_gradients(spec, shape_a, shape_b):
    assert blas.blas() is not None
    assert_product(spec, shape_a, shape_b)


@pytest.mark.parametrize(("spec", "shape_a", "shape_b"), SPECS)
def test_without_blas_tinygrad_gives_the_same(monkeypatch, spec, shape_a, shape_b):
    monkeypatch.setattr(blas, "blas", lambda: None)
    assert_product(spec, shape_a, shape_b)


@pytest.mark.parametrize(("spec", "shape_a", "shape_b"), [SPECS[0], ONE_TOKEN[0]])
def test_products_of_bfloat16_are_those_of_rounded_operands(spec, shape_a, shape_b):
    assert_product(spec, shape_a, shape_b, "bfloat16")


def test_blas_0_turns_it_off(monkeypatch):
    monkeypatch.setenv("BLAS", "0")
    assert blas.blas.__wrapped__() is None


def test_gradients_flow_through_one_product_into_another():
    a, b, c = (Tensor(np.full((1, 2, 2), n, np.float32)).realize() for n in (1, 2, 3))
    product = einsum("bti,oi->bto", einsum("bti,oi->bto", a, b[0]), c[0])
    [gradient] = product.sum().gradient(a)
    assert product.numpy().tolist() == [[[24, 24], [24, 24]]]
    assert gradient.numpy().tolist() == [[[24, 24], [24, 24]]]


def test_a_gradient_that_is_a_constant_has_memory():
    x, weight = (Tensor(np.ones(shape, np.float32)).realize() for shape in ((2, 5, 3), (1, 3)))
    y = einsum("bti,oi->bto", x, weight)
    gradients = (y - y.mean(-1, keepdim=True)).square().sum().gradient(x, weight)  # of zeros
    assert not any(gradient.numpy().any() for gradient in gradients)
