"""A model's folder is written whole or not at all, and nothing of someone else's is lost."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIG, ROOT, SHAPES, assert_equal, not_on_windows

import tokenizers
from backend import files
from models import checkpoint, folders, safetensors


class Vowel:
    name = "vowel"

    def save(self, folder: Path) -> None:
        (folder / "vowel.json").write_text("[]")


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
        if broken == "os.rename" and model_folder.exists():
            return rename(*args)  # let the old one go, fail at the new one
        if broken == "os.rename":
            monkeypatch.setattr(os, "rename", rename)
        raise error

    if broken == "os.rename":  # as on systems that cannot swap two folders at once
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: None)
    holders = {"os.rename": os, "Vowel.save": Vowel, "safetensors.write": safetensors}
    holder = holders.get(broken, files)
    monkeypatch.setattr(holder, broken.split(".")[-1], fail)
    doubled = {name: 2 * values for name, values in weights.items()}
    with pytest.raises(type(error)):
        checkpoint.save(model_folder, CONFIG | {"seed": 1}, doubled, Vowel())
    assert os.listdir(model_folder.parent) == ["model"]
    assert checkpoint.read_config(model_folder) == CONFIG
    assert_equal(checkpoint.read_weights(model_folder, SHAPES), weights)


def test_all_is_on_disk_before_the_model_gets_its_name(tmp_path, weights, monkeypatch):
    events, rename, sync = [], os.rename, files.sync
    monkeypatch.setattr(
        files, "sync", lambda *paths: (events.extend(path.name for path in paths), sync(*paths))
    )
    monkeypatch.setattr(os, "rename", lambda *args: (events.append("rename"), rename(*args)))
    checkpoint.save(tmp_path / "model", CONFIG, weights)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before)[1:] == ["config.json", "model.safetensors"]
    assert min(before).startswith(".gpt-tiny-")
    assert after == ["model", tmp_path.name]


@not_on_windows("not everyone may make links there")
def test_a_link_to_a_model_is_saved_through(model_folder, weights):
    link = model_folder.with_name("latest")
    link.symlink_to(model_folder, target_is_directory=True)
    checkpoint.save(link, CONFIG | {"seed": 1}, weights)
    assert link.is_symlink()
    assert checkpoint.read_config(model_folder)["seed"] == 1


@not_on_windows("not everyone may make links there")
def test_a_file_is_replaced_and_a_link_to_it_is_written_through(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "new link").symlink_to("new")
    for name, written in (("file", "file"), ("link", "file"), ("new link", "new")):
        files.write_file(tmp_path / name, name.encode())
        assert (tmp_path / written).read_text() == name
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "new", "new link"]


@not_on_windows("it has no such nodes")
def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(ValueError, match="is a device or a pipe: name a file"):
            files.write_file(path, b"text")
    with pytest.raises(ValueError, match="is a device or a pipe: name a file"):
        files.check_file(Path(os.devnull))  # which asks alone: root could replace it
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_what_belongs_to_a_model_goes_with_it_when_it_is_replaced(model_folder, weights):
    for name in ("state.json", "notes.json"):
        (model_folder / name).touch()
    with folders.replacing(model_folder, owned=["state.json"]) as new:
        checkpoint.write(new, CONFIG, weights, None)
    names = ["config.json", "model.safetensors", "notes.json"]
    assert sorted(os.listdir(model_folder)) == names


def test_a_folder_with_a_mark_is_one_to_write_to_and_the_mark_stays(tmp_path, weights):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mark").touch()
    with pytest.raises(ValueError, match="model exists and is not a model folder"):
        folders.check_destination(folder)
    with folders.replacing(folder, marks=["mark"]) as new:
        checkpoint.write(new, CONFIG, weights, None)
    assert sorted(os.listdir(folder)) == ["config.json", "mark", "model.safetensors"]


def test_missing_parents_are_made_when_the_model_is_saved(tmp_path, weights):
    folders.check_destination(tmp_path / "a" / "b" / "model")
    assert os.listdir(tmp_path) == []
    checkpoint.save(tmp_path / "a" / "b" / "model", CONFIG, weights)
    assert checkpoint.read_config(tmp_path / "a" / "b" / "model") == CONFIG


def test_destinations_that_hold_something_else_are_refused(tmp_path, model_folder, weights):
    folders.check_destination(model_folder)
    (tmp_path / "empty").mkdir()
    folders.check_destination(tmp_path / "empty")

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "config.json").touch()
    with pytest.raises(ValueError, match="photos exists and is not a model folder"):
        folders.check_destination(photos)
    with pytest.raises(ValueError, match="photos exists and is not a model folder"):
        checkpoint.save(photos, CONFIG, weights)
    assert os.listdir(photos) == ["config.json"]

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        folders.check_destination(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot save to .*: \w+"):
        folders.check_destination(tmp_path / "file" / "model")
    if sys.platform == "linux":  # where no one may write, not even root
        with pytest.raises(ValueError, match="cannot save to /proc/model: "):
            folders.check_destination(Path("/proc/model"))


def test_the_newest_model_of_a_folder_is_the_one_saved_last(tmp_path, weights):
    refused = pytest.raises(ValueError, match=r"there is no model in .*: name one, or train one")
    with refused:
        folders.newest(tmp_path / "data")
    (tmp_path / "data" / "gpt_in_training").mkdir(parents=True)
    (tmp_path / "data" / "gpt_in_training" / "metrics.csv").touch()
    (tmp_path / "data" / "corpus.txt").touch()
    for inside in ("gpt_in_training/best", "checkpoints/1_4", ".gpt-tiny-0"):
        checkpoint.save(tmp_path / "data" / inside, CONFIG, weights)
    with refused:
        folders.newest(tmp_path / "data")

    for name, second in {"gpt_a": 3, "gpt_b": 9, "gpt_c": 6}.items():
        checkpoint.save(tmp_path / "data" / name, CONFIG, weights)
        os.utime(tmp_path / "data" / name / "config.json", (second, second))
    assert folders.newest(tmp_path / "data") == tmp_path / "data" / "gpt_b"


def test_trainings_of_the_same_second_do_not_share_a_folder(tmp_path):
    claimed = {files.claim(tmp_path / "1795367562_4") for _ in range(3)}
    assert len(claimed) == 3 and all(folder.is_dir() for folder in claimed)


def test_a_model_of_another_tokenizer_leaves_nothing_of_the_one_before(model_folder, weights):
    for name in tokenizers.FILES:
        (model_folder / name).touch()
    checkpoint.save(model_folder, CONFIG, weights)
    assert sorted(os.listdir(model_folder)) == ["config.json", "model.safetensors"]


def test_a_folder_is_one_processes_also_when_it_is_replaced_until_that_is_killed(
    model_folder, weights
):
    program = "import pathlib, sys, models.folders as folders\n"
    program += "with folders.reserved(pathlib.Path(sys.argv[1])):\n print(flush=True), input()"
    other = subprocess.Popen(
        [sys.executable, "-c", program, model_folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    refused = pytest.raises(ValueError, match=r"another training is writing to .*model: wait")
    for _ in range(2):
        with refused, folders.reserved(model_folder):
            pass
        checkpoint.save(model_folder, CONFIG, weights)
    other.kill()
    other.communicate()
    with folders.reserved(model_folder):
        assert len(os.listdir(model_folder.parent)) == 2
    if sys.platform != "win32":
        assert os.listdir(model_folder.parent) == ["model"]
