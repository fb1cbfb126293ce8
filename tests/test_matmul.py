"""Products are what their definition says, with BLAS and without."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, not_on_windows
from tinygrad import Context, Device, GlobalCounters, Tensor

from backend import matmul
from backend.cpu import native
from backend.cpu.native import blas
from backend.matmul import einsum

QEMU = "qemu-aarch64-static"
pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="tests the backend DEV=CPU")


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)


def assert_product(spec: str, shape_a, shape_b, dtype: str = "float32", error=1e-4) -> None:
    """The product equals numpy's, in double precision; and the gradients do, with this error."""
    rng = np.random.default_rng(0)
    operands, letters_c = spec.split("->")
    letters_a, letters_b = operands.split(",")
    a, b = (rng.standard_normal(shape, np.float32) for shape in (shape_a, shape_b))
    tensor_a, tensor_b = (Tensor(x).realize() for x in (a, b))
    if dtype == "bfloat16":
        a, b = rounded_to_bfloat16(a), rounded_to_bfloat16(b)
    expected = np.einsum(spec, a, b, dtype=np.float64)
    of_c = rng.standard_normal(expected.shape, np.float32)
    if dtype == "bfloat16":  # given so that nothing is left to round
        of_c = rounded_to_bfloat16(of_c)
    of_a = np.einsum(f"{letters_c},{letters_b}->{letters_a}", of_c, b, dtype=np.float64)
    of_b = np.einsum(f"{letters_c},{letters_a}->{letters_b}", of_c, a, dtype=np.float64)

    with Context(PRODUCT_DTYPE=dtype):
        c = einsum(spec, tensor_a, tensor_b)
        gradients = c.gradient(tensor_a, tensor_b, gradient=Tensor(of_c).realize())
    Tensor.realize(c, *gradients)
    np.testing.assert_allclose(c.numpy(), expected, rtol=1e-4, atol=1e-4)
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
IN_PARTS = [  # too large for what gemm.c packs at once, of a, of b or along k
    ("bti,oi->bto", (2, 101, 259), (400, 259)),
    ("btv,vd->btd", (3, 61, 31), (31, 400)),
]
SHARED = [  # large enough for the cores to share the work
    ("bti,oi->bto", (4, 33, 64), (65, 64)),
    ("bqhd,bkhd->bhqk", (4, 33, 2, 32), (4, 33, 2, 32)),
]


@pytest.fixture(params=[True, False], ids=["gemm.c", "BLAS"])
def is_ours(request, monkeypatch):
    """Whether gemm.c multiplies float32, or numpy's BLAS, whatever is faster."""
    kinds = {"any": (set(), "")} if request.param else {}
    monkeypatch.setattr(native, "GEMM_IS_FASTER", kinds)
    blas.cache_clear()
    yield request.param
    blas.cache_clear()


@pytest.mark.parametrize(("spec", "shape_a", "shape_b"), [*SPECS, *ONE_TOKEN, *OF_SIZE_1, *SHARED])
def test_both_give_the_product_and_its_gradients(is_ours, spec, shape_a, shape_b):
    assert blas() and (blas().sgemm == 0) == is_ours
    assert_product(spec, shape_a, shape_b)


@pytest.mark.parametrize(("spec", "shape_a", "shape_b"), SPECS)
def test_without_blas_tinygrad_gives_the_same(monkeypatch, spec, shape_a, shape_b):
    monkeypatch.setattr(matmul, "blas", lambda: None)
    assert_product(spec, shape_a, shape_b)


@pytest.mark.parametrize(("spec", "shape_a", "shape_b"), [*SPECS, *OF_SIZE_1, *SHARED, *IN_PARTS])
def test_products_of_bfloat16_are_those_of_rounded_operands(sbgemm, spec, shape_a, shape_b):
    assert_product(spec, shape_a, shape_b, "bfloat16")


def test_a_weight_is_rounded_once_for_a_product_and_its_gradients(sbgemm):
    spec, *shapes = SPECS[0]
    x, weight = (Tensor(np.ones(shape, np.float32)).realize() for shape in shapes)
    of_y = Tensor(np.ones((3, 5, 9), np.float32)).realize()
    with Context(PRODUCT_DTYPE="bfloat16"):
        y = einsum(spec, x, weight)
        gradients = y.gradient(x, weight, gradient=of_y)
    before = GlobalCounters.kernel_count
    Tensor.realize(y, *gradients)
    assert GlobalCounters.kernel_count - before == 6  # three operands are rounded, then multiplied


