"""Training runs that are interrupted, killed or out of disk space, and resumed."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import GPT2, ROOT, TINY, assert_error, not_on_windows, start

import train
from gpt_tiny import GPTConfig
from models import checkpoint, safetensors
from training import checkpoint as training_checkpoint
from training.config import DEFAULTS, changed
from training.trainer import HEARD, noted_signals
from training.workers import World

MUON = ["--optimizer", "muon", "--grad-clip", "1", "--decay", "cosine"]
N_KILLS = int(os.environ.get("GPT_TINY_KILLS", "2"))


def train_in_subprocess(folder: Path, *words: str) -> str:
    training = start(folder, *words)
    out, err = training.communicate()
    assert training.returncode == 0, err
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def train_here(call) -> Callable[..., str]:
    """Returns a function that runs train.py in this process and returns its output."""

    def train_here(*words: str) -> str:
        result = call(train.main, *words)
        assert result.status == 0, result.err
        return result.out

    return train_here


def newest(folder: Path) -> training_checkpoint.Checkpoint:
    return training_checkpoint.load(folder / ".data/checkpoints", train.make_parser().parse_given)


def step_lines(out: str) -> list[str]:
    """Lines of the steps, without the times."""
    return re.findall(r"^step .*val loss: \S+", out, re.M)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[..., tuple[list[str], bytes]]:
    """Returns a function that trains without interruption: lines of the steps, model file."""

    @functools.cache
    def trained(*words: str) -> tuple[list[str], bytes]:
        folder = tmp_path_factory.mktemp("whole")
        out = train_in_subprocess(folder, *TINY, *words, "-n", "4", "-o", "model")
        return step_lines(out), (folder / "model" / "model.safetensors").read_bytes()

    return trained


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [("SIGINT", 130, []), ("SIGTERM", 143, []), ("SIGHUP", 129, []), ("SIGINT", 130, MUON)],
)
@not_on_windows("Windows sends no signals to a process")
def test_resumed_training_equals_uninterrupted(
    tmp_path, train_here, whole, signals, number, status, words
):
    training = start(tmp_path, *TINY, *words, "-n", "4", "-o", "model")
    before = training.stdout.readline()
    while not before.endswith("\n") or "step   1/4" not in before.splitlines()[-1]:
        before += training.stdout.readline()
    training.send_signal(getattr(signal, number))
    out, err = training.communicate()
    *about_the_text, _ = err.splitlines()
    assert all("Python's own help" in line for line in about_the_text)
    assert training.returncode == status
    assert err.endswith(HEARD.decode())
    command = re.search(r"python train.py (--resume \S+)", out)[1].split()
    assert not (tmp_path / "model" / "config.json").exists()

    rest = train_here(*command)
    lines, model = whole(*words)
    assert step_lines(before + out) + step_lines(rest) == lines
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model


@not_on_windows("Windows has no such terminals")
def test_a_closed_terminal_stores_the_run(tmp_path, signals):
    shown, terminal = os.openpty()
    command = [sys.executable, ROOT / "train.py", *TINY, "-n", "1000", "-o", "model"]
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    session = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    session += "os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", session, *command]
    training = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **ends)
    os.close(terminal)
    before = b""
    while b"step   2/" not in before:
        before += os.read(shown, 1 << 16)
    os.close(shown)
    assert training.wait() == 129
    assert newest(tmp_path).progress.step >= 1


@not_on_windows("Windows has no such terminals")
def test_further_signals_do_not_interrupt_storing(signals):
    with noted_signals(World()) as noted:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
    assert noted == [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize(("rank", "says"), [(0, HEARD.decode()), (1, "")])
def test_rank_0_alone_answers_a_signal_at_once(signals, capfd, rank, says):
    world = World()
    world.rank, world.size = rank, 2
    with noted_signals(world):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err == says
            says = ""  # only once


@not_on_windows("Windows has no nohup")
def test_under_nohup_a_run_survives_its_terminal(tmp_path):
    command = ["nohup", sys.executable, ROOT / "train.py", *TINY, "-n", "1000", "-o", "model"]
    ends = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    training = subprocess.Popen(command, cwd=tmp_path, **ends)
    for step in (1, 2):
        while f"step {step:>3}/" not in training.stdout.readline():
            assert training.poll() is None
        training.send_signal(signal.SIGHUP)
    while "step   3/" not in training.stdout.readline():
        assert training.poll() is None
    training.send_signal(signal.SIGTERM)
    training.communicate()
    assert training.returncode == 143


def test_a_finished_run_of_an_earlier_version_resumes(tmp_path, train_here, whole):
    words = [*TINY, "-n", "2", "-o", "model", "--checkpoint-every", "1"]
    train_here(*words)
    [progress] = tmp_path.glob(f".data/checkpoints/*/{training_checkpoint.PROGRESS}")
    saved = json.loads(progress.read_text(encoding="utf-8"))
    del saved["settings"]  # earlier versions kept the command line instead
    saved |= {"arguments": words, "output_path": "model"}
    progress.write_text(json.dumps(saved), encoding="utf-8")
    rest = train_here("--resume", ".data/checkpoints", "-n", "4")
    lines, model = whole()
    assert step_lines(rest) == lines[2:]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model


def test_samples_do_not_change_the_training(tmp_path, train_here, whole):
    out = train_here(*TINY, "-n", "2", "-o", "model", "--sample-every", "1")
    rest = train_here("--resume", ".data/checkpoints", "-n", "4", "--sample-every", "2")
    line = re.compile(r"^(?:start|step|store) .*\n", re.M)
    [[first, second], [nothing, fourth]] = (line.split(text)[2:4] for text in (out, rest))
    assert nothing == "" and len({first, second, fourth}) == 3
    for sample in (first, second, fourth):  # of 16 characters, 100 more
        assert sample.startswith('The "assert" sta') and len(sample) == 117
    lines, model = whole()
    assert step_lines(rest) == lines[2:]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("has_settings", [True, False])
def test_texts_of_an_earlier_versions_run_have_no_special_tokens(tmp_path, has_settings):
    pytest.importorskip("tiktoken")
    (tmp_path / "text.txt").write_text("The context.<|endoftext|>")
    words = ["--tokenizer", str(GPT2), "-t", str(tmp_path / "text.txt"), "-x"]
    config = changed(DEFAULTS, train.make_parser().parse_given(words))
    settings = training_checkpoint.settings_to_json(config)
    for name in ("no_special", "sample_every"):
        del settings[name]
    of_words = {"arguments": words, "output_path": "model"}
    saved = asdict(training_checkpoint.Progress())
    saved |= {"settings": settings} if has_settings else of_words
    (tmp_path / "training.json").write_text(json.dumps(saved))
    _, earlier = training_checkpoint.read_progress(
        tmp_path / "training.json", train.make_parser().parse_given
    )
    assert train.read_corpus(config, None, World()).ids[-1] == 511
    assert 511 not in train.read_corpus(earlier, None, World()).ids


def test_flags_that_contradict_the_checkpoint_are_refused(call, train_here):
    train_here(*TINY, "-n", "1", "--checkpoint-every", "1")
    for words, message in [
        (["-d", "16"], "--d-model 16 contradicts the training to go on with: it has --d-model 8"),
        (
            ["--optimizer", "muon"],
            "--optimizer muon contradicts the training to go on with: it has --optimizer adamw",
        ),
        (
            ["--grad-clip", "1"],
            "--grad-clip 1.0 contradicts the training to go on with: it has no --grad-clip",
        ),
        (
            ["--no-special"],
            "--no-special contradicts the training to go on with: it has no --no-special",
        ),
        (["-n", "0"], "'0' is not a whole number"),
        (["-t", str(ROOT / "README.md")], "--text-corpus"),
    ]:
        refused = call(train.main, "--resume", ".data/checkpoints", *words)
        assert refused.status in (1, 2) and not refused.out
        assert_error(refused, refused.status, [message])


def test_output_flags_may_change_on_resume(tmp_path, train_here):
    def files() -> set[Path]:
        return {path for path in tmp_path.rglob("*") if path.is_file()}

    train_here(*TINY, "-n", "1", "-o", "model")
    before = files()
    assert len(step_lines(train_here("--resume", ".data/checkpoints", "-n", "2", "-x"))) == 1
    assert files() == before
    words = ["--checkpoint-every", "1", "--format", "burn"]
    rest = train_here("--resume", ".data/checkpoints", "-n", "3", *words)
    assert rest.count("store checkpoint") == 2
    assert (tmp_path / "model" / "model.mpk").exists()


def test_a_finished_run_resumes_from_another_directory(tmp_path, train_here):
    first = tmp_path / "first"
    first.mkdir()
    (first / "text.txt").write_text("The context of the context of the containers. " * 50)
    train_in_subprocess(first, *TINY, "-n", "2", "-t", "text.txt", "-o", "model")
    train_here("--resume", "first/.data/checkpoints", "-n", "3")
    train_here("--resume", ".data/checkpoints", "-n", "4")
    rows = (first / "model" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4"]
    assert sorted(os.listdir(tmp_path)) == [".data", "first"]
    assert checkpoint.read_config(first / "model")["n_steps"] == 4


def test_a_run_resumed_into_an_older_folder_brings_its_best_model_and_metrics(tmp_path, train_here):
    for seed, name in enumerate(["older", "model"]):
        train_here(*TINY, "-n", "2", "-s", str(seed), "-o", name)
    train_here("--resume", ".data/checkpoints", "-o", "older")
    for file in ("metrics.csv", "best/config.json", "best/model.safetensors"):
        assert (tmp_path / "older" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_a_folder_in_use_by_a_run_is_refused_to_others(tmp_path, call, train_here):
    words = [*TINY, "-t", str(ROOT / "README.md"), "-o", "model"]
    first = start(tmp_path, *words, "-n", "1000")
    while "step   1/" not in first.stdout.readline():
        assert first.poll() is None
    refused = call(train.main, *words, "-n", "1")
    assert_error(refused, 1, ["another training is writing to", "model: wait for its end"])
    first.kill()
    first.communicate()
    train_here(*words, "-n", "1")
    assert {".data", "model"} >= set(os.listdir(tmp_path)) or sys.platform == "win32"


def test_a_checkpoint_holds_the_optimizers_state_and_is_refused_to_another(
    tmp_path, call, train_here
):
    train_here(*TINY, *MUON, "-n", "1", "--checkpoint-every", "1")
    [folder] = (tmp_path / ".data/checkpoints").iterdir()
    kept = set(safetensors.read(folder / training_checkpoint.MOMENTS))
    shapes = checkpoint.shapes(GPTConfig(**checkpoint.read_config(folder)["model"]))
    matrices = {name for name in shapes if re.search(r"blocks\..*\.weight", name)}
    expected = {f"momentum.{name}" for name in matrices}
    for kind in ("moments_1", "moments_2"):
        expected |= {f"{kind}.{name}" for name in shapes if name not in matrices}
    assert kept == expected and len(matrices) == 6

    settings = (folder / training_checkpoint.PROGRESS).read_text().replace('"muon"', '"adamw"')
    (folder / training_checkpoint.PROGRESS).write_text(settings)
    refused = call(train.main, "--resume", folder)
    assert refused.status == 1 and "does not hold what its training.json says" in refused.err


def test_a_run_resumes_with_a_moved_corpus_into_a_new_folder(tmp_path, call, train_here):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("The context of the context of the containers. " * 50)
    other.write_text("The containers of the context of the context. " * 50)
    texts = ["-t", text.name, "-t", other.name]
    train_here(*TINY, "-n", "3", "--checkpoint-every", "1", *texts, "-o", "first")
    text.rename(tmp_path / "moved.txt")
    resumed = ["--resume", ".data/checkpoints", "-n", "4"]
    refused = call(train.main, *resumed)
    error = "error: there is no text.txt: name a text with --text-corpus\n"
    assert (refused.status, refused.err) == (1, error)

    texts = ["-t", "moved.txt", "-t", other.name]
    rest = train_here(*resumed, *texts, "-o", "second")
    assert "store trained model to: second\n" in rest
    first, second = (
        (tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("first", "second")
    )
    assert second[:4] == first and len(second) == 5
    for folder in ("first", "second", "second/best"):
        checkpoint.load(tmp_path / folder)

    train_here("--resume", ".data/checkpoints", "-n", "5")  # with the new paths of the texts
    changed = tmp_path / "moved.txt"
    changed.write_text(changed.read_text().replace("containers", "containerz"))
    refused = call(train.main, "--resume", ".data/checkpoints")
    refused.err = refused.err.rpartition(" are joined into one text\n")[
        2
    ]  # a message before the error
    assert_error(refused, 1, ["the corpus is not the one that"])


def test_o_may_name_the_same_folder_by_another_path(tmp_path, train_here):
    train_here(*TINY, "-n", "2", "--checkpoint-every", "1", "-o", "model")
    train_here("--resume", ".data/checkpoints", "-n", "3", "-o", str(tmp_path / "model"))
    rows = (tmp_path / "model" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]


def test_only_the_newest_checkpoint_keeps_the_optimizers_state(tmp_path, train_here):
    train_here(*TINY, "-n", "3", "--checkpoint-every", "1")
    folders = sorted((tmp_path / ".data/checkpoints").iterdir(), key=lambda f: f.name[-1])
    kept = [(folder / training_checkpoint.MOMENTS).exists() for folder in folders]
    assert kept == [False, False, True]
    for folder in folders:
        checkpoint.load(folder)


def test_killed_at_any_moment_the_newest_checkpoint_resumes(tmp_path):
    draw = random.Random(0)
    for _ in range(N_KILLS):
        training = start(tmp_path, *TINY, "-n", "1000", "--checkpoint-every", "1", "-o", "model")
        while "store checkpoint" not in training.stdout.readline():
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            training.communicate(timeout=draw.uniform(0, 0.5))
        training.kill()
        training.communicate()
        step = newest(tmp_path).progress.step
        assert step >= 1
        if (best := tmp_path / "model" / "best").exists():
            checkpoint.load(best)
        resumed = start(tmp_path, "--resume", ".data/checkpoints")
        while not (line := resumed.stdout.readline()).startswith("step"):
            assert resumed.poll() is None
        resumed.kill()
        resumed.communicate()
        assert line.startswith(f"step {step + 1:>3}/1000: ")
        shutil.rmtree(tmp_path / ".data")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk")
@pytest.mark.skipif(getattr(os, "geteuid", int)() != 0, reason="only root may mount")
def test_on_a_full_disk_the_last_checkpoint_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("this machine lets no one mount a tmpfs")
    try:
        training = start(disk, *TINY, "-n", "1000", "--checkpoint-every", "1")
        _, err = training.communicate()
        assert training.returncode == 1
        assert "error: " in err and "No space left on device" in err and "Traceback" not in err
        assert newest(disk).progress.step >= 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_loss_that_is_not_finite_is_an_error_with_advice(call):
    training = call(train.main, *TINY, "-n", "50", "-r", "1e30", "-x")
    assert training.status == 1
    assert "no longer a finite number: try a lower --learning-rate" in training.err
    assert step_lines(training.out) == []


def test_metrics_hold_a_row_for_each_step(tmp_path, train_here):
    train_here(*TINY, "-n", "2", "-o", "model", "--warmup", "400")
    header, *rows = (tmp_path / "model" / "metrics.csv").read_text().splitlines()
    assert header.startswith("step,batch,tokens,train_loss,validation_loss,learning_rate")
    assert [row.split(",")[:3] for row in rows] == [["1", "100", "3200"], ["2", "200", "6400"]]
    assert [float(row.split(",")[5]) for row in rows] == [0.00075, 0.0015]
