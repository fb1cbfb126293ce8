"""A model on disk: what is read equals what was written, and what cannot be read is an error."""

import errno
import json
import math
import os
import re
import resource
import time
from itertools import pairwise
from pathlib import Path

import msgpack
import numpy as np
import pytest
from mutate import mutated_bytes, mutated_json

import checkpoint
import gpt_burn

DATA = Path(__file__).parent / "data"
REFERENCE = DATA / "gpt_burn_114k"
N_MUTATIONS = int(os.environ.get("GPT_TINY_MUTATIONS", "300"))
FORMATS = {16: "half::binary16::f16", 32: "f32", 64: "f64"}


def parameter_shapes(model: dict) -> dict[str, tuple[int, ...]]:
    vocab_size, context_length = model["vocab_size"], model["context_length"]
    d_model, d_hidden = model["d_model"], model["d_hidden"]
    shapes = {
        "token_embedding.weight": (vocab_size, d_model),
        "positional_embedding.weight": (context_length, d_model),
    }
    for block in (f"blocks.{index}" for index in range(model["n_layers"])):
        for norm in ("norm_1", "norm_2"):
            shapes |= dict.fromkeys((f"{block}.{norm}.gamma", f"{block}.{norm}.beta"), (d_model,))
        for part in ("query", "key", "value", "out"):
            shapes[f"{block}.multi_head.{part}.weight"] = (d_model, d_model)
        shapes[f"{block}.pwff.linear_1.weight"] = (d_hidden, d_model)
        shapes[f"{block}.pwff.linear_1.bias"] = (d_hidden,)
        shapes[f"{block}.pwff.linear_2.weight"] = (d_model, d_hidden)
        shapes[f"{block}.pwff.linear_2.bias"] = (d_model,)
    shapes |= dict.fromkeys(("norm.gamma", "norm.beta"), (d_model,))
    return shapes | {"linear.weight": (vocab_size, d_model), "linear.bias": (vocab_size,)}


CONFIG = json.loads((DATA / "adamw_steps" / "config.json").read_text())
SHAPES = parameter_shapes(CONFIG["model"])


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path, weights) -> Path:
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    return tmp_path / "model"


def make_record(tensors: dict[str, np.ndarray], precision: int) -> bytes:
    """Return a record as msgpack itself would pack it, with linears' weights (in, out)."""
    item = {}
    for name, values in tensors.items():
        if precision == 16:
            numbers = values.astype(np.float16).reshape(-1).view(np.uint16).tolist()
        else:
            numbers = values.reshape(-1).tolist()
        *modules, field = name.split(".")
        holder = item
        for module in modules:
            holder = holder.setdefault(module, {})
        param = {"value": numbers, "shape": list(values.shape)}
        holder[field] = {"id": "an id", "param": param}
    record = {"metadata": {"float": FORMATS[precision]}, "item": item, "_b": []}
    return msgpack.packb(record, use_single_float=precision == 32)


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


# --- reading gpt-burn's records ---


def test_reference_record_equals_what_msgpack_reads():
    config = checkpoint.read_config(REFERENCE)
    weights = checkpoint.read_weights(REFERENCE, parameter_shapes(config["model"]))
    item = msgpack.unpackb((REFERENCE / "model.mpk").read_bytes())["item"]
    for name, values in weights.items():
        holder = item
        for part in name.split("."):
            holder = holder[int(part) if part.isdigit() else part]
        theirs = np.array(holder["param"]["value"], np.uint16).view(np.float16)
        theirs = theirs.reshape(holder["param"]["shape"])
        theirs = theirs if "embedding" in name else theirs.T
        assert values.dtype == np.float16
        assert values.flags.c_contiguous
        np.testing.assert_array_equal(values, theirs, err_msg=name)


def test_full_precision_reference_records_are_read():
    before = gpt_burn.read_record(DATA / "adamw_steps" / "before.mpk")
    after = gpt_burn.read_record(DATA / "adamw_steps" / "after_5.mpk")
    assert {name: values.shape for name, values in before.items()} == SHAPES
    assert {values.dtype for values in before.values()} == {np.dtype(np.float32)}
    moved = max(np.abs(after[name] - before[name]).max() for name in before)
    assert 0.003 < moved < 0.03  # five steps of AdamW at a learning rate of 0.003


