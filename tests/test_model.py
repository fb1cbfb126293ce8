"""The model is gpt-burn's, to the digit; its parts do what their names say."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import DATA, REFERENCE
from tinygrad import Tensor, dtypes
from tinygrad.helpers import GlobalCounters

from gpt_tiny import GPT, Dropout, GPTConfig, LayerNorm, hash_32, initial_weights, shapes
from models import checkpoint, gpt_burn

TINY = GPTConfig(
    context_length=8, vocab_size=11, n_layers=2, n_heads=2, d_model=12, d_hidden=48, dropout=0
)


@pytest.fixture(scope="module")
def reference_logits(reference):
    """gpt-burn's prompts side by side, the short ones padded on the right."""
    model, _, prompts = reference
    ids = np.zeros((len(prompts), model.config.context_length), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt["ids"])] = prompt["ids"]
    return model(Tensor(ids)).numpy()


def test_logits_equal_gpt_burns(reference, reference_logits):
    for logits, prompt in zip(reference_logits, reference[2], strict=True):
        logits = logits[: len(prompt["ids"])]
        assert np.abs(logits[-1] - prompt["last_logits"]).max() < 1e-4
        assert np.abs(np.abs(logits).mean(-1) - prompt["mean_abs_logit"]).max() < 1e-4


def test_parameters_are_named_and_shaped_as_gpt_burns():
    theirs = gpt_burn.read_record(DATA / "adamw_steps" / "before.mpk")
    assert shapes(TINY) == {name: array.shape for name, array in theirs.items()}


@pytest.mark.parametrize("n_layers", [1, 2, 8])
def test_initial_weights_have_the_right_means_and_deviations(n_layers):
    config = GPTConfig(n_layers=n_layers, d_model=128, d_hidden=512, vocab_size=500)
    for name, values in initial_weights(config, 3).items():
        kind = name.split(".")[-1]
        if kind in ("gamma", "beta"):
            assert np.all(values == (kind == "gamma")), name
            continue
        deviation = 0.02
        if "multi_head.out" in name or "linear_2" in name:
            deviation /= math.sqrt(2 * n_layers)
        n = values.size  # five standard errors of a sample's mean and deviation
        assert abs(values.mean()) < 5 * deviation / math.sqrt(n), name
        assert abs(values.std() / deviation - 1) < 5 / math.sqrt(2 * n), name


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (initial_weights(TINY, seed) for seed in (1, 1, 2))
    for name, values in first.items():
        assert np.array_equal(values, again[name])
        assert np.array_equal(values, other[name]) == ("norm" in name)


@pytest.mark.parametrize(
    "config", [TINY, GPTConfig(), replace(TINY, n_layers=3, d_hidden=7), replace(TINY, gpt2=True)]
)
def test_n_parameters_counts_all(config):
    assert config.n_parameters == sum(map(math.prod, shapes(config).values()))


def test_a_model_has_the_weights_that_it_is_given_and_no_others():
    weights = initial_weights(TINY, 0)
    for name, parameter in GPT(TINY, weights).parameters().items():
        np.testing.assert_array_equal(parameter.numpy(), weights[name])
    with pytest.raises(TypeError, match="weights"):
        GPT(TINY)
    name = "blocks.1.norm_2.beta"
    for wrong in ({k: v for k, v in weights.items() if k != name}, weights | {"z": weights[name]}):
        with pytest.raises(ValueError, match=r"do not agree on (blocks\.1\.norm_2\.beta|z)$"):
            GPT(TINY, wrong)
    with pytest.raises(ValueError, match=r"norm_2\.beta is \(11,\), and must be \(12,\)"):
        GPT(TINY, weights | {name: weights[name][1:]})


def test_a_model_shares_the_tensors_that_it_is_given():
    tensors = {name: Tensor(values) for name, values in initial_weights(TINY, 0).items()}
    for name, parameter in GPT(TINY, tensors).parameters().items():
        assert parameter.uop is tensors[name].uop


def test_shapes_take_no_memory_and_loading_draws_no_random_numbers(monkeypatch):
    before = GlobalCounters.mem_used
    assert shapes(GPTConfig(d_model=2**16, d_hidden=2**18))["linear.weight"] == (104, 2**16)
    assert GlobalCounters.mem_used == before
    monkeypatch.setattr(np.random, "default_rng", None)
    checkpoint.load(REFERENCE)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, bad) for name in ("context_length", "vocab_size", "n_layers") for bad in (0, -1)),
        *(("n_heads", bad) for bad in (0, 1.0, "2", True, None)),
        *(("d_model", bad) for bad in (0, 2.5)),
        ("d_hidden", 0),
        *(("dropout", bad) for bad in (-0.1, 1, float("nan"), "0", None)),
    ],
)
def test_a_setting_that_no_model_can_have_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        replace(TINY, **{setting: value})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="d_model 12 is not divisible by n_heads 5"):
        replace(TINY, n_heads=5)


def lowbias32(x: int) -> int:
    """The hash as its author gives it, in plain integers."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0xD35A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


def test_hash_equals_its_definition():
    numbers = np.random.default_rng(0).integers(2**32, size=64, dtype=np.uint32)
    numbers[:3] = 0, 1, 2**32 - 1
    hashes = hash_32(Tensor(numbers))
    assert hashes.dtype == dtypes.uint32
    assert hashes.tolist() == [lowbias32(x) for x in numbers.tolist()]


def masks(rate: float, key: int, n_calls: int) -> np.ndarray:
    """(n_calls, n) of what dropout makes of ones."""
    dropout = Dropout(rate, Tensor([key], dtype=dtypes.uint32))
    ones = Tensor.ones(100, 400)
    return np.stack([dropout(ones).numpy().reshape(-1) for _ in range(n_calls)])


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate):
    [values] = masks(rate, 7, 1)
    assert np.allclose(np.unique(values), [0, 1 / (1 - rate)])
    error = math.sqrt(rate * (1 - rate) / values.size)
    assert abs((values == 0).mean() - rate) < 4 * error
    assert abs(values.mean() - 1) < 4 * error / (1 - rate)


def test_dropout_differs_between_calls_and_keys_and_repeats_with_the_key():
    first, again, other = masks(0.2, 7, 2) == 0, masks(0.2, 7, 2) == 0, masks(0.2, 8, 2) == 0
    assert np.array_equal(first, again)
    independent = 0.2**2
    for a, b in [(first[0], first[1]), (first[0], other[0]), (first[1], other[0])]:
        assert abs((a & b).mean() - independent) < 0.005


def test_a_rate_of_zero_changes_nothing():
    x = Tensor([1.0, 2.0])
    assert Dropout(0, Tensor([1], dtype=dtypes.uint32))(x) is x


def test_a_row_that_dropout_empties_leaves_the_gradients_finite():
    norm, x = LayerNorm(TINY), Tensor(np.eye(2, TINY.d_model, dtype=np.float32)).realize()
    norm.gamma, norm.beta = Tensor.ones(TINY.d_model), Tensor.zeros(TINY.d_model)
    kept = Tensor(np.float32([[1], [0]]))
    gradient = norm(x * kept).square().sum().gradient(x)[0].numpy()
    assert np.isfinite(gradient).all() and gradient[0].any()
