"""Safetensors files, beside the official library."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIG, SHAPES, assert_equal
from mutate import N_MUTATIONS, mutated_bytes, mutated_json, outcomes

from models import checkpoint, safetensors


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_official_library_and_ours_read_each_others_files(tmp_path, weights, dtype):
    official = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    weights = {name: values.astype(dtype) for name, values in weights.items()}
    path = tmp_path / "model.safetensors"
    safetensors.write(path, weights)
    assert_equal(numpy.load_file(path), weights)
    with official.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    numpy.save_file(weights, path)
    assert_equal(safetensors.read(path), weights)


def test_bfloat16_becomes_float32(tmp_path):
    text = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x80\x3f\x20\xc0")
    read = safetensors.read(path)["x"]
    assert read.dtype == np.float32
    assert read.tolist() == [1.0, -2.5]


def test_a_shape_of_a_million_million_elements_is_refused(tmp_path):
    text = b'{"x":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(100))
    with pytest.raises(ValueError, match="'x' does not fit"):
        safetensors.read(path)


def written(path: Path, header: dict, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("kind", [*safetensors.N_BITS, "F3_OF_TOMORROW"])
def test_a_tensor_of_any_type_is_no_hindrance_until_it_is_used(tmp_path, kind):
    n = safetensors.N_BITS.get(kind, 24)  # bytes of 8 numbers
    mask = {"dtype": kind, "shape": [2, 4], "data_offsets": [0, n]}
    used = {"dtype": "F32", "shape": [1], "data_offsets": [n, n + 4]}
    path = tmp_path / "model.safetensors"
    arrays = safetensors.read(written(path, {"mask": mask, "x": used}, bytes(n) + b"\0\0\x80?"))
    assert arrays["x"].tolist() == [1.0]
    if kind in safetensors.DTYPES:
        assert arrays["mask"].tolist() == [[0.0] * 4] * 2
        return
    with pytest.raises(ValueError) as error:
        arrays["mask"]
    assert f"'mask' is of the type {kind!r}, which is not supported" in str(error.value)
    assert str(path) in str(error.value) and "corrupt" not in str(error.value)


def test_the_official_library_knows_the_same_sizes(tmp_path):
    official = pytest.importorskip("safetensors")
    for kind, n in safetensors.N_BITS.items():
        entry = {"dtype": kind, "shape": [8], "data_offsets": [0, n]}
        with official.safe_open(written(tmp_path / kind, {"x": entry}, bytes(n)), "np") as file:
            assert file.keys() == ["x"]


@pytest.mark.parametrize("kind", safetensors.DTYPES)
def test_tensors_without_a_dimension_or_without_numbers_are_read(tmp_path, kind):
    n = safetensors.N_BITS[kind] // 8
    header = {
        "empty": {"dtype": kind, "shape": [0, 3], "data_offsets": [0, 0]},
        "scalar": {"dtype": kind, "shape": [], "data_offsets": [0, n]},
        "none left": {"dtype": kind, "shape": [0], "data_offsets": [n, n]},
    }
    arrays = safetensors.read(written(tmp_path / "model.safetensors", header, bytes(n)))
    assert {name: array.shape for name, array in arrays.items()} == {
        name: tuple(entry["shape"]) for name, entry in header.items()
    }
    assert arrays["scalar"] == 0


def test_a_header_too_large_for_us_is_not_called_corrupt(tmp_path):
    path = written(tmp_path / "model.safetensors", {"__metadata__": {"x": "x" * (5 << 20)}}, b"")
    with pytest.raises(ValueError, match="the header does not fit into 4 MiB") as error:
        safetensors.read(path)
    assert "corrupt" not in str(error.value)


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
BAD_HEADERS = {
    "overlap": f'{{"x":{ENTRY},"y":{ENTRY}}}',
    "gap": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "the tensors end before": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "not fit its shape": '{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    "no proper shape": '{"x":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}',
    "'x' does not fit its shape": '{"x":{"dtype":"I64","shape":[2],"data_offsets":[0,8]}}',
    "'f4' does not fit its shape": '{"f4":{"dtype":"F4","shape":[3],"data_offsets":[0,8]}}',
    "'new' does not fit": '{"new":{"dtype":"NEW","shape":[3],"data_offsets":[0,9]}}',
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
        safetensors.read(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def index(model_folder, weights):
    """Of the model's weights in two files that the official library wrote."""
    numpy = pytest.importorskip("safetensors.numpy")
    names, files = sorted(weights), {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        numpy.save_file({name: weights[name] for name in part}, model_folder / file)
        files |= dict.fromkeys(part, file)
    (model_folder / "model.safetensors").unlink()
    path = model_folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return path


def test_weights_in_several_files_are_read_like_one(index, weights):
    assert checkpoint.read_config(index.parent) == CONFIG
    assert_equal(checkpoint.read_weights(index.parent, SHAPES), weights)


FIRST, SECOND = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"linear.bias": FIRST}, f"{SECOND} holds the tensor 'linear.bias', against model.safe"),
        ({"more": FIRST}, f"{FIRST} lacks the tensor 'more'"),
        ({"more": "third.safetensors"}, "index.json names third.safetensors, which is not there"),
        ({"more": "../x.safetensors"}, "'../x.safetensors' is no safetensors file beside it"),
        ({"more": "a\\x.safetensors"}, "is no safetensors file beside it"),
        ({"more": "pytorch_model.bin"}, "'pytorch_model.bin' is no safetensors file beside it"),
        ({"more": 1}, "1 is no safetensors file beside it"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(index, change, error):
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": entries["weight_map"] | change}))
    with pytest.raises(ValueError, match=re.escape(error)) as raised:
        safetensors.read_sharded(index)
    assert str(index.parent) in str(raised.value) and "\n" not in str(raised.value)


def test_an_index_without_a_map_of_files_or_far_too_large_is_refused(index):
    for text, error in (("{}", "it has no weight_map"), (" " * (5 << 20), "far too large")):
        index.write_text(text)
        with pytest.raises(ValueError, match=rf"index\.json is .*{error}"):
            checkpoint.read_weights(index.parent, SHAPES)


def test_sizes_are_held_against_all_files_of_an_index(index):
    config = CONFIG | {"model": CONFIG["model"] | {"n_layers": 10**9}}
    (index.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"more weights than model\.safetensors\.index\.json can"):
        checkpoint.read_config(index.parent)


@pytest.mark.parametrize("format", ["tiny", "burn"])
def test_a_model_saved_over_one_in_several_files_replaces_them_all(index, weights, format):
    (index.parent / "notes.safetensors").write_text("mine")
    doubled = {name: 2 * values.astype(np.float16) for name, values in weights.items()}
    checkpoint.save(index.parent, CONFIG, doubled, format=format)
    file = {"tiny": "model.safetensors", "burn": "model.mpk"}[format]
    assert sorted(os.listdir(index.parent)) == ["config.json", file, "notes.safetensors"]
    assert_equal(checkpoint.read_weights(index.parent, SHAPES), doubled)


def test_an_index_that_was_left_over_does_not_count(index, weights):
    (index.parent / FIRST).unlink()
    safetensors.write(index.parent / "model.safetensors", weights)
    assert checkpoint.read_config(index.parent) == CONFIG
    assert_equal(checkpoint.read_weights(index.parent, SHAPES), weights)


def test_damaged_indexes_are_refused(index):
    def read():
        return checkpoint.read_weights(index.parent, SHAPES)

    data = index.read_bytes()
    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 4, 0), index, read)
    assert n_refused > n_read
    n_read, n_refused = outcomes(mutated_json(json.loads(data), N_MUTATIONS // 4, 0), index, read)
    assert min(n_read, n_refused) > 0


def test_damaged_safetensors_are_refused(model_folder):
    path = model_folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def read():
        return checkpoint.read_weights(model_folder, SHAPES)

    def files():
        for text in mutated_json(header, N_MUTATIONS // 2, 0):
            yield len(text).to_bytes(8, "little") + text + data[start:]

    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 2, 0), path, read)
    assert n_refused > n_read > 0
    n_read, n_refused = outcomes(files(), path, read)
    assert n_refused > n_read
