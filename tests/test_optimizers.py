"""AdamW is gpt-burn's and PyTorch's, Muon PyTorch's; so are the learning rates
(tests/data/options.json)."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DATA, at_once
from tinygrad import Device, Tensor

from backend import arrays
from gpt_tiny import GPT, GPTConfig, shapes
from models import gpt_burn
from training.config import OptimizerConfig, TrainingConfig
from training.optimizers import AdamW, Muon, clip_gradients, learning_rate, muon_learning_rate

FIGURES = json.loads((DATA / "options.json").read_text())


def test_five_training_steps_equal_gpt_burns():
    folder = DATA / "adamw_steps"
    config = GPTConfig(**json.loads((folder / "config.json").read_text())["model"])
    before = gpt_burn.read_record(folder / "before.mpk")
    optimizer = AdamW(shapes(config), TrainingConfig())
    parameters = optimizer.parameters
    model = GPT(config, parameters.views)
    parameters.write(before)
    gradients = optimizer.gradients.views.values()
    batches = json.loads((folder / "batches.json").read_text())

    def train(x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        loss = model.loss(x, y)
        grads = loss.gradient(*parameters.views.values())
        for view, gradient in zip(gradients, grads, strict=True):
            view.assign(gradient)
        Tensor.realize(loss, *gradients)
        optimizer.step(rates)
        return loss

    train = at_once(train)
    for number, batch in enumerate(batches, 1):
        x, y = (
            Tensor(np.array(batch[name], np.int32).reshape(-1, config.context_length)).realize()
            for name in "xy"
        )
        loss = train(x, y, Tensor(optimizer.rates(number)).realize())
        assert abs(loss.item() - batch["loss"]) < 1e-5
        if number in (1, 5):
            theirs = gpt_burn.read_record(folder / f"after_{number}.mpk")
            assert theirs.keys() == model.parameters().keys()
            for name, parameter in model.parameters().items():
                assert np.abs(parameter.numpy() - theirs[name]).max() < 1e-5, name


def test_warmup_and_cosine_decay_equal_pytorchs_schedulers():
    figures = FIGURES["learning_rates"]
    config = TrainingConfig(n_steps=2, warmup=8, decay="cosine", min_learning_rate=0.0003)
    rates = [learning_rate(config, n) for n in range(1, figures["n_updates"] + 1)]
    np.testing.assert_allclose(rates, figures["rates"], rtol=1e-9)


def test_without_options_the_learning_rate_is_constant():
    config = TrainingConfig(learning_rate=0.5)
    assert {learning_rate(config, n) for n in (1, 50, 5000)} == {0.5}


def test_muons_learning_rate_keeps_its_share_of_adamws():
    optimizer = OptimizerConfig(algorithm="muon")
    schedule = {"n_steps": 2, "warmup": 8, "decay": "cosine", "min_learning_rate": 0.0003}
    config = TrainingConfig(optimizer=optimizer, muon_learning_rate=0.03, **schedule)
    for number in (1, 8, 100, 200):
        rate = learning_rate(config, number)
        assert muon_learning_rate(config, number) == pytest.approx(10 * rate, rel=1e-9)
    config = TrainingConfig(optimizer=optimizer, learning_rate=0, decay="cosine")
    assert learning_rate(config, 1) == 0 < muon_learning_rate(config, 1)


def test_gradients_are_clipped_as_by_pytorch():
    figures = FIGURES["grad_clip"]
    gradients = [Tensor(gradient) for gradient in figures["gradients"]]
    ours = clip_gradients(gradients, figures["longest"])
    for gradient, expected in zip(ours, figures["clipped"], strict=True):
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5)


def test_weight_decay_equals_pytorchs_adamw():
    figures = FIGURES["weight_decay"]
    start = np.array(figures["start"], np.float32)
    settings = OptimizerConfig(weight_decay=figures["weight_decay"])
    config = TrainingConfig(learning_rate=figures["learning_rate"], optimizer=settings)
    optimizer = AdamW({"weight": start.shape}, config)
    optimizer.parameters.write({"weight": start})
    for number, gradient in enumerate(figures["gradients"], 1):
        optimizer.gradients.write({"weight": np.array(gradient)})
        optimizer.step(Tensor(optimizer.rates(number)))
        expected = figures["parameters"][number - 1]
        np.testing.assert_allclose(optimizer.parameters.read()["weight"], expected, atol=1e-6)


def muon_in_numpy(start: list, gradients: list, config: OptimizerConfig, rate: float) -> list:
    """The matrices after the updates with these gradients, one by one, as the paper has it."""
    matrices = [matrix.copy() for matrix in start]
    momenta = [np.zeros_like(matrix) for matrix in start]
    for of_update in gradients:
        for matrix, momentum, gradient in zip(matrices, momenta, of_update, strict=True):
            momentum[...] = config.momentum * momentum + (1 - config.momentum) * gradient
            x = config.momentum * momentum + (1 - config.momentum) * gradient
            x = x.T if (is_tall := x.shape[0] > x.shape[1]) else x
            x = x / (np.linalg.norm(x) + np.float32(1e-7))
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            x = x.T if is_tall else x
            scale = math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
            matrix[...] = matrix - rate * config.weight_decay * matrix - rate * scale * x
    return matrices


def muon_in_ours(shapes: dict, start: dict, gradients: list, config: TrainingConfig) -> list:
    """All parameters after each of the updates, by a jit as in a training."""
    optimizer = Muon(shapes, config)
    optimizer.parameters.write(start)
    step = at_once(lambda rates: optimizer.step(rates))
    results = []
    for number, of_update in enumerate(gradients, 1):
        optimizer.gradients.write(of_update)
        step(Tensor(optimizer.rates(number)).realize())
        results.append({name: array.copy() for name, array in optimizer.parameters.read().items()})
    return results


BLOCK = {
    "pwff.linear_1.weight": (12, 6),
    "pwff.linear_1.bias": (12,),
    "multi_head.query.weight": (6, 6),
    "pwff.linear_2.weight": (6, 12),
    "multi_head.key.weight": (6, 6),
}
SHAPES = {
    "token_embedding.weight": (5, 6),
    **{f"blocks.{i}.{name}": shape for i in range(3) for name, shape in BLOCK.items()},
    "linear.weight": (6, 6),  # a matrix, but of no block
}


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_six_steps_of_muon_equal_those_in_numpy_beside_adamw(monkeypatch, device):
    if device == "GPU":  # whose buffers have no views
        other = SimpleNamespace(DEFAULT="GPU", canonicalize=Device.canonicalize)
        monkeypatch.setattr(arrays, "Device", other)
    rng = np.random.default_rng(0)
    start, *gradients = (
        {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
        for _ in range(7)
    )
    config = TrainingConfig(optimizer=OptimizerConfig(algorithm="muon", weight_decay=0.1))
    ours = muon_in_ours(SHAPES, start, gradients, config)[-1]

    names = [name for name in SHAPES if name.startswith("blocks.") and "bias" not in name]
    start_of_matrices, *of_matrices = (
        [arrays[name] for name in names] for arrays in (start, *gradients)
    )
    expected = muon_in_numpy(start_of_matrices, of_matrices, config.optimizer, 0.02)
    for name, array in zip(names, expected, strict=True):
        np.testing.assert_allclose(ours[name], array, atol=1e-5, err_msg=name)

    adamw = AdamW(SHAPES, config)
    adamw.parameters.write(start)
    for number, of_update in enumerate(gradients, 1):
        adamw.gradients.write(of_update)
        adamw.step(Tensor(adamw.rates(number)))
    for name, array in adamw.parameters.read().items():
        if name not in names:
            np.testing.assert_allclose(ours[name], array, atol=1e-6, err_msg=name)


def test_muon_equals_pytorchs_with_its_newton_schulz_steps_in_float32():
    figures = FIGURES["muon"]
    start, *gradients = (
        {f"blocks.{i}.weight": np.array(matrix, np.float32) for i, matrix in enumerate(matrices)}
        for matrices in ([*some, [0]] for some in (figures["start"], *figures["gradients"]))
    )
    shapes = {name: array.shape for name, array in start.items()}
    settings = OptimizerConfig(algorithm="muon", weight_decay=figures["weight_decay"])
    results = muon_in_ours(shapes, start, gradients, TrainingConfig(optimizer=settings))
    for ours, expected in zip(results, figures["parameters"], strict=True):
        for i, theirs in enumerate(expected):
            np.testing.assert_allclose(ours[f"blocks.{i}.weight"], theirs, atol=1e-5)
