"""What the README shows is what a reader gets."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import DATA, ROOT

import export
import run
import train

README = (ROOT / "README.md").read_text()
MANUALS = ("README.md", "bench/README.md")


def test_library_example_loads_generates_and_measures(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    shutil.copytree(DATA / "gpt_burn_114k", tmp_path / "my_model")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["logits"].shape == (1, len("Once upon a time"), 104)
    assert 1 < names["loss"] < 4
    assert len(capsys.readouterr().out) == 101  # a hundred characters and the line's end


def test_a_closed_pipe_ends_quietly():
    command = [sys.executable, str(ROOT / "run.py"), str(DATA / "gpt_burn_114k")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


def test_every_flag_in_the_readme_exists(call):
    known = "".join(call(script.main, "--help").out for script in (train, run, export))
    commands = re.findall(r"^.*python (?:train|run|export)\.py.*$", README, re.M)
    assert len(commands) > 10
    for command in commands:
        for flag in re.findall(r" (--[a-z-]+)", command):
            assert flag in known, command


@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("train.py", "pip install . && python train.py"),
        ("pytest", "pip install '.[test]' && python -m pytest"),
    ],
)
def test_the_first_commands_are_those_that_ci_takes_from_the_readme(word, command):
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    first = next(line for line in blocks.splitlines() if word in line)
    assert first.partition(" #")[0].rstrip() == command


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("manual", MANUALS)
def test_no_sentence_of_a_manual_is_long(manual):
    text = re.sub(r"^```.*?^```", "", (ROOT / manual).read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\(.*?\)", "]", text)  # the address of a link
    for paragraph in re.split(r"\n\n|\n(?=- |\|)|\|", text):
        for sentence in re.split(r"(?<=[.!?])\s", paragraph):
            assert len(sentence.split()) <= 25, sentence


@pytest.mark.parametrize("manual", MANUALS)
def test_every_link_of_a_manual_leads_somewhere(manual):
    folder = (ROOT / manual).parent
    for address in re.findall(r"\]\((?!https://)(.*?)\)", (ROOT / manual).read_text()):
        path, _, heading = address.partition("#")
        page = folder / path if path else ROOT / manual
        assert page.is_file(), address
        assert not heading or f"# {heading.replace('-', ' ')}\n" in page.read_text().lower(), (
            address
        )
