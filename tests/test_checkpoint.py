"""A model on disk: what is read equals what was written, and what cannot be read is an error."""

import errno
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


class Vowel:
    name = "vowel"

    def save(self, folder: Path) -> None:
        (folder / "vowel.json").write_text("[]")


def test_the_tokenizer_is_saved_with_the_model(tmp_path, weights):
    checkpoint.save(tmp_path / "model", CONFIG, weights, Vowel(), format="burn")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.mpk", "vowel.json"]
    assert checkpoint.read_config(tmp_path / "model")["tokenizer"] == "vowel"


def test_a_model_is_replaced_and_other_files_beside_it_stay(model_folder, weights):
    (model_folder / "notes.txt").write_text("mine")
    checkpoint.save(model_folder, CONFIG | {"seed": 1}, weights, format="burn")
    assert sorted(os.listdir(model_folder)) == ["config.json", "model.mpk", "notes.txt"]
    assert checkpoint.read_config(model_folder)["seed"] == 1
    assert os.listdir(model_folder.parent) == ["model"]


@pytest.mark.parametrize("broken", ["safetensors.write", "sync", "os.rename", "Vowel.save"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_earlier_model_and_nothing_else(
    model_folder, weights, monkeypatch, broken, error
):
    rename = os.rename

    def fail(*args):
        if (
            broken == "os.rename" and model_folder.exists()
        ):  # let the old one go, fail at the new one
            return rename(*args)
        if broken == "os.rename":
            monkeypatch.setattr(os, "rename", rename)
        raise error

    if broken == "os.rename":  # as on systems that cannot swap two folders at once
        monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda name: None)
    holders = {"os.rename": os, "Vowel.save": Vowel, "safetensors.write": safetensors}
    holder = holders.get(broken, checkpoint)
    monkeypatch.setattr(holder, broken.split(".")[-1], fail)
    doubled = {name: 2 * values for name, values in weights.items()}
    with pytest.raises(type(error)):
        checkpoint.save(model_folder, CONFIG | {"seed": 1}, doubled, Vowel())
    assert os.listdir(model_folder.parent) == ["model"]
    assert checkpoint.read_config(model_folder) == CONFIG
    assert_equal(checkpoint.read_weights(model_folder, SHAPES), weights)


def test_all_is_on_disk_before_the_model_gets_its_name(tmp_path, weights, monkeypatch):
    events, rename, sync = [], os.rename, checkpoint.sync
    monkeypatch.setattr(checkpoint, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda *args: (events.append("rename"), rename(*args)))
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before)[1:] == ["config.json", "model.safetensors"]
    assert min(before).startswith(".gpt-tiny-")
    assert after == ["model", tmp_path.name]


def test_a_link_to_a_model_is_saved_through(model_folder, weights):
    link = model_folder.with_name("latest")
    link.symlink_to(model_folder, target_is_directory=True)
    checkpoint.save(link, CONFIG | {"seed": 1}, weights)
    assert link.is_symlink()
    assert checkpoint.read_config(model_folder)["seed"] == 1


def test_missing_parents_are_made_when_the_model_is_saved(tmp_path, weights):
    checkpoint.check_destination(tmp_path / "a" / "b" / "model")
    assert os.listdir(tmp_path) == []
    checkpoint.save(tmp_path / "a" / "b" / "model", CONFIG, weights)
    assert checkpoint.read_config(tmp_path / "a" / "b" / "model") == CONFIG


def test_destinations_that_hold_something_else_are_refused(tmp_path, model_folder, weights):
    checkpoint.check_destination(model_folder)
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


def test_damaged_configs_are_refused(model_folder):
    path = model_folder / "config.json"

    def read():
        return checkpoint.read_config(model_folder)

    data = path.read_bytes()
    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 2, 0), path, read)
    assert n_refused > n_read
    n_read, n_refused = outcomes(mutated_json(CONFIG, N_MUTATIONS // 2, 0), path, read)
    assert min(n_refused, n_read) > 0
