"""run.py --score, against PyTorch's figures, and each token's cost, from one window at a time."""

import gzip
import io
import json
import re
import sys

import numpy as np
import pytest
from conftest import GPT2, REFERENCE, assert_error, at_once
from tinygrad import Tensor

import run
from backend.jit_cache import CachedJit
from gpt_tiny import GPT, GPTConfig, initial_weights
from inference import scoring
from inference.scoring import Score, known_ids, losses
from models import checkpoint
from tokenizers import CHARACTERS, CharTokenizer, SimpleVowelTokenizer

GREEDY = [each["greedy"] for each in json.loads((REFERENCE / "expected.json").read_text())]
MIXED = [each["text"] for each in json.loads((GPT2 / "expected.json").read_text(encoding="utf-8"))]
TEXT = "\n".join(GREEDY) + "".join(MIXED)  # with characters of one to four bytes
# Of PyTorch 2.15, in float64, one window at a time: GPT2LMHeadModel of transformers 5.23 with its
# own tokenizer, and gpt-burn's model written anew, without the 6 characters that it doesn't know.
# By folder: bits per byte, bits per character, perplexity, tokens, bytes, characters
PYTORCHS = {
    GPT2: (3.1895381048, 3.2155751506, 489.6239070669, 529, 1482, 1470),
    REFERENCE: (1.6320724452, 1.6343020524, 3.1043733017, 1464, 1466, 1464),
}
LINES = {
    GPT2: "3.1895 bits per byte, 3.2156 bits per character, perplexity 489.62, 529 tokens\n",
    REFERENCE: "1.6321 bits per byte, 1.6343 bits per character, perplexity 3.10, 1464 tokens\n",
}
each_model = pytest.mark.parametrize("model", PYTORCHS, ids=lambda path: path.name)


@pytest.fixture(autouse=True)
def tokenizers_of_all_models():
    pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def text_file(folder):
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder / "text.txt"


def scored(model: GPT, tokenizer, text: str) -> Score:
    ids, _ = known_ids(tokenizer, [text])
    score = Score(tokenizer)
    for counted, nats in losses(model, ids):
        score.add(counted, nats)
    return score


@each_model
def test_a_score_is_pytorchs(model):
    score = scored(*checkpoint.load(model), TEXT)
    *rates, n_tokens, n_bytes, n_characters = PYTORCHS[model]
    assert (score.n_tokens, score.n_bytes, score.n_characters) == (n_tokens, n_bytes, n_characters)
    ours = [score.bits / n_bytes, score.bits / n_characters, score.perplexity]
    np.testing.assert_allclose(ours, rates, rtol=1e-5)


@each_model
def test_the_score_is_one_line_of_standard_output(call, text_file, model):
    result = call(run.main, model, "--score", text_file)
    assert (result.status, result.out) == (0, LINES[model])
    n = sum(character not in CHARACTERS for character in TEXT)
    warning = rf"warning: {100 * n / len(TEXT):.1f} % of .*text\.txt is not in the vocabulary and "
    assert (model == GPT2 and result.err == "") or re.match(warning + "left out: ", result.err)