@pytest.mark.parametrize("precision", [16, 32, 64])
def test_records_of_each_precision_are_read_exactly(tmp_path, precision):
    values = np.random.default_rng(0).normal(0, 0.02, (300, 40)).astype(f"f{precision // 8}")
    values[0, 0] = -0.0
    path = tmp_path / "model.mpk"
    path.write_bytes(make_record({"linear.weight": values, "norm.beta": values[0]}, precision))
    theirs = {"linear.weight": values.T, "norm.beta": values[0]}
    assert_equal(gpt_burn.read_record(path), theirs)

    path.with_name("config.json").write_text(json.dumps(CONFIG))
    shapes = {name: values.shape for name, values in theirs.items()}
    at_most_float32 = np.float16 if precision == 16 else np.float32
    theirs = {name: values.astype(at_most_float32) for name, values in theirs.items()}
    assert_equal(checkpoint.read_weights(tmp_path, shapes), theirs)


@pytest.mark.parametrize("share", [0, 0.0003, 0.01, 0.1, 0.5, 0.99, 1])
@pytest.mark.parametrize("largest", [1, 0x80, 0x100])
def test_half_precision_records_with_any_share_of_short_integers_are_read(tmp_path, share, largest):
    rng = np.random.default_rng(0)
    bits = rng.integers(0x100, 0x10000, 40_000, np.uint16)
    short = rng.random(len(bits)) < share
    bits[short] = rng.integers(0, largest, short.sum())
    path = tmp_path / "model.mpk"
    path.write_bytes(make_record({"norm.beta": bits.view(np.float16)}, 16))
    read = gpt_burn.read_record(path)["norm.beta"]
    np.testing.assert_array_equal(read.view(np.uint16), bits)


@pytest.mark.parametrize("numbers", [[1, 0.5], [1, 70_000], [1, -1], [1, None], [1, "x"], [1, [2]]])
@pytest.mark.parametrize("precision", [16, 32])
def test_a_record_with_other_numbers_than_it_says_is_refused(tmp_path, numbers, precision):
    param = {"value": numbers, "shape": [2]}
    item = {"norm": {"beta": {"id": "", "param": param}}}
    path = tmp_path / "model.mpk"
    path.write_bytes(msgpack.packb({"metadata": {"float": FORMATS[precision]}, "item": item}))
    with pytest.raises(ValueError, match=r"model\.mpk is truncated or corrupt"):
        gpt_burn.read_record(path)


@pytest.mark.parametrize(
    "header", [b"\xdd\xff\xff\xff\xff", b"\xdd\x00\x01\x00\x00", b"\xdc\xff\xff"]
)
def test_a_record_that_claims_more_numbers_than_it_holds_is_refused(tmp_path, header):
    data = (REFERENCE / "model.mpk").read_bytes()
    at = data.index(b"value\xdc") + 5
    (tmp_path / "model.mpk").write_bytes(data[:at] + header + data[at + 3 : at + 1000])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        gpt_burn.read_record(tmp_path / "model.mpk")


