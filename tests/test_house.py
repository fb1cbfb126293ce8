"""What each room of the project may know of."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

import tokenizers
from tokenizers import TOKENIZERS

SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"gpt_tiny", "tokenizers"}
KINDS = (".c", ".h", ".js", ".html")  # of what is not Python
MAY_IMPORT = {
    "tokenizers": {"backend"},
    "backend": {"backend"},
    "gpt_tiny": {"backend"},
    "runtime": {"runtime", "backend", "tokenizers"},
    "data": {"data", "backend", "tokenizers"},
    "models": {"models", "backend", "gpt_tiny", "tokenizers"},
    "inference": {"inference", "backend", "gpt_tiny", "tokenizers"},
    "training": {"training", "models", "data", "backend", "gpt_tiny", "tokenizers"},
}


def imported(path: Path) -> set[str]:
    """The modules of the project that a file imports, anywhere in it, by their first names."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.append(node.module)
    return {name.split(".")[0] for name in names} & (SCRIPTS | MAY_IMPORT.keys())


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_nothing_that_it_should_know_nothing_of(room):
    paths = list((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    found = set().union(*map(imported, paths))
    assert found <= MAY_IMPORT[room]


def constants(room: str) -> set[str]:
    """The strings that a room's code has."""
    nodes = (
        node
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
    )
    return {
        node.value for node in nodes if isinstance(node, ast.Constant) and type(node.value) is str
    }


@pytest.mark.parametrize("room", ["data", "inference", "models", "runtime"])
def test_which_tokenizers_there_are_is_known_to_their_file_alone(room):
    assert constants(room).isdisjoint({*TOKENIZERS, *tokenizers.FILES})


def test_models_know_no_file_of_a_training():
    names = {"training.json", "optimizer.safetensors", "metrics.csv", "best"}
    assert constants("models").isdisjoint(names)


def test_the_model_imports_the_backend_in_one_line():
    lines = (ROOT / "gpt_tiny.py").read_text().splitlines()
    assert sum("backend" in line for line in lines if "import" in line) == 1


def test_tokenizers_take_nothing_of_the_backend_but_the_error_and_the_number_of_threads():
    lines = (ROOT / "tokenizers.py").read_text().splitlines()
    imports = [line for line in lines if "backend" in line and "import" in line]
    names = [line.removeprefix("from backend.") for line in imports]
    assert names == ["errors import UserError", "machine import n_threads"]


@pytest.mark.parametrize("wing", ["backend", "data", "inference", "models", "runtime", "training"])
def test_a_wing_says_what_is_in_it(wing):
    page = " ".join(ast.get_docstring(ast.parse((ROOT / wing / "__init__.py").read_text())).split())
    files = {path.stem for path in (ROOT / wing).glob("*.py")} - {"__init__"}
    assert all(f"`{name}`" in page for name in files), files
    assert "Nothing here knows of" in page


def test_the_files_that_an_exported_model_is_made_of_stay_few():
    paths = [path for path in (ROOT / "runtime").iterdir() if path.suffix in KINDS]
    lines = [line for path in paths for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 1000
