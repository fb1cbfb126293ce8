"""What each room of the project may know of, as README has it."""

import ast
import functools
import re
from pathlib import Path

import pytest
from conftest import ROOT

KINDS = (".c", ".h", ".js", ".html")  # of what is not Python
MAY_IMPORT = {
    "backend": set(),
    "gpt_tiny": {"backend"},
    "tokenizers": {"backend"},
    "runtime": {"backend", "tokenizers"},
    "data": {"backend", "tokenizers"},
    "models": {"backend", "tokenizers", "gpt_tiny", "data"},
    "inference": {"backend", "tokenizers", "gpt_tiny"},
    "training": {"backend", "tokenizers", "gpt_tiny", "data", "models"},
    "command_line": {"backend"},
}
MAY_IMPORT |= {command: set(MAY_IMPORT) for command in ("train", "run", "export")}
TRAINING_FILES = {"training.json", "optimizer.safetensors", "metrics.csv", "loss.png"}


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]


@functools.cache
def parsed(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_bytes())))


def imported(path: Path) -> set[str]:
    """The modules of the project that a file imports, anywhere in it, by their first names."""
    names = []
    for node in parsed(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.append(node.module)
    return {name.split(".")[0] for name in names} & MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_nothing_that_it_should_know_nothing_of(room):
    found = set().union(*map(imported, files_of(room))) - {room}
    assert found <= MAY_IMPORT[room]


def test_there_is_no_other_room():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms | {path.stem for path in ROOT.glob("*.py")} == MAY_IMPORT.keys()


def test_a_room_imports_only_from_rows_below_its_own_in_the_readme():
    section = (ROOT / "README.md").read_text().partition("## The rooms")[2]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    rows = [set(re.findall(r"`(\w+)(?:\.py|/)`", row)) for row in rows]
    assert set().union(*rows) == MAY_IMPORT.keys()
    below = set()
    for row in reversed(rows):
        assert all(MAY_IMPORT[room] <= below for room in row), row
        below |= row


def test_the_model_imports_the_backend_in_one_line():
    lines = (ROOT / "gpt_tiny.py").read_text().splitlines()
    assert sum("backend" in line for line in lines if "import" in line) == 1


def test_tokenizers_take_nothing_of_the_backend_but_the_error_and_the_number_of_threads():
    lines = (ROOT / "tokenizers.py").read_text().splitlines()
    imports = [line for line in lines if "backend" in line and "import" in line]
    names = [line.removeprefix("from backend.") for line in imports]
    assert names == ["errors import UserError", "machine import n_threads"]


def texts_in(room: str) -> set[str]:
    """All string constants in a room, docstrings included."""
    nodes = [node for path in files_of(room) for node in parsed(path)]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return {text for text in constants if isinstance(text, str)}


def test_training_alone_knows_the_files_of_a_training():
    assert texts_in("training") >= TRAINING_FILES
    assert not [text for text in texts_in("models") if any(x in text for x in TRAINING_FILES)]


@functools.cache
def names_of_tinygrad(path: Path, seen: tuple[Path, ...] = ()) -> set[str]:
    """The names that a file has from tinygrad, or from a file that has them from there."""
    names = set()
    for node in parsed(path):
        if isinstance(node, ast.Import):
            names |= {x.asname or "tinygrad" for x in node.names if x.name.startswith("tinygrad")}
        elif isinstance(node, ast.ImportFrom):
            origin = (ROOT / node.module.replace(".", "/")).with_suffix(".py")
            theirs = {x.name for x in node.names if node.module.startswith("tinygrad")}
            if origin.is_file() and origin not in seen:
                theirs = names_of_tinygrad(origin, (*seen, origin))
            names |= {x.asname or x.name for x in node.names if x.name in theirs}
    return names


def root_of(node: ast.AST) -> str:
    """The name that an expression such as `name.a["b"].c()` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")


def assignments_into_tinygrad(path: Path) -> list[str]:
    """What a file sets or deletes in modules and classes of tinygrad, or in `sys.modules`.

    The value of a variable of tinygrad's, such as DEV, is a setting, which is there to be set.
    """
    names, found = names_of_tinygrad(path), []
    for node in parsed(path):
        is_target = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if is_target and isinstance(node, ast.Attribute | ast.Subscript):
            is_setting = isinstance(node, ast.Attribute) and node.attr == "value"
            is_module = ast.unparse(node).startswith("sys.modules")
            if is_module or (root_of(node) in names and not is_setting):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and node.args:
            function, target = ast.unparse(node.func), node.args[0]
            reaches_in = re.search(r"\b(setattr|delattr|patch(\.object|\.dict)?)$", function)
            is_text = isinstance(target, ast.Constant) and str(target.value).startswith("tinygrad")
            if reaches_in and (is_text or root_of(target) in names):
                found.append(ast.unparse(node))
    return found


def test_the_cpu_backend_alone_assigns_into_tinygrad():
    files = [path for room in MAY_IMPORT for path in files_of(room)]
    found = {path.relative_to(ROOT).as_posix(): assignments_into_tinygrad(path) for path in files}
    found = {name: assignments for name, assignments in found.items() if assignments}
    assert found and all(name.startswith("backend/cpu/") for name in found), found


@pytest.mark.parametrize(
    ("line", "n"),
    [
        ("realize.tqdm = None", 1),
        ("mine, realize.tqdm = 1, 2", 1),
        ("del realize.tqdm", 1),
        ("Device['CPU'].renderer.tensor_cores += [1]", 1),
        ("sys.modules['tinygrad.renderer.nir'] = None", 1),
        ("setattr(Tensor, 'gelu', None)", 1),
        ("patch.object(Tensor, 'gelu')", 1),
        ("mock.patch('tinygrad.tensor.Tensor.gelu')", 1),
        ("ops_cpu.CPUDevice = None", 1),
        ("DEV.value = 'CPU'", 0),
        ("self.jit = Tensor(realize.tqdm)", 0),
        ("patch.object(CPUCompiler, 'call')", 0),
    ],
)
def test_what_counts_as_an_assignment_into_tinygrad(line, n, tmp_path):
    imports = (
        "import tinygrad.engine.realize as realize",
        "from tinygrad import DEV, Device, Tensor",
        "from backend.cpu.patches import ops_cpu",
    )
    file = tmp_path / "file.py"
    file.write_text("\n".join([*imports, line]))
    assert len(assignments_into_tinygrad(file)) == n


@pytest.mark.parametrize(
    "wing", ["backend", "backend/cpu", "data", "inference", "models", "runtime", "training"]
)
def test_a_wing_says_what_is_in_it(wing):
    page = " ".join(ast.get_docstring(ast.parse((ROOT / wing / "__init__.py").read_text())).split())
    files = {path.stem for path in (ROOT / wing).glob("*.py")} - {"__init__"}
    assert all(f"`{name}`" in page for name in files), files
    assert "Nothing here knows of" in page


def test_the_files_that_an_exported_model_is_made_of_stay_few():
    paths = [path for path in (ROOT / "runtime").iterdir() if path.suffix in KINDS]
    lines = [line for path in paths for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 1100
