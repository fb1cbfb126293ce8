"""A model's folder: which one is, which may become one, and how it is replaced."""

import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import tokenizers
from backend import files
from backend.errors import UserError

INDEX = "model.safetensors.index.json"  # of weights in several files, as Hugging Face cuts them
WEIGHT_FILES = ("model.safetensors", "model.mpk", INDEX)  # what we write comes first
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MODEL_FILES = ("config.json", "generation_config.json", *WEIGHT_FILES, *tokenizers.FILES)


@contextlib.contextmanager
def replacing(
    folder: Path, owned: Collection[str] = (), marks: Collection[str] = ()
) -> Iterator[Path]:
    """A new folder to write a model to, which at the end takes the place of `folder`, whole or not
    at all. A model that is there already is replaced, with its files of the names `owned`; other
    files of its folder stay.

    UserError where `check_destination` raises it, OSError when the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    check_destination(folder, marks)
    with files.new_folder(folder) as new:
        yield new
        files.sync(*new.iterdir(), new)
        put_in_place(new, folder, owned)


def check_destination(folder: Path, marks: Collection[str] = ()) -> None:
    """UserError unless `replacing` can write to `folder`: to be called before a training starts.

    The folder may be new, empty, hold a model, which is replaced, or a file of the names `marks`.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder to save the model to")
        # but for what a training that was killed was about to write
        names = {name for name in os.listdir(folder) if not name.startswith(".gpt-tiny-")}
        if names and not is_model(names) and names.isdisjoint(marks):
            raise UserError(
                f"{folder} exists and is not a model folder: name another, nothing in it is touched"
            )
        if os.path.ismount(folder):  # the whole folder is renamed, which a mount point cannot be
            raise UserError(f"{folder} is a mount point: name a folder inside it")
    files.check_parent(folder)


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder; UserError if one is at work there."""
    folder = Path(os.path.realpath(folder))
    # beside it: the folder itself is another one when its model has been replaced
    with files.locked(folder.with_name(f".gpt-tiny-{folder.name}.lock")) as is_ours:
        if not is_ours:
            raise UserError(
                f"another training is writing to {folder}: wait for its end, or name another folder"
                " with --output-path"
            )
        yield


def is_model(names: set[str]) -> bool:
    """Whether a folder with files of these names is a model's."""
    return "config.json" in names and not names.isdisjoint(WEIGHT_FILES)


def newest(parent: Path) -> Path:
    """Of the models in a folder the one that was saved last; UserError if there is none."""
    folders = [path for path in parent.glob("[!.]*/") if is_model(set(os.listdir(path)))]
    if not folders:
        raise UserError(f"there is no model in {parent}: name one, or train one: python train.py")
    return max(folders, key=lambda path: (path / "config.json").stat().st_mtime)


def put_in_place(new: Path, folder: Path, owned: Collection[str]) -> None:
    """Makes the folder `new` the folder `folder`; what else is in there stays.

    At no moment, the power may fail at any, is there less than a whole model, old or new.
    """
    if not folder.exists() or not any(folder.iterdir()):
        if sys.platform == "win32" and folder.exists():  # elsewhere an empty one is replaced
            folder.rmdir()
        os.rename(new, folder)
    elif not (folder / "config.json").exists():  # not a model before the last of its files is there
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    else:
        files.exchange(new, folder)
        for path in new.iterdir():  # the old one now: someone's notes in it are not ours to delete
            is_model = path.name in (*MODEL_FILES, *owned) or SHARD.fullmatch(path.name)
            if not is_model and not (folder / path.name).exists():
                os.rename(path, folder / path.name)
    files.sync(folder, folder.parent)
