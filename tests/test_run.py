"""run.py as a user meets it: the text on stdout, all else on stderr."""

import codecs
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, REFERENCE, ROOT, assert_error, not_on_windows
from tinygrad import Device

import command_line
import export
import run
from backend.errors import UserError
from models import gpt_burn, safetensors

PROMPTS = json.loads((REFERENCE / "expected.json").read_text())


def test_stdout_holds_the_text_alone(folder):
    prompt = PROMPTS[1]
    command = [sys.executable, ROOT / "run.py", REFERENCE, "-p", prompt["prompt"]]
    process = subprocess.run(
        [*command, "-n", "200", "--temperature", "0"], cwd=folder, capture_output=True, text=True
    )
    assert process.stdout == prompt["greedy"] + "\n"
    assert (process.returncode, process.stderr) == (0, "")


def test_what_the_system_cannot_show_is_no_error(folder):
    command = [sys.executable, ROOT / "run.py", REFERENCE, "-p", "Thé ", "-n", "5"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.startswith("Th? ")


def test_a_system_that_knows_ascii_alone_shows_the_whole_text(folder):
    words = [REFERENCE, "-p", "The ", "-n", "300", "--temperature", "1000"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, ROOT / "run.py", *words]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    text = process.stdout.decode("ascii")
    assert (process.returncode, process.stderr) == (0, b"")
    assert len(text.rstrip("\n")) <= 304 <= len(text) - 1 and "?" in text


@pytest.mark.parametrize(
    ("environment", "is_bold"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_that_knows_no_bold_and_no_dim_is_sent_none(monkeypatch, environment, is_bold):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert command_line.bold("The") == ("\033[1mThe\033[0m" if is_bold else "The")
    assert command_line.dim("The") == ("\033[2mThe\033[0m" if is_bold else "The")


@pytest.mark.parametrize("script", ["train.py", "run.py", "export.py"])
def test_ctrl_c_ends_a_command_in_silence_while_it_imports(tmp_path, signals, script):
    (tmp_path / "numpy.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / script]
    process = subprocess.run(command, env=environment, capture_output=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, b"", b"")


@not_on_windows("Windows sends no signals to a process")
def test_ctrl_c_ends_a_text_in_silence(signals):
    command = [sys.executable, ROOT / "run.py", REFERENCE, "-n", "1000000"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b""
    assert process.returncode == 130


def test_ctrl_c_during_a_destructor_ends_a_command_as_well(signals):
    program = """
import signal, sys, command_line
class Node:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def main():
    Node()
    while True:
        pass
command_line.run(main)
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert (process.returncode, process.stderr) == (130, b"")


def run_with(redirection: str, *words: str) -> subprocess.CompletedProcess:
    """run.py as a shell starts it, with this redirection."""
    command = [sys.executable, ROOT / "run.py", REFERENCE, "--temperature", "0", *words]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
    return subprocess.run([*shell, *command], capture_output=True, text=True)


@not_on_windows("Windows closes no streams so")
def test_a_closed_stream_is_missed_by_no_text():
    whole = run_with("", "-p", "The", "-n", "9").stdout
    for redirection, shown in (("2>&-", whole), ("<&-", whole), (">&-", ""), (">&- 2>&-", "")):
        process = run_with(redirection, "-p", "The", "-n", "9")
        assert (process.returncode, process.stdout, process.stderr) == (0, shown, ""), redirection
    process = run_with("<&-", "-p", "-")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == "error: the prompt is empty: give at least one character\n"


@not_on_windows("Windows closes no streams so")
def test_no_file_is_opened_in_the_place_of_a_closed_stream():
    code = "import os, command_line; out = open(3, 'w'); print(os.dup(0), file=out); "
    code += "print(*[(os.fstat(n).st_rdev, os.get_inheritable(n)) for n in range(3)], file=out)"
    shell = ["sh", "-c", 'exec 3>&1; exec "$@" <&- >&- 2>&-', "sh"]
    command = [*shell, sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    null = (os.stat(os.devnull).st_rdev, True)
    assert process.stdout == f"4\n{null} {null} {null}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_that_a_text_goes_to_is_one_line():
    process = run_with(">/dev/full", "-n", "9")
    assert process.returncode == 1
    assert process.stderr == "error: No space left on device\n"


def test_a_prompt_longer_than_the_context_is_continued_from_its_end(call):
    prompt = PROMPTS[3]
    assert len(prompt["prompt"]) > 64
    result = call(run.main, REFERENCE, "-p", prompt["prompt"], "-n", "200", "--temperature", "0")
    assert result.out == prompt["greedy"] + "\n"


def test_without_a_name_it_runs_the_newest_model(call, folder):
    shutil.copytree(REFERENCE, folder / ".data" / "gpt_new")
    result = call(run.main, "-p", "The function", "-n", "12", "--temperature", "0")
    assert result.out == generate(call, "-p", "The function", "-n", "12").out
    assert (result.status, result.err) == (0, "model: .data/gpt_new\n")
    shutil.rmtree(folder / ".data")


def test_on_a_terminal_it_says_on_which_device_it_runs(call, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    result = call(run.main, REFERENCE, "-n", "1")
    assert (result.status, result.err) == (0, f"device: {Device.DEFAULT}\n")


def test_the_seed_decides_the_text(call):
    texts = [call(run.main, REFERENCE, "-n", "50", "-s", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("\n") for text in texts)


def test_the_unknown_token_is_never_generated(call):
    result = call(run.main, REFERENCE, "-p", "The ", "-n", "300", "--temperature", "1000")
    assert len(result.out) == len("The ") + 300 + 1  # it would be no character
    assert (result.status, result.err) == (0, "")


def test_unknown_characters_in_the_prompt_are_a_warning(call):
    result = call(run.main, REFERENCE, "-p", "日本The ", "-n", "5")
    assert result.status == 0
    assert result.out.startswith("日本The ")
    assert result.err == "warning: 33.3 % of the prompt is not in the vocabulary: 日 本\n"
    assert call(run.main, REFERENCE, "-p", "日", "-n", "5").status == 0


def generate(call, *words: str):
    folder = DATA / "gpt_burn_114k"
    return call(run.main, folder, "--temperature", "0", *words)


def test_stop_ends_the_text_before_the_stop_text(call):
    whole = generate(call, "-p", "The function", "-n", "30").out
    assert " context" in whole
    stopped = generate(call, "-p", "The function", "-n", "30", "--stop", " context")
    assert stopped.out == whole.partition(" context")[0] + "\n"


def test_samples_are_printed_one_after_the_other(call):
    one = generate(call, "-p", "T", "-n", "12")
    three = generate(call, "-p", "T", "-n", "12", "--n-samples", "3")
    assert three.out == one.out * 3


def test_prompt_from_standard_input(call, monkeypatch):
    expected = generate(call, "-p", "The function", "-n", "12").out
    monkeypatch.setattr(sys, "stdin", io.StringIO("The function"))
    assert generate(call, "-p", "-", "-n", "12").out == expected


def test_interactive_continues_each_line(call, monkeypatch):
    prompts = ["The function", "A class"]
    expected = [
        generate(call, "-p", prompt, "-n", "12").out.removeprefix(prompt) for prompt in prompts
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts) + "\n"))
    result = generate(call, "-i", "-n", "12")
    assert (result.status, result.out) == (0, "".join(expected))


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_a_prompt_with_line_breaks_of_windows_is_the_same_prompt(call, pipe, end):
    texts = []
    for text in (b"The\n\nclass", b"The\n\nclass".replace(b"\n", end)):
        for flags in (["-p", "-"], ["-i"]):
            pipe(text)
            texts.append(generate(call, *flags, "-n", "12").out)
    assert texts[:2] == texts[2:]
    assert texts[0].startswith("The\n\nclass")


@pytest.mark.parametrize("flags", [["-p", "a\udcff"], ["-p", "-"], ["-i"], ["--stop", "a\udcff"]])
def test_an_invalid_byte_in_a_prompt_is_refused_by_its_place(call, pipe, flags):
    pipe(b"a\xff")
    result = generate(call, *flags, "-n", "5")
    name = "--stop" if "--stop" in flags else "the prompt"
    says = f"error: {name} is not UTF-8: invalid byte 0xff at offset 1; convert it to UTF-8"
    assert_error(result, 1, [says])
    assert result.out == ""
    assert_error(generate(call, "-p", "\ud800"), 1, ["surrogate"])  # Windows can pass it


def test_a_byte_order_mark_before_prompts_is_dropped_and_half_of_one_is_refused(call, pipe):
    for flags in (["-p", "-"], ["-i"]):
        pipe(b"The")
        expected = generate(call, *flags, "-n", "5").out
        pipe(codecs.BOM_UTF8 + b"The")
        assert generate(call, *flags, "-n", "5").out == expected
        pipe(codecs.BOM_UTF8[:2])
        assert_error(generate(call, *flags, "-n", "5"), 1, ["invalid byte 0xef at offset 0"])


def test_a_prompt_is_utf8_whatever_the_systems_encoding_is(call, monkeypatch):
    expected = generate(call, "-p", "Thé", "-n", "5").out
    assert generate(call, "-p", "Th\udcc3\udca9", "-n", "5").out == expected  # a locale of ASCII
    stream = io.TextIOWrapper(io.BytesIO("Thé".encode()), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", stream)
    assert generate(call, "-p", "-", "-n", "5").out == expected


def change_config(path: Path, **settings) -> None:
    config = json.loads((path / "config.json").read_text())
    config["model"].update(settings)
    (path / "config.json").write_text(json.dumps(config))


def make_a_weight_infinite(path: Path) -> None:
    weights = gpt_burn.read_record(path / "model.mpk")
    weights["norm.beta"][5] = np.inf
    safetensors.write(path / "model.safetensors", weights)


def truncate(path: Path) -> None:
    data = (path / "model.mpk").read_bytes()
    (path / "model.mpk").write_bytes(data[: len(data) // 2])


def claim_a_million_million_elements(path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(200_000)
    (path / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["there is no model folder"]),
        (lambda path: (shutil.rmtree(path), path.write_text("")), ["there is no model folder"]),
        (lambda path: (path / "config.json").unlink(), ["it has no config.json"]),
        (lambda path: (path / "model.mpk").unlink(), ["model.safetensors or model.mpk"]),
        (truncate, ["model.mpk is truncated or corrupt"]),
        (
            lambda path: (path / "model.mpk").write_bytes(b"\xc1" * 200_000),
            ["model.mpk", "corrupt"],
        ),
        (lambda path: (path / "model.mpk").write_bytes(b""), ["model.mpk"]),
        (lambda path: (path / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
        (lambda path: change_config(path, d_model=32), ["tensor", "config.json asks for"]),
        (lambda path: change_config(path, n_layers=1), ["tensor", "config.json does not ask for"]),
        (lambda path: change_config(path, vocab_size=90), ["vocab_size is 90"]),
        (lambda path: change_config(path, n_heads=0), ["config.json", "n_heads"]),
        (lambda path: change_config(path, d_model=10**6, n_heads=1), ["config.json", "model.mpk"]),
        (lambda path: change_config(path, context_length=10**12), ["config.json", "model.mpk"]),
        (make_a_weight_infinite, ["model.safetensors", "norm.beta", "not finite"]),
        (claim_a_million_million_elements, ["model.safetensors is truncated or corrupt"]),
    ],
)
def test_a_model_that_cannot_be_read_is_one_line_that_says_why(call, tmp_path, damage, words):
    path = tmp_path / "model"
    shutil.copytree(REFERENCE, path)
    damage(path)
    result = call(run.main, path)
    assert_error(result, 1, [str(path), *words])
    assert result.out == ""


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], 1, ["there is no model in .data", "python train.py"]),
        ([REFERENCE, "-n", "0"], 2, ["-n/--n-new-tokens", "'0'"]),
        ([REFERENCE, "-n", "-1"], 2, ["-n/--n-new-tokens", "'-1'"]),
        ([REFERENCE, "-n", "x"], 2, ["-n/--n-new-tokens", "'x'"]),
        ([REFERENCE, "--temperature", "-1"], 2, ["--temperature", "'-1'"]),
        ([REFERENCE, "--temperature", "nan"], 2, ["--temperature", "'nan'"]),
        ([REFERENCE, "--stride", "0"], 2, ["--stride", "'0'"]),
        ([REFERENCE, "--stride", "65"], 1, ["a stride of 65 is beyond the context of 64"]),
        ([REFERENCE, "-s", "-1"], 2, ["-s/--seed", "'-1'"]),
        (["", "-n", "5"], 2, ["model_path", "the path is empty"]),
        (["--score", ""], 2, ["--score", "the path is empty"]),
        ([REFERENCE, "other"], 2, ["other"]),
        ([REFERENCE, "-p", ""], (1, 2), ["prompt is empty", "at least one character"]),
    ],
)
def test_wrong_usage_is_refused_by_the_name_of_the_option(call, options, status, words):
    result = call(run.main, *options)
    assert result.status in (status if isinstance(status, tuple) else [status])
    assert_error(result, result.status, words)
    assert result.out == ""


@pytest.mark.parametrize("main", [run.main, export.main])
def test_h_is_help_where_there_are_no_heads(call, main):
    result = call(main, "-h")
    assert (result.status, result.err) == (0, "")
    assert "-h, --help" in result.out


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do(folder):
    process = subprocess.run(
        [sys.executable, ROOT / "run.py", REFERENCE],
        cwd=folder,
        env={**os.environ, "DEV": "ABACUS"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: DEV=ABACUS does not open here")
    assert "these do: " in process.stderr
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("fault", [ValueError("a fault of ours"), ValueError()])
def test_a_fault_of_ours_is_no_line_but_a_traceback(fault):
    def main():
        raise fault

    with pytest.raises(ValueError) as raised:
        command_line.run(main)
    assert raised.value is fault
    assert "Traceback" in command_line.explain(fault)


@pytest.mark.parametrize(
    "error", [MemoryError(), UserError("out\nof memory"), OSError("out of memory")]
)
def test_what_a_user_can_get_wrong_is_one_line(error, call):
    def main():
        raise error

    assert_error(call(main), 1, ["error: out of memory"])
