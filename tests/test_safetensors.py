"""Safetensors files, beside the official library."""

import json

import numpy as np
import pytest
from conftest import SHAPES, assert_equal
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
        safetensors.read(path)
    assert "\n" not in str(error.value)


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