def test_a_shape_of_a_million_million_elements_is_refused(tmp_path):
    param = {"value": [1], "shape": [10**6, 10**6]}
    item = {"norm": {"beta": {"id": "", "param": param}}}
    record = {"metadata": {"float": FORMATS[16]}, "item": item}
    (tmp_path / "model.mpk").write_bytes(msgpack.packb(record))
    with pytest.raises(ValueError, match=r"norm.beta.*1 values .*\[1000000, 1000000\]"):
        gpt_burn.read_record(tmp_path / "model.mpk")

    text = b'{"x":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(100))
    with pytest.raises(ValueError, match="'x' does not fit"):
        checkpoint.read_safetensors(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_read_and_refused_as_weights(folder, weights, value):
    weights["norm.beta"][3] = value
    checkpoint.write_safetensors(folder / "model.safetensors", weights)
    assert_equal(checkpoint.read_safetensors(folder / "model.safetensors"), weights)
    read = checkpoint.read_weights(folder, SHAPES)
    assert_equal({"norm.gamma": read["norm.gamma"]}, {"norm.gamma": weights["norm.gamma"]})
    error = r"model\.safetensors: the tensor norm\.beta holds numbers that are not finite"
    with pytest.raises(ValueError, match=error):
        read["norm.beta"]


def test_finite_numbers_whose_sum_is_not_are_weights(folder, weights):
    weights["norm.beta"][:] = 3e38
    checkpoint.write_safetensors(folder / "model.safetensors", weights)
    assert_equal(checkpoint.read_weights(folder, SHAPES), weights)


# --- writing them ---


def test_a_written_record_is_byte_for_byte_gpt_burns(tmp_path, monkeypatch):
    theirs = (REFERENCE / "model.mpk").read_bytes()
    ids = re.findall(rb"\xa2id\xd9\x24([0-9a-f-]{36})", theirs)
    config = checkpoint.read_config(REFERENCE)
    weights = checkpoint.read_weights(REFERENCE, parameter_shapes(config["model"]))
    assert len(ids) == len(weights)

    new_id = gpt_burn.uuid.uuid4
    remaining = iter(ids)
    monkeypatch.setattr(gpt_burn.uuid, "uuid4", lambda: next(remaining).decode())
    gpt_burn.write_record(tmp_path / "model.mpk", weights, config["model"]["n_layers"])
    assert (tmp_path / "model.mpk").read_bytes() == theirs

    monkeypatch.setattr(gpt_burn.uuid, "uuid4", new_id)
    config["tokenizer"] = "char"
    checkpoint.save(tmp_path / "model", config, weights, format="burn")
    ours = (tmp_path / "model" / "model.mpk").read_bytes()
    our_ids = re.findall(rb"\xa2id\xd9\x24([0-9a-f-]{36})", ours)
    assert len(set(our_ids) - set(ids)) == len(ids)
    for our_id, their_id in zip(our_ids, ids, strict=True):
        ours = ours.replace(our_id, their_id)
    assert ours == theirs
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written == json.loads((REFERENCE / "config.json").read_text())


def test_short_integers_are_packed_as_msgpack_does():
    bits = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF] * 3, np.uint16)
    packed = gpt_burn.packed_halves("norm.beta", bits.view(np.float16))
    assert packed == msgpack.packb(bits.tolist())


def test_a_model_that_gpt_burn_cannot_hold_is_refused(tmp_path, weights):
    path = tmp_path / "model.mpk"
    with pytest.raises(ValueError, match=r"linear\.bias has values too large"):
        gpt_burn.write_record(path, weights | {"linear.bias": np.full(11, 7e4, np.float32)}, 2)
    with pytest.raises(ValueError, match=r"no place for blocks\.1"):
        gpt_burn.write_record(path, weights, 1)
    with pytest.raises(ValueError, match=r"needs blocks\.2"):
        gpt_burn.write_record(path, weights, 3)


# --- safetensors ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_official_library_and_ours_read_each_others_files(tmp_path, weights, dtype):
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    weights = {name: values.astype(dtype) for name, values in weights.items()}
    path = tmp_path / "model.safetensors"
    checkpoint.write_safetensors(path, weights)
    assert_equal(numpy.load_file(path), weights)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    numpy.save_file(weights, path)
    assert_equal(checkpoint.read_safetensors(path), weights)


def test_transposed_weights_are_saved_as_they_are_seen(tmp_path, weights):
    weights = {name: np.asfortranarray(values) for name, values in weights.items()}
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    assert_equal(checkpoint.read_weights(tmp_path / "model", SHAPES), weights)


def test_bfloat16_becomes_float32(tmp_path):
    text = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x80\x3f\x20\xc0")
    read = checkpoint.read_safetensors(path)["x"]
    assert read.dtype == np.float32
    assert read.tolist() == [1.0, -2.5]


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
BAD_HEADERS = {
    "overlap": f'{{"x":{ENTRY},"y":{ENTRY}}}',
    "gap": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "the tensors end before": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "not fit its shape": '{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    "no proper shape": '{"x":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}',
    "'x' is of the type 'I64'": '{"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
    "not valid JSON": '{"x"',
    "recursion": '{"x":' + "[" * 100_000,
    "not a JSON object": "[]",
    "corrupt": '{"x":{"dtype":[],"shape":{},"data_offsets":8}}',
    "header does not fit": " " * 5_000_000,
}


@pytest.mark.parametrize("reason", BAD_HEADERS)
def test_a_bad_safetensors_header_is_refused(tmp_path, reason):
    text = BAD_HEADERS[reason].encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    expected = "does not fit" if reason in ("overlap", "gap") else reason
    with pytest.raises(ValueError, match=expected) as error:
        checkpoint.read_safetensors(path)
    assert "\n" not in str(error.value)


# --- a folder that does not fit together ---