@pytest.mark.parametrize(("spec", "shape_a", "shape_b"), [SPECS[0], ONE_TOKEN[0]])
def test_where_none_are_multiplied_rounded_operands_are(monkeypatch, spec, shape_a, shape_b):
    load = native.load
    monkeypatch.setattr(native, "load", lambda name: None if name == "sbgemm" else load(name))
    assert_product(spec, shape_a, shape_b, "bfloat16", 2**-8)  # the gradients are rounded, too


# Of whole numbers, so that sums are exact; steps may be longer than rows, between which c stays.
PRODUCTS = """
#define ABI
#define PLAIN 1
#include "gemm.c"
#if BFLOAT16
static number numbers[] = {0, 0x3f80, 0xbf80, 0x4000, 0xc040, 0x40a0};
#else
static number numbers[] = {0, 1, -1, 2, -3, 5};
#endif
enum { MOST = 32000 };
static number a[MOST], b[MOST];
static float c[MOST], expected[MOST];
static number made(long i) { return numbers[i * i % 97 % 6]; }
static int is_wrong(long m, long n, long k, int t_a, int t_b, long more) {
  long lda = (t_a ? m : k) + more, ldb = (t_b ? k : n) + more, ldc = n + more;
  for (long i = 0; i < MOST; i++) a[i] = made(i), b[i] = made(i + 5), c[i] = expected[i] = 7;
  GEMM(101, 111 + t_a, 111 + t_b, m, n, k, 1, a, lda, b, ldb, 0, c, ldc);
  plain(101, 111 + t_a, 111 + t_b, m, n, k, 1, a, lda, b, ldb, 0, expected, ldc);
  for (long i = 0; i < MOST; i++)
    if (c[i] != expected[i]) return 1;
  return 0;
}
int count_wrong(void) {
  long sizes[][3] = {{1, 1, 1}, {1, 5, 3}, {12, 32, 8}, {25, 65, 9}, {8, 12, 4}, {7, 11, 19},
                     {161, 40, 160}, {5, 800, 20}, {3, 9, 515}};
  int n_wrong = 0;
  for (int i = 0; i < 9; i++)
    for (int flags = 0; flags < 8; flags++)
      n_wrong += is_wrong(sizes[i][0], sizes[i][1], sizes[i][2], flags & 1, flags >> 1 & 1,
                          flags >> 2 ? 3 : 0);
  return n_wrong;
}
#if __aarch64__
void _start(void) {  // there is no C library: exit(count_wrong())
  register long status asm("x0") = count_wrong(), call asm("x8") = 93;
  asm volatile("svc 0" : : "r"(status), "r"(call));
}
#endif
"""


def made(path: Path, *flags: str) -> Path:
    """PRODUCTS, compiled by zig without a C library."""
    zig = Path(pytest.importorskip("ziglang").__file__).parent / "zig"
    words = [zig, "cc", "-x", "c", "-", "-O2", "-ffreestanding", "-nostdlib", *flags]
    words += ["-I", ROOT / "backend" / "cpu", "-o", path]
    subprocess.run(words, input=PRODUCTS.encode(), check=True)
    return path


EMULATED = ["-DBFLOAT16", "-DEMULATED=1"]


@not_on_windows("links a library as Linux has them")
@pytest.mark.parametrize("flags", [[*EMULATED, "-DTILES=1"], EMULATED, ["-march=native"], []])
def test_products_of_all_forms_and_sizes(tmp_path, flags):
    library = made(tmp_path / "products.so", *flags, "-shared", "-fPIC")
    assert ctypes.CDLL(library).count_wrong() == 0


@pytest.mark.skipif(not shutil.which(QEMU), reason=f"no {QEMU}")
@pytest.mark.parametrize("flags", [["-DBFLOAT16", "-mcpu=generic+bf16"], []])
def test_products_of_all_forms_and_sizes_on_arm(tmp_path, flags):
    program = made(tmp_path / "products", "-target", "aarch64-freestanding", *flags, "-static")
    assert subprocess.run([QEMU, "-cpu", "max", program]).returncode == 0


@pytest.mark.parametrize("answer", [0, -1])
def test_tiles_are_used_where_the_system_gives_leave(monkeypatch, answer):
    monkeypatch.setattr(native, "processor", lambda: "avx512_bf16 amx_bf16 amx_tile")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *_: answer))
    monkeypatch.setattr(native, "load_c", lambda *_, **macros: macros)
    monkeypatch.setattr(native, "may_use_tiles", native.may_use_tiles.__wrapped__)
    assert native.load.__wrapped__("sbgemm")["TILES"] == (answer == 0)


def test_blas_0_turns_it_off(monkeypatch):
    monkeypatch.setenv("BLAS", "0")
    assert blas.__wrapped__() is None


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
