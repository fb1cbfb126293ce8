"""A model on disk: what is read equals what was written, and what cannot be read is an error."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIG, SHAPES, assert_equal
from mutate import N_MUTATIONS, mutated_bytes, mutated_json, outcomes

from models import checkpoint, safetensors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_read_and_refused_as_weights(model_folder, weights, value):
    weights["norm.beta"][3] = value
    safetensors.write(model_folder / "model.safetensors", weights)
    assert_equal(safetensors.read(model_folder / "model.safetensors"), weights)
    read = checkpoint.read_weights(model_folder, SHAPES)
    assert_equal({"norm.gamma": read["norm.gamma"]}, {"norm.gamma": weights["norm.gamma"]})
    error = r"model\.safetensors: the tensor norm\.beta holds numbers that are not finite"
    with pytest.raises(ValueError, match=error):
        read["norm.beta"]


def test_finite_numbers_whose_sum_is_not_are_weights(model_folder, weights):
    weights["norm.beta"][:] = 3e38
    safetensors.write(model_folder / "model.safetensors", weights)
    assert_equal(checkpoint.read_weights(model_folder, SHAPES), weights)


def test_transposed_weights_are_saved_as_they_are_seen(tmp_path, weights):
    weights = {name: np.asfortranarray(values) for name, values in weights.items()}
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    assert_equal(checkpoint.read_weights(tmp_path / "model", SHAPES), weights)


def test_what_is_saved_is_read_back(model_folder, weights):
    assert checkpoint.read_config(model_folder) == CONFIG
    assert_equal(checkpoint.read_weights(model_folder, SHAPES), weights)
    assert sorted(os.listdir(model_folder)) == ["config.json", "model.safetensors"]


def test_a_wrong_tensor_is_named_with_both_shapes(model_folder, tmp_path, weights):
    name = "blocks.1.pwff.linear_1.weight"
    wanted = SHAPES | {name: (50, 12)}
    with pytest.raises(ValueError, match=rf"{name} has the shape \(48, 12\), .*\(50, 12\)"):
        checkpoint.read_weights(model_folder, wanted)
    wanted = SHAPES | {"extra.bias": (7,)}
    with pytest.raises(ValueError, match=r"lacks the tensor extra\.bias \(7,\)"):
        checkpoint.read_weights(model_folder, wanted)
    wanted = {name: shape for name, shape in SHAPES.items() if name != "linear.bias"}
    with pytest.raises(ValueError, match=r"not ask for the tensor 'linear\.bias' \(11,\)"):
        checkpoint.read_weights(model_folder, wanted)


def test_missing_folders_and_files_are_named(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no model folder .*nowhere"):
        checkpoint.read_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        checkpoint.read_config(tmp_path)
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors or model\.mpk"):
        checkpoint.read_weights(model_folder, SHAPES)
    (model_folder / "model.mpk").touch()
    with pytest.raises(ValueError, match=r"model\.mpk is empty"):
        checkpoint.read_weights(model_folder, SHAPES)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_not_opened(model_folder):
    (model_folder / "model.safetensors").unlink()
    os.mkfifo(model_folder / "model.safetensors")
    (model_folder / "model.mpk").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is not a model folder"):
        checkpoint.read_weights(model_folder, SHAPES)


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
def test_a_wrong_setting_is_named(model_folder, key, value, message):
    config = CONFIG | {"model": CONFIG["model"] | {key: value}}
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_config(model_folder)


def test_a_tokenizer_is_a_name_and_not_a_path(model_folder):
    (model_folder / "config.json").write_text(json.dumps(CONFIG | {"tokenizer": "../vowel"}))
    with pytest.raises(ValueError, match=r"tokenizer is '\.\./vowel'"):
        checkpoint.read_config(model_folder)


def test_the_files_of_a_model_are_those_beside_it_and_those_it_could_have(model_folder):
    for name in ("training.json", "other.safetensors", "notes.txt"):
        (model_folder / name).touch()
    names = {path.name for path in checkpoint.files(model_folder)}
    assert names >= {"config.json", "model.mpk", "merges.txt", "training.json", "other.safetensors"}
    assert "notes.txt" not in names


class Vowel:
    name = "vowel"

    def save(self, folder: Path) -> None:
        (folder / "vowel.json").write_text("[]")


def test_the_tokenizer_is_saved_with_the_model(tmp_path, weights):
    checkpoint.save(tmp_path / "model", CONFIG, weights, Vowel(), format="burn")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.mpk", "vowel.json"]
    assert checkpoint.read_config(tmp_path / "model")["tokenizer"] == "vowel"


def test_damaged_configs_are_refused(model_folder):
    path = model_folder / "config.json"

    def read():
        return checkpoint.read_config(model_folder)

    data = path.read_bytes()
    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 2, 0), path, read)
    assert n_refused > n_read
    n_read, n_refused = outcomes(mutated_json(CONFIG, N_MUTATIONS // 2, 0), path, read)
    assert min(n_refused, n_read) > 0
