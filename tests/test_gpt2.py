"""GPT-2 as Hugging Face publishes it, against what transformers 5.23 makes of the same folder."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, at_once
from mutate import mutated_json

import run
import tokenizers
from backend.errors import UserError
from models import safetensors

pytest.importorskip("tiktoken")

from tinygrad import Tensor, dtypes

from gpt_tiny import shapes
from inference.generator import Generator, sample
from inference.scoring import BATCH_TOKENS
from models import checkpoint, gpt2
from training.checkpoint import from_model, settings_from_json, settings_to_json
from training.checkpoint import load as load_training
from training.optimizers import OPTIMIZERS

REFERENCE = json.loads((GPT2 / "expected.json").read_text(encoding="utf-8"))
CONTEXT_LENGTH = 64


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return checkpoint.load(GPT2)


@pytest.fixture(scope="module")
def all_logits(model_and_tokenizer):
    """A function from ids to the logits after each of them, computed without the cache, in a batch
    as large as in test_scoring.py: the kernels are the same."""
    model = at_once(model_and_tokenizer[0])

    def logits(ids: list[int]) -> np.ndarray:
        windows = np.zeros((BATCH_TOKENS // CONTEXT_LENGTH, CONTEXT_LENGTH), np.int32)
        windows[0, : len(ids)] = ids
        return model(Tensor(windows).realize()).numpy()[0, : len(ids)]

    return logits


@pytest.fixture(scope="module")
def generator(model_and_tokenizer):
    return Generator(model_and_tokenizer[0])


def each_reference(also_empty: bool = False):
    references = [each for each in REFERENCE if each["ids"] or also_empty]
    return pytest.mark.parametrize("reference", references, ids=lambda each: each["text"][:12])


@each_reference(also_empty=True)
def test_ids_and_decoded_texts_equal_those_of_transformers(model_and_tokenizer, reference):
    _, tokenizer = model_and_tokenizer
    assert tokenizer.encode(reference["text"]).tolist() == reference["ids"]
    assert tokenizer.decode(reference["ids"]) == reference["decoded"]


@each_reference()
def test_logits_equal_those_of_transformers(all_logits, reference):
    ids, greedy_ids = reference["ids"], reference["greedy_ids"]
    logits = all_logits(ids + greedy_ids)[len(ids) - 1 :]
    np.testing.assert_allclose(logits[0], reference["last_logits"], rtol=0, atol=1e-4)
    # what is most likely after each of their tokens is the next: so it is greedy without a cache
    assert logits.argmax(-1)[: len(greedy_ids)].tolist() == greedy_ids


@each_reference()
def test_greedy_ids_equal_those_of_transformers_with_the_cache(generator, reference):
    prompt, n_new = np.array([reference["ids"]], np.int32), len(reference["greedy_ids"])
    new = generator(prompt, n_new, lambda logits: sample(logits, 0, None))
    assert [int(ids[0]) for ids in new] == reference["greedy_ids"]


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: parameter.numpy() for name, parameter in model.parameters().items()}


def copied(tmp_path: Path, tensors: dict | None = None, **settings) -> Path:
    """A copy of the folder with other tensors in its file, or other settings in its config."""
    shutil.copytree(GPT2, tmp_path / "model")
    config = json.loads((GPT2 / "config.json").read_text()) | settings
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    if tensors:
        safetensors.write(tmp_path / "model" / "model.safetensors", tensors)
    return tmp_path / "model"


def assert_same_weights(folder: Path, model) -> None:
    expected = weights_of(model)
    shapes = {name: array.shape for name, array in expected.items()}
    for name, array in checkpoint.read_weights(folder, shapes).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_names_without_prefix_masks_and_a_tied_head_are_read(tmp_path, model_and_tokenizer):
    theirs = safetensors.read(GPT2 / "model.safetensors")
    tensors = {name.removeprefix("transformer."): array for name, array in theirs.items()}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    tensors["h.1.attn.masked_bias"] = np.full(1, -1e4, np.float32)
    assert_same_weights(copied(tmp_path, tensors), model_and_tokenizer[0])


def test_a_tied_head_beside_names_with_the_prefix_is_read(tmp_path, model_and_tokenizer):
    tensors = dict(safetensors.read(GPT2 / "model.safetensors"))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    assert_same_weights(copied(tmp_path, tensors), model_and_tokenizer[0])


@pytest.mark.parametrize("kind", ["U8", "BOOL"])
def test_masks_of_whole_numbers_or_truths_are_read_over(tmp_path, model_and_tokenizer, kind):
    """As transformers saved them: to 4.26, and to 4.30."""
    folder = copied(tmp_path)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + n]), len(data) - 8 - n
    offsets = [end, end + 64 * 64]
    mask = {"dtype": kind, "shape": [1, 1, 64, 64], "data_offsets": offsets}
    text = json.dumps(header | {"transformer.h.0.attn.bias": mask}).encode()
    rest = data[8 + n :] + np.tri(64, dtype=np.uint8).tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    assert_same_weights(folder, model_and_tokenizer[0])


def test_a_head_of_the_earlier_name_is_the_token_embedding_as_in_transformers(
    tmp_path, model_and_tokenizer
):
    tensors = dict(safetensors.read(GPT2 / "model.safetensors"))
    tensors["lm_head.decoder.weight"] = np.zeros_like(tensors["transformer.wte.weight"])
    assert_same_weights(copied(tmp_path, tensors), model_and_tokenizer[0])


@pytest.mark.parametrize(
    ("of_model", "of_generation", "end"),
    [
        (309, None, 309),
        ([430, 309, 10**6], None, 309),
        (511, {"eos_token_id": 309}, 309),
        (309, {"eos_token_id": [147, 511]}, 147),
        (309, {"temperature": 0.7}, None),
        (None, None, None),
    ],
)
def test_a_text_ends_at_the_ids_at_which_transformers_ends_it(
    tmp_path, call, of_model, of_generation, end
):
    folder, reference = copied(tmp_path, eos_token_id=of_model), REFERENCE[0]
    if of_generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(of_generation))
    ids = reference["greedy_ids"][:8]
    ids = ids[: ids.index(end)] if end else ids
    tokenizer = checkpoint.load(folder)[1]
    words = ["-p", reference["text"], "-n", "8", "--temperature", "0"]
    assert call(run.main, folder, *words).out == reference["text"] + tokenizer.decode(ids) + "\n"


def test_a_text_begins_with_the_end_of_another_where_it_has_no_prompt_or_names_that(
    model_and_tokenizer, generator, call, pipe
):
    def continued(ids: list[int]) -> str:
        new = generator(np.array([ids], np.int32), 8, lambda logits: logits.argmax(-1))
        return tokenizer.decode(int(id) for [id] in new) + "\n"

    def shown(*words: str, given: bytes = b"") -> str:
        pipe(given)
        result = call(run.main, GPT2, "-n", "8", "--temperature", "0", *words)
        assert (result.status, result.err) == (0, "")
        return result.out

    _, tokenizer = model_and_tokenizer
    alone, marker = continued([511]), "<|endoftext|>"
    assert shown("-p", "") == shown("-p", "-") == alone
    assert shown("-p", marker) == marker + alone
    assert shown("-p", f"The{marker}") == f"The{marker}" + continued(
        [*tokenizer.encode("The"), 511]
    )
    assert shown("-i", given=f"\n{marker}\n\n".encode()) == alone
    assert shown("-p", "", "--n-samples", "2") == alone * 2
    plain = continued(np.concatenate([tokenizer.encode(part) for part in ("<|", marker[2:])]))
    assert shown("-p", marker, "--no-special") == marker + plain
    the = continued(tokenizer.encode("The"))
    assert shown("-p", "-", given=b"\xef\xbb\xbfThe") == "The" + the


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}'])
def test_a_generation_config_that_cannot_be_used_is_named(tmp_path, content):
    folder = copied(tmp_path)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json is not a config: .*") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends", [309, [309, 511], None])
def test_the_ids_that_end_a_text_are_saved_with_the_model(tmp_path, ends):
    model, tokenizer = checkpoint.load(copied(tmp_path, eos_token_id=ends))
    checkpoint.save(tmp_path / "new", {"model": asdict(model.config)}, weights_of(model), tokenizer)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["eos_token_id"] == ends


def hugging_face(added: dict[str, int] | None = None, **parts) -> dict:
    """The tokenizer of the reference as save_pretrained of transformers 5.24 leaves it."""
    vocab = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))
    merges = (GPT2 / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"<|endoftext|>": 511, **(added or {})}
    tokens = [{"id": id, "content": token, **flags} for token, id in added.items()]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    of_model = {"dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model = {"type": "BPE", **of_model, "ignore_merges": False, "vocab": vocab}
    return {
        "added_tokens": tokens,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {}},
        "model": model | {"merges": [line.split(" ") for line in merges]},
        **parts,
    }


THEIRS = safetensors.read(GPT2 / "model.safetensors")


def written(tmp_path: Path, files: dict[str, object], rows: int = 512, row=0) -> Path:
    """The model with these files, and so many rows in its table: to its own come some of `row`."""
    folder = copied(tmp_path, vocab_size=rows)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    if "tokenizer.json" in files:
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    table = THEIRS["transformer.wte.weight"]
    table = np.concatenate([table, np.full((rows - 512, 48), row, np.float32)])
    tensors = {**THEIRS, "transformer.wte.weight": table}
    safetensors.write(folder / "model.safetensors", tensors)
    return folder


OLD = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.mark.parametrize(
    "form",
    [
        "as transformers 5 writes it",
        "merges as strings",
        "as that of gpt2 on the Hub",
    ],
)
def test_a_tokenizer_json_alone_gives_the_ids_of_the_lists(tmp_path, model_and_tokenizer, form):
    content, tokenizer = hugging_face(), model_and_tokenizer[1]
    if form != "as transformers 5 writes it":
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    if form == "as that of gpt2 on the Hub":
        del content["model"]["type"], content["model"]["ignore_merges"]
        content |= {"pre_tokenizer": OLD, "post_processor": OLD | {"add_prefix_space": True}}
    loaded = checkpoint.load(written(tmp_path, {"tokenizer.json": content}))[1]
    assert loaded.digest() == tokenizer.digest()
    assert (loaded.ends, loaded.excluded) == ((511,), [])
    loaded.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (GPT2 / name).read_bytes()


SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}}
LLAMA = {"type": "Sequence", "pretokenizers": [SPLIT, {"type": "ByteLevel", "use_regex": False}]}
BOS = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [0]}}}


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("model", {"type": "Unigram", "vocab": []}, "its model has the type 'Unigram'"),
        ("model", None, "its model has the type None"),
        ("model", {"type": "BPE", "dropout": 0.1}, "its model has the dropout 0.1"),
        ("model", {"type": "BPE", "vocab": {}, "merges": [["a"]]}, "no list of pairs"),
        ("model", {"type": "BPE", "vocab": {}, "merges": [3]}, "no list of pairs"),
        ("pre_tokenizer", LLAMA, "its pre_tokenizer has the type 'Sequence'"),
        ("pre_tokenizer", SPLIT, "its pre_tokenizer has the type 'Split'"),
        ("pre_tokenizer", None, "its pre_tokenizer has the type None"),
        ("pre_tokenizer", OLD | {"add_prefix_space": True}, "the add_prefix_space True"),
        ("normalizer", {"type": "NFC"}, "its normalizer has the type 'NFC'"),
        ("post_processor", BOS, "its post_processor has the special_tokens {'<s>'"),
        ("added_tokens", [{"content": "<m>", "id": 512, "lstrip": True}], "has the lstrip True"),
        ("added_tokens", [{"content": "<m>", "id": 514}], "its ids are not 0, 1, 2"),
        ("added_tokens", [{"content": "", "id": 512}], "no map of tokens to ids"),
        ("added_tokens", 5, "added token is not a JSON object"),
        ("added_tokens", [None], "added token is not a JSON object"),
        ("added_tokens", {"content": "<m>"}, "no map of tokens to ids"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_with_its_name(tmp_path, part, value, reason):
    (tmp_path / "tokenizer.json").write_text(json.dumps(hugging_face(**{part: value})))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a vocabulary: .*") as error:
        tokenizers.load("bpe", tmp_path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_puts_a_space_before_texts_is_refused(tmp_path):
    folder = written(tmp_path, {"tokenizer_config.json": {"add_prefix_space": True}})
    with pytest.raises(UserError, match=r"tokenizer_config\.json has the add_prefix_space True"):
        checkpoint.load(folder)


def test_damaged_tokenizers_load_or_are_refused(tmp_path):
    for damaged in mutated_json(hugging_face({"<|pad|>": 512}), 60, 0):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            assert tokenizers.load("bpe", tmp_path).vocab_size in (512, 513)
        except UserError as error:
            assert "\n" not in str(error)


ADDED = {"<|pad|>": 512, "<|startoftext|>": 513, "größe": 514}
ROLES = {"tokenizer_config.json": {"pad_token": "<|pad|>", "bos_token": "<|startoftext|>"}}
FORMS = {
    "tokenizer.json": {"tokenizer.json": hugging_face(ADDED), **ROLES},
    "lists": {"added_tokens.json": ADDED, **ROLES},
    "special_tokens_map": {
        "added_tokens.json": ADDED,
        "special_tokens_map.json": {"pad_token": {"content": "<|pad|>", "lstrip": False}},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_added_tokens_are_found_decoded_and_saved_and_one_that_pads_is_never_drawn(tmp_path, form):
    folder = written(tmp_path, FORMS[form], 576)
    model, tokenizer = checkpoint.load(folder)
    config = {"model": asdict(model.config)}
    plain = checkpoint.load(folder)[1]
    plain.specials = {}  # as for a training with --no-special
    checkpoint.save(tmp_path / "saved", config, weights_of(model), plain)
    assert not (tmp_path / "saved" / "tokenizer.json").exists()
    ids = [5, 512, 513, 514, 511]
    for each in (tokenizer, checkpoint.load(tmp_path / "saved")[1]):
        assert each.specials == {"<|endoftext|>": 511, **ADDED}
        assert each.encode("&<|pad|><|startoftext|>größe<|endoftext|>").tolist() == ids
        assert each.decode(ids) == "&<|pad|><|startoftext|>größe"
        assert each.excluded == [512, *range(515, 576)]
        assert (each.end, each.ends, each.digest()) == (511, (511,), tokenizer.digest())


def test_what_a_config_says_to_pad_is_not_drawn_unless_it_is_text_or_an_end(tmp_path):
    files = {"added_tokens.json": ADDED}
    folder = written(tmp_path, files, 515)
    config = json.loads((folder / "config.json").read_text())
    ours = {"model": gpt2.config_to_ours(config)["model"]}
    for pad, padding in {512: (512,), 511: (), 5: (), 10**9: (), None: ()}.items():
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        tokenizer = tokenizers.load("bpe", folder)
        assert tokenizer.padding == padding
        theirs = gpt2.config_to_theirs(ours, tokenizer)
        assert theirs["pad_token_id"] == (padding[0] if padding else None)


def test_rows_beyond_the_tokens_are_kept_also_by_a_training(tmp_path):
    start = from_model(written(tmp_path, {}, 576, row=np.arange(48)), None)
    moments = OPTIMIZERS["adamw"].state_shapes(shapes(start.config.model))
    start.moments = {name: np.zeros(shape, np.float32) for name, shape in moments.items()}
    start.save(tmp_path / "saved")
    loaded = load_training(tmp_path / "saved", None)
    assert loaded.config.model.vocab_size == loaded.tokenizer.vocab_size == 576
    assert loaded.tokenizer.excluded == [*range(512, 576)]
    table = loaded.weights["token_embedding.weight"]
    np.testing.assert_array_equal(table[512:], np.tile(np.arange(48), (64, 1)))


def test_a_checkpoint_from_before_there_were_two_forms_of_gelu_is_read():
    start = from_model(GPT2, None)
    saved = settings_to_json(start.config)
    assert saved.pop("exact_gelu") is False
    assert settings_from_json(saved) == start.config


READ_BY_TRANSFORMERS = """
import json, sys
from transformers import AutoConfig, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
added = {token: id for token, id in tokenizer.get_added_vocab().items()}
print(json.dumps([tokenizer(text)["input_ids"], added, tokenizer.pad_token, config.pad_token_id,
                  config.eos_token_id, config.activation_function]))
