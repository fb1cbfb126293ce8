"""A batch in parts, or in low precision, trains as a whole one does."""

import re
import signal

import numpy as np
import pytest
from conftest import TINY
from tinygrad import Device

import train
from backend.cpu import native
from models import checkpoint
from training import trainer


@pytest.fixture(autouse=True)
def without_example(monkeypatch):
    monkeypatch.setattr(train, "print_example", lambda *_: None)  # it is tested elsewhere


def trained(call, folder, *options: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of a training, and its weights."""
    result = call(train.main, *TINY, "-n", "1", *options, "-o", "model")
    assert result.status == 0, result.err
    model, _ = checkpoint.load(folder / "model")
    losses = [float(loss) for loss in re.findall(r"loss: (\S+?),? ", result.out)]
    return losses, {name: p.numpy() for name, p in model.parameters().items()}


def test_accumulation_gives_the_model_of_whole_batches(call, folder):
    options = "--dropout", "0", "--validation-size", "2"
    _, whole = trained(call, folder, *options)
    for n_parts in ("2", "4"):  # of two windows and of one
        _, in_parts = trained(call, folder, *options, "--accumulate", n_parts)
        for name, values in whole.items():
            np.testing.assert_allclose(in_parts[name], values, atol=1e-4, err_msg=name)


on_the_cpu = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="gemm.c is the CPU's")


@pytest.mark.parametrize("kernel", [None, pytest.param("sbgemm", marks=on_the_cpu)])
def test_products_of_bfloat16_train_almost_as_those_of_float32(call, folder, request, kernel):
    if kernel:
        request.getfixturevalue(kernel)
    losses, weights = trained(call, folder)
    rounded_losses, rounded_weights = trained(call, folder, "--dtype", "bfloat16")
    assert any((rounded_weights[name] != values).any() for name, values in weights.items())
    np.testing.assert_allclose(rounded_losses, losses, rtol=3e-3)


@on_the_cpu
def test_without_fast_products_of_bfloat16_a_line_says_so(call, sbgemm, monkeypatch):
    words = *TINY, "-n", "1", "-x", "--dtype"
    monkeypatch.setattr(trainer.Trainer, "train", lambda *_: signal.SIGTERM)  # it is printed before
    assert train.ROUNDED_ONLY not in call(train.main, *words, "bfloat16").err
    with monkeypatch.context() as patches:
        patches.setattr(native, "blas", lambda: None)  # as with BLAS=0
        assert train.ROUNDED_ONLY in call(train.main, *words, "bfloat16").err
    monkeypatch.setattr(native, "load", lambda _: None)
    assert train.ROUNDED_ONLY not in call(train.main, *words, "float32").err
    assert train.ROUNDED_ONLY in call(train.main, *words, "bfloat16").err
