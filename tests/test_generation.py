"""Texts are gpt-burn's to the character, with the cache and past it; tokens are drawn fairly."""

import numpy as np
import pytest
from conftest import at_once, greedy
from tinygrad import Tensor

from backend.arrays import copy_out
from gpt_tiny import GPT, GPTConfig, initial_weights
from inference.generator import Generator, sample
from inference.stream import TextStream, added_texts
from tokenizers import CharTokenizer

TINY = GPTConfig(
    context_length=8, vocab_size=11, n_layers=2, n_heads=2, d_model=12, d_hidden=48, dropout=0
)


@pytest.fixture(scope="module")
def generator(reference):
    return Generator(reference[0])


@pytest.mark.parametrize("number", range(6))
def test_greedy_text_equals_gpt_burns_to_the_character(reference, generator, number):
    _, tokenizer, prompts = reference
    prompt = prompts[number]
    text = greedy(generator, tokenizer, prompt["ids"], 200)
    assert prompt["prompt"] + text == prompt["greedy"]


@pytest.fixture(scope="module")
def sharp_model():
    """A random model whose likeliest tokens vary and lead by far."""
    weights = {name: 12 * values for name, values in initial_weights(TINY, 5).items()}
    return GPT(TINY, weights)


@pytest.fixture(scope="module")
def whole_window(sharp_model):
    return at_once(lambda ids: sharp_model(ids).realize())


def without_cache(whole_window, ids: np.ndarray, n_new_tokens: int, stride: int) -> np.ndarray:
    """The likeliest tokens (time, batch), from the whole window for each."""
    window, new = ids[:, -TINY.context_length :], []
    for _ in range(n_new_tokens):
        if window.shape[1] > TINY.context_length:
            window = window[:, stride:]
        time = window.shape[1]
        padded = np.pad(window, ((0, 0), (0, TINY.context_length - time))).astype(np.int32)
        logits = whole_window(Tensor(padded).realize()).numpy()[:, time - 1]
        new.append(logits.argmax(-1))
        window = np.concatenate([window, new[-1][:, None]], axis=1)
    return np.array(new)


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("n_prompt", [1, 7, 10])
def test_two_texts_with_the_cache_equal_those_without(sharp_model, whole_window, stride, n_prompt):
    prompts = np.random.default_rng(3).integers(TINY.vocab_size, size=(2, n_prompt))
    expected = without_cache(whole_window, prompts, 16, stride)
    assert len(np.unique(expected)) > 2
    generator = Generator(sharp_model, batch=2, stride=stride)
    new = generator(prompts, 16, lambda logits: logits.argmax(-1))
    assert np.array_equal(list(new), expected)


@pytest.mark.parametrize("stride", [1, 100])
def test_prompts_of_several_pieces_are_read_as_one(stride):
    config = GPTConfig(
        context_length=160, vocab_size=11, n_layers=1, n_heads=2, d_model=12, d_hidden=48, dropout=0
    )
    weights = {name: 12 * values for name, values in initial_weights(config, 5).items()}
    model, rng = GPT(config, weights), np.random.default_rng(3)
    generator = Generator(model, batch=2, stride=stride)
    whole_window = at_once(lambda ids: model(ids).realize())
    for n_prompt in (160, 131, 40):
        ids = rng.integers(11, size=(2, n_prompt)).astype(np.int32)
        padded = np.pad(ids, ((0, 0), (0, 160 - n_prompt)))
        next(generator(ids, 1, lambda logits: logits.argmax(-1)))
        expected = whole_window(Tensor(padded).realize()).numpy()[:, n_prompt - 1]
        np.testing.assert_allclose(
            copy_out(generator.decoder.logits), expected, rtol=1e-3, atol=1e-3
        )


def test_weights_too_large_for_finite_logits_are_refused(sharp_model):
    weights = {name: 1e30 * p.numpy() for name, p in sharp_model.parameters().items()}
    with pytest.raises(ValueError, match="logits are not finite"):
        next(Generator(GPT(TINY, weights))(np.zeros((1, 1), np.int32), 1, lambda _: 0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    n_draws = 20_000
    logits = np.array([0.3, -1.0, 2.0, 0.0, -np.inf, 1.0], np.float32)
    expected = np.exp(logits / temperature)
    expected *= n_draws / expected.sum()
    drawn = sample(np.tile(logits, (n_draws, 1)), temperature, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=len(logits))
    assert counts[4] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded by chance once in 1,000


def test_temperature_zero_takes_the_likeliest_token():
    logits = np.random.default_rng(1).normal(size=(50, 7)).astype(np.float32)
    assert np.array_equal(sample(logits, 0, None), logits.argmax(-1))


def test_samples_repeat_with_the_seed():
    logits = np.zeros((100, 9), np.float32)
    first, again, other = (sample(logits, 1.0, np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


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


def test_an_excluded_id_is_never_drawn():
    logits = np.tile(np.log([0.2, 0.5, 0.3]), (1000, 1))
    kept = logits.copy()
    assert set(sample(logits, 1.0, np.random.default_rng(0), excluded=[1])) == {0, 2}
    assert np.all(sample(logits, 0, None, excluded=[1]) == 2)
    assert np.array_equal(logits, kept)


def texts_of(stream: TextStream, text: str) -> list[str]:
    return [stream.add(token) for token in (*CharTokenizer().encode(text), None)]


def test_a_stream_holds_the_beginning_of_the_stop_text_back():
    tokenizer = CharTokenizer()
    assert texts_of(TextStream(tokenizer), "abé") == ["a", "b", "", ""]  # é is unknown
    assert texts_of(TextStream(tokenizer, "bcd"), "abbcx") == ["a", "", "b", "", "bcx", ""]
    assert texts_of(TextStream(tokenizer, "bcd"), "abc") == ["a", "", "", "bc"]
    assert texts_of(TextStream(tokenizer, "bcd"), "abcde") == ["a", "", "", "", "", ""]


def test_a_stream_adds_characters_whole_and_ends_at_its_ends():
    tokenizer = CharTokenizer()
    tokenizer.tokens = [bytes([byte]) for byte in range(256)]
    tokenizer.ends = (0,)
    stream = TextStream(tokenizer)
    added = [stream.add(byte) for byte in (*"aé€".encode(), 0xC3, 0, 65)]
    assert added == ["a", "", "é", "", "", "€", "", "�", ""]
    assert stream.has_ended


def test_streams_are_added_to_until_all_have_ended():
    tokenizer = CharTokenizer()
    rows = np.array([tokenizer.encode("abcd"), tokenizer.encode("bcda")]).T
    streams = [TextStream(tokenizer, "c"), TextStream(tokenizer, "d")]
    assert list(added_texts(iter(rows), streams)) == [["a", "b"], ["b", "c"], ["", ""]]
    streams = [TextStream(tokenizer), TextStream(tokenizer)]
    assert list(added_texts(iter(rows), streams))[-2:] == [["d", "a"], ["", ""]]