def test_a_text_is_read_from_standard_input(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert call(run.main, GPT2, "--score", "-").out == LINES[GPT2]


def test_a_compressed_text_is_scored(call, folder):
    (folder / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert call(run.main, GPT2, "--score", folder / "text.txt.gz").out == LINES[GPT2]


def test_the_end_of_a_document_costs_its_bits_and_is_no_byte(call, folder):
    model, tokenizer = checkpoint.load(GPT2)
    lines = [json.dumps({"text": text}) for text in GREEDY]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    ids = [id for text in GREEDY for id in (*tokenizer.encode(text).tolist(), tokenizer.end)]
    nats = [nats for _, nats in losses(model, np.array(ids, np.uint16))]
    n_bytes = sum(map(len, GREEDY)) - len(tokenizer.tokens[ids[0]])
    bits = np.concatenate(nats).sum(dtype=np.float64) / np.log(2) / n_bytes
    shown = call(run.main, GPT2, "--score", folder / "documents.jsonl").out
    assert shown.startswith(f"{bits:.4f} bits per byte, ")
    assert shown.endswith(f" {len(ids) - 1} tokens\n")

    (folder / "lines.txt").write_text("".join(f"{text}\n" for text in GREEDY))
    plain = call(run.main, GPT2, "--no-special", "--score", folder / "documents.jsonl")
    assert plain.out == call(run.main, GPT2, "--score", folder / "lines.txt").out != shown


def test_a_bar_is_shown_on_a_terminal(call, text_file, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    result = call(run.main, GPT2, "--score", text_file)
    assert result.out == LINES[GPT2]
    assert "\rscore " in result.err and " tokens/s" in result.err


def test_a_second_run_compiles_nothing(call, text_file, monkeypatch):
    if not CachedJit(lambda: None, [Tensor([0]).realize()], None).path:
        pytest.skip("jits are kept on the CPU alone")
    call(run.main, GPT2, "--score", text_file)
    monkeypatch.setattr(CachedJit, "capture", None)
    assert call(run.main, GPT2, "--score", text_file).out == LINES[GPT2]


@pytest.mark.parametrize(("model", "weights"), [(REFERENCE, "int8"), (GPT2, "float16")])
def test_rounded_weights_cost_hardly_more(call, text_file, model, weights):
    result = call(run.main, model, "--score", text_file, "--weights", weights)
    assert float(result.out.split()[0]) == pytest.approx(PYTORCHS[model][0], rel=0.005)


def test_a_model_of_half_precision_is_scored(call, text_file, tmp_path):
    model, tokenizer = checkpoint.load(REFERENCE)
    weights = {name: p.numpy().astype(np.float16) for name, p in model.parameters().items()}
    config = checkpoint.read_config(REFERENCE)
    checkpoint.save(tmp_path / "half", config, weights, tokenizer, format="burn")
    result = call(run.main, tmp_path / "half", "--score", text_file)
    assert float(result.out.split()[0]) == pytest.approx(PYTORCHS[REFERENCE][0], rel=0.001)


def cost_of(whole_window, ids: np.ndarray, place: int, context_length: int) -> float:
    """What the id there costs, from the window that counts it."""
    half = (context_length + 1) // 2
    start = max(0, -(-(place - context_length) // half) * half)
    window = np.zeros((1, context_length), np.int32)
    seen = ids[start : start + context_length]
    window[0, : len(seen)] = seen
    logits = whole_window(Tensor(window).realize()).numpy()[0, place - 1 - start].astype(np.float64)
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[place]]


@pytest.mark.parametrize("context_length", [5, 1])
def test_each_token_but_the_first_costs_what_its_window_says(monkeypatch, context_length):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 24)
    config = GPTConfig(context_length, vocab_size=11, n_layers=1, d_model=12, d_hidden=48)
    weights = {name: 12 * values for name, values in initial_weights(config, 5).items()}
    model = GPT(config, weights)
    whole_window = at_once(lambda ids: model(ids).realize())
    ids = np.random.default_rng(3).integers(11, size=64).astype(np.uint8)
    expected = [cost_of(whole_window, ids, place, context_length) for place in range(1, 64)]
    assert np.ptp(expected) > 1
    for n in (2, 5, 6, 7, 17, 63, 64):
        pieces = zip(*losses(model, ids[:n]), strict=True)
        counted, nats = (np.concatenate(parts) for parts in pieces)
        assert np.array_equal(counted, ids[1:n])
        np.testing.assert_allclose(nats, expected[: n - 1], rtol=1e-4, atol=1e-5)


def test_batches_of_a_large_vocabulary_are_small(monkeypatch):
    shapes = []
    monkeypatch.setattr(scoring, "zeros", lambda *shape: shapes.append(shape) or 1 / 0)
    for sizes in ({}, {"vocab_size": 50257}, {"context_length": 4096}):
        model = type("Model", (), {"config": GPTConfig(**sizes)})
        with pytest.raises(ZeroDivisionError):
            next(losses(model, np.zeros(9, np.uint8)))
    assert shapes == [(32, 32), (10, 32), (1, 2048)]


@pytest.mark.parametrize("name", ["char", "vowel", "bpe"])
def test_bytes_and_characters_are_those_of_the_known_tokens(name):
    tokenizer = {
        "char": lambda: CharTokenizer(),
        "vowel": lambda: SimpleVowelTokenizer(SimpleVowelTokenizer.tokenize(TEXT), 50),
        "bpe": lambda: checkpoint.load(GPT2)[1],
    }[name]()
    text = TEXT * 100  # more than a chunk
    ids, unknown = known_ids(tokenizer, [text])
    assert ids.dtype == tokenizer.dtype
    assert (unknown.n > 0) == (name != "bpe")
    assert len(ids) + sum(unknown.counts.values()) == len(tokenizer.encode(text))
    score, known = Score(tokenizer), tokenizer.decode(ids)
    score.add(ids, np.zeros(len(ids), np.float32))
    assert (score.n_bytes, score.n_characters) == (len(known.encode()), len(known))
    assert (score.bits, score.perplexity) == (0, 1)


def test_models_that_are_sure_of_wrong_tokens_have_a_score():
    score = Score(CharTokenizer())
    score.add(np.array([1, 2]), np.full(2, 1e30, np.float32))
    assert score.bits > 1e30 and score.perplexity == np.inf


def test_weights_too_large_for_finite_logits_are_refused():
    model, tokenizer = checkpoint.load(REFERENCE)
    weights = {name: np.full(p.shape, 1e30, np.float32) for name, p in model.parameters().items()}
    with pytest.raises(ValueError, match="logits are not finite"):
        scored(GPT(model.config, weights), tokenizer, TEXT)


@pytest.mark.parametrize(
    ("model", "content", "words"),
    [
        (REFERENCE, "", ["text.txt is too short", "two characters"]),
        (REFERENCE, "x", ["text.txt is too short", "two characters"]),
        (GPT2, "日", ["text.txt is too short", "two characters"]),  # but of three tokens
        (REFERENCE, b"The \xff", ["text.txt", "not UTF-8", "0xff at offset 4"]),
    ],
)
def test_texts_without_a_score_are_refused_by_name(call, tmp_path, model, content, words):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "text.txt").write_bytes(data)
    assert_error(call(run.main, model, "--score", tmp_path / "text.txt"), 1, words)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--score"], 2, ["--score", "expected one argument"]),
        (["--score", "nowhere.txt"], 1, ["there is no nowhere.txt: name a text with --score"]),
        (["--score", REFERENCE], 1, [f"there is no .txt or .jsonl in {REFERENCE}"]),
        (["--score", "text.txt", "-p", "The"], 2, ["--prompt is of no use beside --score"]),
        (["--score", "text.txt", "-i"], 2, ["--interactive is of no use beside --score"]),
        (["--score", "text.txt", "--top-k", "3"], 2, ["--top-k is of no use beside --score"]),
        (["--score", "text.txt", "--n-samples", "2"], 2, ["--n-samples is of no use"]),
    ],
)
def test_wrong_usage_is_refused_by_the_name_of_the_option(call, options, status, words):
    result = call(run.main, REFERENCE, *options)
    assert_error(result, status, words)
    assert result.out == ""