def test_what_is_saved_is_read_back(folder, weights):
    assert checkpoint.read_config(folder) == CONFIG
    assert_equal(checkpoint.read_weights(folder, SHAPES), weights)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_wrong_tensor_is_named_with_both_shapes(folder, tmp_path, weights):
    name = "blocks.1.pwff.linear_1.weight"
    wanted = SHAPES | {name: (50, 12)}
    with pytest.raises(ValueError, match=rf"{name} has the shape \(48, 12\), .*\(50, 12\)"):
        checkpoint.read_weights(folder, wanted)
    wanted = SHAPES | {"extra.bias": (7,)}
    with pytest.raises(ValueError, match=r"lacks the tensor extra\.bias \(7,\)"):
        checkpoint.read_weights(folder, wanted)
    wanted = {name: shape for name, shape in SHAPES.items() if name != "linear.bias"}
    with pytest.raises(ValueError, match=r"not ask for the tensor 'linear\.bias' \(11,\)"):
        checkpoint.read_weights(folder, wanted)


def test_missing_folders_and_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no model folder .*nowhere"):
        checkpoint.read_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        checkpoint.read_config(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors or model\.mpk"):
        checkpoint.read_weights(folder, SHAPES)
    (folder / "model.mpk").touch()
    with pytest.raises(ValueError, match=r"model\.mpk is empty"):
        checkpoint.read_weights(folder, SHAPES)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    (folder / "model.mpk").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is not a model folder"):
        checkpoint.read_weights(folder, SHAPES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layers", 0, "n_layers must be a whole number above 0, not 0"),
        ("n_layers", True, "n_layers must be a whole number above 0, not True"),
        ("n_layers", 2.0, r"n_layers must be .*, not 2\.0"),
        ("n_layers", 10**12, r"more weights than model\.safetensors can hold"),
        ("n_layers", 10**9, r"more weights than model\.safetensors can hold"),
        ("d_hidden", 10**6, r"more weights than model\.safetensors can hold"),
        ("d_model", 13, "d_model 13 is not divisible by n_heads 2"),
        ("dropout", 1, "dropout must be at least 0 and below 1, not 1"),
        ("dropout", math.nan, "dropout must be .*, not nan"),
        ("surprise", 1, "a model has no setting 'surprise'"),
    ],
)
def test_a_wrong_setting_is_named(folder, key, value, message):
    config = CONFIG | {"model": CONFIG["model"] | {key: value}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_config(folder)


def test_a_tokenizer_is_a_name_and_not_a_path(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tokenizer": "../vowel"}))
    with pytest.raises(ValueError, match=r"tokenizer is '\.\./vowel'"):
        checkpoint.read_config(folder)


# --- saving, whole or not at all ---


class Vowel:
    name = "vowel"

    def save(self, folder: Path) -> None:
        (folder / "vowel.json").write_text("[]")


def test_the_tokenizer_is_saved_with_the_model(tmp_path, weights):
    checkpoint.save(tmp_path / "model", CONFIG, weights, Vowel(), format="burn")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.mpk", "vowel.json"]
    assert checkpoint.read_config(tmp_path / "model")["tokenizer"] == "vowel"


def test_a_model_is_replaced_and_other_files_beside_it_stay(folder, weights):
    (folder / "notes.txt").write_text("mine")
    checkpoint.save(folder, CONFIG | {"seed": 1}, weights, format="burn")
    assert sorted(os.listdir(folder)) == ["config.json", "model.mpk", "notes.txt"]
    assert checkpoint.read_config(folder)["seed"] == 1
    assert os.listdir(folder.parent) == ["model"]


@pytest.mark.parametrize("broken", ["write_safetensors", "sync", "os.rename", "Vowel.save"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_earlier_model_and_nothing_else(
    folder, weights, monkeypatch, broken, error
):
    rename = os.rename

    def fail(*args):
        if broken == "os.rename" and folder.exists():  # let the old one go, fail at the new one
            return rename(*args)
        if broken == "os.rename":
            monkeypatch.setattr(os, "rename", rename)
        raise error

    if broken == "os.rename":  # as on systems that cannot swap two folders at once
        monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda name: None)
    holder = {"os.rename": os, "Vowel.save": Vowel}.get(broken, checkpoint)
    monkeypatch.setattr(holder, broken.split(".")[-1], fail)
    doubled = {name: 2 * values for name, values in weights.items()}
    with pytest.raises(type(error)):
        checkpoint.save(folder, CONFIG | {"seed": 1}, doubled, Vowel())
    assert os.listdir(folder.parent) == ["model"]
    assert checkpoint.read_config(folder) == CONFIG
    assert_equal(checkpoint.read_weights(folder, SHAPES), weights)


def test_all_is_on_disk_before_the_model_gets_its_name(tmp_path, weights, monkeypatch):
    events, rename, sync = [], os.rename, checkpoint.sync
    monkeypatch.setattr(checkpoint, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda *args: (events.append("rename"), rename(*args)))
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before)[1:] == ["config.json", "model.safetensors"]
    assert min(before).startswith(".gpt-tiny-")
    assert after == ["model", tmp_path.name]


def test_a_link_to_a_model_is_saved_through(folder, weights):
    link = folder.with_name("latest")
    link.symlink_to(folder, target_is_directory=True)
    checkpoint.save(link, CONFIG | {"seed": 1}, weights)
    assert link.is_symlink()
    assert checkpoint.read_config(folder)["seed"] == 1


def test_missing_parents_are_made_when_the_model_is_saved(tmp_path, weights):
    checkpoint.check_destination(tmp_path / "a" / "b" / "model")
    assert os.listdir(tmp_path) == []
    checkpoint.save(tmp_path / "a" / "b" / "model", CONFIG, weights)
    assert checkpoint.read_config(tmp_path / "a" / "b" / "model") == CONFIG


def test_destinations_that_hold_something_else_are_refused(tmp_path, folder, weights):
    checkpoint.check_destination(folder)
    (tmp_path / "empty").mkdir()
    checkpoint.check_destination(tmp_path / "empty")

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "config.json").touch()
    with pytest.raises(ValueError, match="photos exists and is not a model folder"):
        checkpoint.check_destination(photos)
    with pytest.raises(ValueError, match="photos exists and is not a model folder"):
        checkpoint.save(photos, CONFIG, weights)
    assert os.listdir(photos) == ["config.json"]

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        checkpoint.check_destination(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot save to .*: Not a directory"):
        checkpoint.check_destination(tmp_path / "file" / "model")
    if Path("/proc").exists():  # where no one may write, not even root
        with pytest.raises(ValueError, match="cannot save to /proc/model: "):
            checkpoint.check_destination(Path("/proc/model"))


# --- damaged files: an answer or one line of error, soon and in little memory ---


def outcomes(mutations, path: Path, read) -> tuple[int, int]:
    """Return how many of the mutated files could be read, and how many were refused."""
    n_read = n_refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for mutated in mutations:
        path.unlink(missing_ok=True)  # a new file: arrays may still be views of the old one
        path.write_bytes(mutated)
        start = time.perf_counter()
        try:
            assert dict(read())
            n_read += 1
        except (ValueError, OSError) as error:
            text = str(error)
            assert text
            assert text.isprintable(), text
            assert len(text) < 500 + len(str(path)), text
            n_refused += 1
        assert time.perf_counter() - start < 2
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 500 * 1024  # kilobytes
    return n_read, n_refused


def test_damaged_configs_are_refused(folder):
    path = folder / "config.json"

    def read():
        return checkpoint.read_config(folder)

    data = path.read_bytes()
    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 2, 0), path, read)
    assert n_refused > n_read
    n_read, n_refused = outcomes(mutated_json(CONFIG, N_MUTATIONS // 2, 0), path, read)
    assert min(n_refused, n_read) > 0


def test_damaged_safetensors_are_refused(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def read():
        return checkpoint.read_weights(folder, SHAPES)

    def files():
        for text in mutated_json(header, N_MUTATIONS // 2, 0):
            yield len(text).to_bytes(8, "little") + text + data[start:]

    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 2, 0), path, read)
    assert n_refused > n_read > 0
    n_read, n_refused = outcomes(files(), path, read)
    assert n_refused > n_read


@pytest.mark.parametrize("precision", [16, 32])
def test_damaged_records_are_refused(folder, weights, precision):
    (folder / "model.safetensors").unlink()
    path = folder / "model.mpk"
    data = (DATA / "adamw_steps" / "before.mpk").read_bytes()
    if precision == 16:
        gpt_burn.write_record(path, weights, 2)
        data = path.read_bytes()

    def read():
        return checkpoint.read_weights(folder, SHAPES)

    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 2, 0), path, read)
    assert n_refused > n_read > 0
    cuts = [*range(0, 1500, 7), *range(1500, len(data), 997), len(data) - 1]
    assert all(first < second for first, second in pairwise(cuts))
    assert outcomes((data[:cut] for cut in cuts), path, read) == (0, len(cuts))
