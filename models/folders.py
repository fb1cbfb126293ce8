"""Folders and files that are written whole or not at all."""

import contextlib
import ctypes
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from backend.errors import UserError
from backend.locks import locked

INDEX = "model.safetensors.index.json"  # of weights in several files, as Hugging Face cuts them
WEIGHT_FILES = ("model.safetensors", "model.mpk", INDEX)  # what we write comes first
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
TRAINING_FILES = ("training.json", "optimizer.safetensors")  # that may stand beside a model
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
MODEL_FILES = ("config.json", *WEIGHT_FILES, *TRAINING_FILES, *TOKENIZER_FILES)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write a model to, which at the end takes the place of `folder`, whole or not
    at all. A model that is there already is replaced; other files of its folder stay.

    ValueError where `check_destination` raises it, OSError when the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    check_destination(folder)
    with new_folder(folder) as new:
        yield new
        for path in (*new.iterdir(), new):
            sync(path)
        put_in_place(new, folder)


@contextlib.contextmanager
def new_folder(beside: Path) -> Iterator[Path]:
    """A folder to work in, and to rename when all is done; else it goes away."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    new = beside.with_name(f".gpt-tiny-{uuid.uuid4().hex}")
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_destination(folder: Path) -> None:
    """ValueError unless `save` can write to `folder`: to be called before a training starts.

    The folder may be new, empty, that of a training that did not end (it has a `metrics.csv`), or
    hold a model, which `save` replaces.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder to save the model to")
        names = set(os.listdir(folder))
        if names and not is_model(names) and "metrics.csv" not in names:
            raise UserError(
                f"{folder} exists and is not a model folder: name another, nothing in it is touched"
            )
        if os.path.ismount(folder):  # the whole folder is renamed, which a mount point cannot be
            raise UserError(f"{folder} is a mount point: name a folder inside it")
    check_parent(folder)


def check_parent(path: Path) -> None:
    """UserError unless there can be a new file or folder beside `path`."""
    parent = next(parent for parent in path.parents if parent.exists())
    trial = parent / f".gpt-tiny-{uuid.uuid4().hex}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise UserError(f"cannot save to {path}: {error.strerror} ({parent})") from None


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder; UserError if one is at work there."""
    folder = Path(os.path.realpath(folder))
    # beside it: the folder itself is another one when its model has been replaced
    with locked(folder.with_name(f".gpt-tiny-{folder.name}.lock")) as is_ours:
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
    """Of the models in a folder the one that was saved last; ValueError if there is none."""
    folders = [path for path in parent.glob("[!.]*/") if is_model(set(os.listdir(path)))]
    if not folders:
        raise UserError(f"there is no model in {parent}: name one, or train one: python train.py")
    return max(folders, key=lambda path: (path / "config.json").stat().st_mtime)


def put_in_place(new: Path, folder: Path) -> None:
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
        exchange(new, folder)
        for path in new.iterdir():  # the old one now: someone's notes in it are not ours to delete
            is_model = path.name in MODEL_FILES or SHARD.fullmatch(path.name)
            if not is_model and not (folder / path.name).exists():
                os.rename(path, folder / path.name)
    sync(folder)
    sync(folder.parent)


def exchange(a: Path, b: Path) -> None:
    """Swaps two folders: at once on Linux, in three steps elsewhere."""
    rename = None
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_folder, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(at_folder, os.fsencode(a), at_folder, os.fsencode(b), swap) != 0:
        aside = a.with_name(f"{a.name}-old")
        os.rename(b, aside)
        try:
            os.rename(a, b)
        except BaseException:
            os.rename(aside, b)
            raise
        os.rename(aside, a)


def sync(path: Path) -> None:
    is_windows = sys.platform == "win32"
    if is_windows and path.is_dir():  # it opens none, and syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(path: Path) -> None:
    """UserError or OSError unless `replacing_file` can write `path`: to be called before the work
    whose result it is."""
    check_parent(regular_file(path))


def regular_file(path: Path) -> Path:
    """The file that a path leads to, which need not be there yet."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise UserError(f"{path} is {kind}: name a file")
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file to write, which at the end takes the place of the one that `path` leads to, whole
    or not at all. UserError for what is no regular file."""
    path = regular_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".gpt-tiny-{uuid.uuid4().hex}")
    try:
        yield new
        sync(new)
        os.replace(new, path)
        sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    with replacing_file(path) as new:
        new.write_bytes(data)


def claim(path: Path) -> Path:
    """Makes a folder of this name, or with a number behind it if another training has that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path.name, *(f"{path.name}_{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            path.with_name(name).mkdir()
            return path.with_name(name)
    raise UserError(f"{path} exists, with a thousand others of that name")
