"""AdamW is gpt-burn's and PyTorch's; so are the learning rates (tests/data/options.json)."""

import json

import numpy as np
from conftest import DATA, at_once
from tinygrad import Tensor

from backend.memory import Flat
from gpt_tiny import GPT, GPTConfig
from models import gpt_burn
from training.optimizers import AdamW, clipped, learning_rate
from training.settings import OptimizerConfig, TrainingConfig
from training.state import flat_parameters

FIGURES = json.loads((DATA / "options.json").read_text())


def test_five_training_steps_equal_gpt_burns():
    folder = DATA / "adamw_steps"
    config = GPTConfig(**json.loads((folder / "config.json").read_text())["model"])
    model, before = GPT(config), gpt_burn.read_record(folder / "before.mpk")
    parameters = flat_parameters(model)
    parameters.write([before[name] for name in model.parameters()])
    optimizer = AdamW(parameters, OptimizerConfig())
    gradients = Flat(parameters.shapes)
    batches = json.loads((folder / "batches.json").read_text())

    def train(x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        loss = model.loss(x, y)
        for place, gradient in zip(gradients.parts, loss.gradient(*parameters.parts), strict=True):
            place.assign(gradient)
        Tensor.realize(loss, *gradients.parts)
        optimizer.step(gradients.whole, rates)
        return loss

    train = at_once(train)
    for number, batch in enumerate(batches, 1):
        x, y = (
            Tensor(np.array(batch[name], np.int32).reshape(-1, config.context_length)).realize()
            for name in "xy"
        )
        loss = train(x, y, Tensor(optimizer.rates(0.003, number)).realize())
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


def test_gradients_are_clipped_as_by_pytorch():
    figures = FIGURES["grad_clip"]
    gradients = [Tensor(gradient) for gradient in figures["gradients"]]
    ours = clipped(gradients, figures["longest"])
    for gradient, expected in zip(ours, figures["clipped"], strict=True):
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5)


def test_weight_decay_equals_pytorchs_adamw():
    figures = FIGURES["weight_decay"]
    start = np.array(figures["start"], np.float32)
    parameters = Flat([start.shape])
    parameters.write([start])
    gradients = Flat([start.shape])
    optimizer = AdamW(parameters, OptimizerConfig(weight_decay=figures["weight_decay"]))
    for number, gradient in enumerate(figures["gradients"], 1):
        rates = Tensor(optimizer.rates(figures["learning_rate"], number))
        gradients.write([np.array(gradient)])
        optimizer.step(gradients.whole, rates)
        expected = figures["parameters"][number - 1]
        np.testing.assert_allclose(parameters.read()[0], expected, atol=1e-6)