"""


@pytest.mark.parametrize("form", [None, "tokenizer.json"])
def test_what_we_save_is_read_by_transformers(tmp_path, form):
    if not find_spec("transformers"):
        pytest.skip("without transformers")
    folder = written(tmp_path, FORMS.get(form, {}), 576)
    model, tokenizer = checkpoint.load(folder)
    config = {"model": asdict(replace(model.config, exact_gelu=bool(form)))}
    checkpoint.save(tmp_path / "saved", config, weights_of(model), tokenizer)
    text = "The quick größer fox.\n\n It's 12345  日本"
    program = [sys.executable, "-P", "-c", READ_BY_TRANSFORMERS, tmp_path / "saved", text]
    read = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    pad = ["<|pad|>", 512] if form else [None, None]
    expected = [tokenizer.encode(text).tolist(), tokenizer.specials, *pad, 511]
    expected.append("gelu" if form else "gelu_new")
    assert json.loads(read.stdout) == expected, read.stderr


EXACT_GELU_LOGITS = [-0.244832, 1.346516, 1.335805, -0.090091]


def test_a_gpt2_with_the_exact_gelu_gives_the_logits_of_transformers(tmp_path):
    """As Cerebras-GPT is; both with large weights, so that the two forms differ."""
    tensors = dict(THEIRS)
    for name in tensors:
        if name.endswith(("mlp.c_fc.weight", "mlp.c_proj.weight")):
            tensors[name] = tensors[name] * np.float32(10 if "c_fc" in name else 100)
    model = checkpoint.load(copied(tmp_path, tensors, activation_function="gelu"))[0]
    ids = REFERENCE[0]["ids"]
    window = np.array([ids + [0] * (CONTEXT_LENGTH - len(ids))], np.int32)
    logits = model(Tensor(window)).numpy()[0, len(ids) - 1, :4]
    np.testing.assert_allclose(logits, EXACT_GELU_LOGITS, rtol=0, atol=1e-5)


def test_half_precision_stays(tmp_path, model_and_tokenizer):
    theirs = safetensors.read(GPT2 / "model.safetensors")
    tensors = {name: array.astype(np.float16) for name, array in theirs.items()}
    model, _ = checkpoint.load(copied(tmp_path, tensors))
    assert {parameter.dtype for parameter in model.parameters().values()} == {dtypes.float16}


def test_a_head_of_its_own_and_a_strange_tensor_are_refused(tmp_path):
    tensors = dict(safetensors.read(GPT2 / "model.safetensors"))
    error = r"model\.safetensors: its head lm_head\.weight is not the token embedding"
    with pytest.raises(ValueError, match=error):
        head = {"lm_head.weight": tensors["transformer.wte.weight"] + 1}
        checkpoint.load(copied(tmp_path / "head", tensors | head))
    with pytest.raises(ValueError, match=r"no tensor 'transformer\.h\.2\.ln_1\.bias'"):
        strange = {"transformer.h.2.ln_1.bias": np.zeros(48, np.float32)}
        checkpoint.load(copied(tmp_path / "strange", tensors | strange))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 4}),
        ("gpt_tiny", []),
        ("n_embd", None),
        ("n_embd", "wide"),
        ("n_embd", 50),
        ("n_inner", 10**12),
        ("n_layer", 10**12),
        ("resid_pdrop", 1.5),
        ("vocab_size", 511),
    ],
)
def test_what_our_model_cannot_do_is_refused_by_name(tmp_path, setting, value):
    ours = {theirs: ours for ours, theirs in gpt2.SIZES.items()}
    name = {"n_inner": "weights", "n_layer": "weights", "resid_pdrop": "dropout"}.get(setting)
    with pytest.raises(ValueError, match=name or ours.get(setting, setting)) as error:
        checkpoint.load(copied(tmp_path, **{setting: value}))
    assert "\n" not in str(error.value)


def test_a_missing_setting_is_named(tmp_path):
    folder = copied(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["n_positions"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks the setting n_positions"):
        checkpoint.read_config(folder)


def test_a_gpt2_is_saved_in_the_layout_that_it_was_read_from(tmp_path, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    config = {"seed": 1, "optimizer": {"epsilon": 1e-5}, "model": asdict(model.config)}
    checkpoint.save(tmp_path / "model", config, weights_of(model), tokenizer)

    files = ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert sorted(os.listdir(tmp_path / "model")) == files
    theirs = safetensors.read(GPT2 / "model.safetensors")
    ours = safetensors.read(tmp_path / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    their_config = json.loads((GPT2 / "config.json").read_text()) | {"n_inner": 192}
    our_config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert our_config.pop("gpt_tiny") == {"seed": 1, "optimizer": {"epsilon": 1e-5}}
    assert our_config.items() <= their_config.items()

    # and our settings with it
    assert checkpoint.read_config(tmp_path / "model") == config | {"tokenizer": "bpe"}
    assert_same_weights(tmp_path / "model", model)
    loaded = checkpoint.load(tmp_path / "model")[1]
    assert (loaded.vocab, loaded.merges) == (tokenizer.vocab, tokenizer.merges)


def test_a_gpt2_is_not_saved_as_gpt_burns(tmp_path, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    config = {"model": asdict(model.config)}
    with pytest.raises(ValueError, match="gpt-burn's layout holds no GPT-2"):
        checkpoint.save(tmp_path / "model", config, weights_of(model), tokenizer, format="burn")
