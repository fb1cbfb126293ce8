"""Folders of models: finds the newest, checks destinations, and replaces a model atomically."""

import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import tokenizers
from backend import files
from backend.errors import UserError

INDEX = "model.safetensors.index.json"  # of shards, as Hugging Face names them
WEIGHT_FILES = ("model.safetensors", "model.mpk", INDEX)  # the first that exists is read
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MODEL_FILES = ("config.json", "generation_config.json", *WEIGHT_FILES, *tokenizers.FILES)


@contextlib.contextmanager
def replacing(
    folder: Path, owned: Collection[str] = (), marks: Collection[str] = ()
) -> Iterator[Path]:
    """Yields a new folder to write a model to, which then replaces `folder`, whole or not at all.

    Files of an earlier model and files named in `owned` are removed, other files stay. UserError
    as by `check_destination`, OSError when the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    check_destination(folder, marks)
    with files.new_folder(folder) as new:
        yield new
        files.sync(*new.iterdir(), new)
        put_in_place(new, folder, owned)


def check_destination(folder: Path, marks: Collection[str] = ()) -> None:
    """UserError unless `replacing` can write to `folder`; to be called before a training starts.

    The folder may be new or empty, hold a model, or hold a file with one of the names `marks`.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder to save the model to")
        # without the unfinished folders of trainings that were killed
        names = {name for name in os.listdir(folder) if not name.startswith(".gpt-tiny-")}
        if names and not is_model(names) and names.isdisjoint(marks):
            raise UserError(
                f"{folder} exists and is not a model folder: name another, nothing in it is touched"
            )
        if os.path.ismount(folder):  # which cannot be renamed
            raise UserError(f"{folder} is a mount point: name a folder inside it")
    files.check_parent(folder)


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Locks a folder against other trainings; UserError if another training has locked it."""
    folder = Path(os.path.realpath(folder))
    # the lock is beside the folder, which another folder replaces with each model
    with files.locked(folder.with_name(f".gpt-tiny-{folder.name}.lock")) as has_lock:
        if not has_lock:
            raise UserError(
                f"another training is writing to {folder}: wait for its end, or name another folder"
                " with --output-path"
            )
        yield


def is_model(names: set[str]) -> bool:
    """Whether a folder with these file names holds a model."""
    return "config.json" in names and not names.isdisjoint(WEIGHT_FILES)


def newest(parent: Path) -> Path:
    """The folder in `parent` with the model saved last; UserError if there is none."""
    folders = [path for path in parent.glob("[!.]*/") if is_model(set(os.listdir(path)))]
    if not folders:
        raise UserError(f"there is no model in {parent}: name one, or train one: python train.py")
    return max(folders, key=lambda path: (path / "config.json").stat().st_mtime)


def put_in_place(new: Path, folder: Path, owned: Collection[str]) -> None:
    """Renames the folder `new` to `folder`, and keeps other files that `folder` has.

    Safe against a power failure: the old or the new model is complete at any moment.
    """
    if not folder.exists() or not any(folder.iterdir()):
        if sys.platform == "win32" and folder.exists():  # other systems replace empty folders
            folder.rmdir()
        os.rename(new, folder)
    elif not (folder / "config.json").exists():  # the last file makes the folder a model
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    else:
        files.exchange(new, folder)
        for path in new.iterdir():  # the files of the old folder; a user's notes stay
            is_replaced = path.name in (*MODEL_FILES, *owned) or SHARD.fullmatch(path.name)
            if not is_replaced and not (folder / path.name).exists():
                os.rename(path, folder / path.name)
    files.sync(folder, folder.parent)
