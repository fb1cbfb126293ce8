"""What the README shows is what a reader gets."""

import re
import shutil
import subprocess
import sys

from conftest import DATA, ROOT

import export
import run
import train

README = (ROOT / "README.md").read_text()


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
