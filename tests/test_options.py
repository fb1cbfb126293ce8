"""The options of train.py and run.py, beside PyTorch's figures (tests/data/options.json)."""

import io
import json
import re
import sys

import numpy as np
import pytest
from conftest import DATA
from tinygrad import Tensor

import checkpoint
import run
import steps
import train
from generation import sample
from gpt_tiny import AdamW

FIGURES = json.loads((DATA / "options.json").read_text())
TINY = ["-d", "8", "-l", "1", "-h", "2", "-c", "8", "-b", "4", "-n", "1"]


def test_warmup_and_cosine_decay_equal_pytorchs_schedulers():
    figures = FIGURES["learning_rates"]
    arguments = train.parse_arguments(
        ["-n", "2", "--warmup", "8", "--decay", "cosine", "--min-learning-rate", "0.0003"]
    )
    rates = [steps.learning_rate(arguments, n) for n in range(1, figures["n_updates"] + 1)]
    np.testing.assert_allclose(rates, figures["rates"], rtol=1e-9)


def test_without_options_the_learning_rate_is_constant():
    arguments = train.parse_arguments(["-r", "0.5"])
    assert {steps.learning_rate(arguments, n) for n in (1, 50, 5000)} == {0.5}


def test_gradients_are_clipped_as_by_pytorch():
    figures = FIGURES["grad_clip"]
    gradients = [Tensor(gradient) for gradient in figures["gradients"]]
    for clipped, expected in zip(
        steps.clipped(gradients, figures["longest"]), figures["clipped"], strict=True
    ):
        np.testing.assert_allclose(clipped.numpy(), expected, rtol=1e-5)


def test_weight_decay_equals_pytorchs_adamw():
    figures = FIGURES["weight_decay"]
    parameter = Tensor(figures["start"]).realize()
    optimizer = AdamW([parameter], weight_decay=figures["weight_decay"])
    for number, gradient in enumerate(figures["gradients"], 1):
        rates = Tensor(optimizer.rates(figures["learning_rate"], number))
        optimizer.step([Tensor(gradient)], rates)
        np.testing.assert_allclose(parameter.numpy(), figures["parameters"][number - 1], atol=1e-6)


def test_accumulation_gives_the_model_of_whole_batches(call, folder):
    options = [*TINY, "--dropout", "0"]
    models = []
    for number, more in enumerate(([], ["--accumulate", "2"])):
        assert call(train.main, *options, *more, "-o", f"accumulated_{number}").status == 0
        model, _ = checkpoint.load(folder / f"accumulated_{number}")
        models.append({name: p.numpy() for name, p in model.parameters().items()})
    for name, whole in models[0].items():
        np.testing.assert_allclose(models[1][name], whole, atol=1e-4, err_msg=name)


def test_products_of_bfloat16_train_almost_as_those_of_float32(call, folder):
    lines = [
        call(train.main, *TINY, "-x", "--dtype", dtype).out for dtype in ("float32", "bfloat16")
    ]
    losses = [[float(x) for x in re.findall(r"loss: (\S+?),? ", line)] for line in lines]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=3e-3)


def test_validation_size_and_checkpoint_every(call, folder):
    options = ["--validation-size", "5", "--checkpoint-every", "2", "-n", "3", "-o", "options"]
    result = call(train.main, *TINY, *options)
    assert result.status == 0
    assert '"validation_size": 5' in result.out
    assert result.out.count("store checkpoint") == 2  # after steps 1 and 3


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"top_k": 2}, {1, 3}), ({"top_p": 0.6}, {1, 3}), ({"top_k": 1}, {1}), ({"top_p": 0}, {1})],
)
def test_top_k_and_top_p_leave_the_likeliest(settings, allowed):
    probabilities = np.array([0.1, 0.5, 0.15, 0.25])
    logits = np.tile(np.log(probabilities), (20_000, 1))
    ids = sample(logits, 1.0, np.random.default_rng(0), **settings)
    frequencies = np.bincount(ids, minlength=4) / len(ids)
    kept = np.where(np.isin(np.arange(4), list(allowed)), probabilities, 0)
    expected = kept / kept.sum()
    # five standard deviations of a frequency among 20,000 draws
    assert np.all(np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000))


def test_temperature_flattens_and_sharpens():
    probabilities = np.array([0.2, 0.3, 0.5])
    logits = np.tile(np.log(probabilities), (20_000, 1))
    for temperature in (0.5, 2.0):
        ids = sample(logits, temperature, np.random.default_rng(1))
        expected = probabilities ** (1 / temperature)
        expected /= expected.sum()
        assert np.abs(np.bincount(ids) / len(ids) - expected).max() < 0.02


def generate(call, *words: str):
    folder = DATA / "gpt_burn_114k"
    return call(run.main, folder, "--temperature", "0", *words)


def test_stop_ends_the_text_before_the_stop_text(call):
    whole = generate(call, "-p", "The function", "-n", "30").out
    assert " context" in whole
    stopped = generate(call, "-p", "The function", "-n", "30", "--stop", " context")
    assert stopped.out == whole.partition(" context")[0] + "\n"


def test_samples_are_printed_one_after_the_other(call):
    one = generate(call, "-p", "The function", "-n", "12")
    three = generate(call, "-p", "The function", "-n", "12", "--n-samples", "3")
    assert three.out == one.out * 3


def test_prompt_from_standard_input(call, monkeypatch):
    expected = generate(call, "-p", "The function", "-n", "12").out
    monkeypatch.setattr(sys, "stdin", io.StringIO("The function"))
    assert generate(call, "-p", "-", "-n", "12").out == expected


def test_interactive_continues_each_line(call, monkeypatch):
    prompts = ["The function", "A class"]
    expected = [
        generate(call, "-p", prompt, "-n", "12").out.removeprefix(prompt) for prompt in prompts
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts) + "\n"))
    result = generate(call, "-i", "-n", "12")
    assert (result.status, result.out) == (0, "".join(expected))
