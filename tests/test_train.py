"""train.py from the command line: output, files and errors."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    GPT2,
    REFERENCE,
    ROOT,
    TINY,
    Result,
    assert_error,
    not_on_windows,
    start,
)
from tinygrad import Context, Device

import run
import tokenizers
import train
from gpt_tiny import GPTConfig
from models import checkpoint
from training import checks, trainer
from training.config import TrainingConfig, changed
from training.workers import World

STEP = re.compile(
    r"step {1,3}(\d+)/(\d+): train loss: (\d+\.\d{4}), val loss: (\d+\.\d{4}) "
    r"\(\d\d:\d\d:\d\d/\d\d:\d\d:\d\d\)"
)


@pytest.fixture(scope="module")
def corpus(folder) -> Path:
    path = folder / "corpus.txt"
    words = ["".join(letters) for letters in itertools.product("bdfklmnprst", "aeiou", "lmnt")]
    path.write_text("The " + " ".join(random.Random(0).choices(words, k=3000)))
    return path


@pytest.fixture(scope="module")
def trained(folder, corpus) -> Result:
    """Result of a training run of five steps in a subprocess."""
    options = [*TINY, "-n", "5", "-s", "7", "-t", corpus.name, "-o", "model"]
    process = subprocess.run(
        [sys.executable, ROOT / "train.py", *options], cwd=folder, capture_output=True, text=True
    )
    return Result(process.returncode, process.stdout, process.stderr)


def losses(out: str) -> list[tuple[str, str]]:
    return [match.groups()[2:] for match in STEP.finditer(out)]


def files(folder: Path) -> set[str]:
    """Relative paths of all files but the cached ids."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in paths if not path.is_relative_to(".data/ids")}


def test_output_is_as_documented(trained):
    assert (trained.status, trained.err) == (0, "")
    first, rest = trained.out.split("\n", 1)
    assert first == f"start training - parameters: 2688, device: {Device.DEFAULT}"
    config, end = json.JSONDecoder().raw_decode(rest)
    assert rest[:end] == json.dumps(config, indent=2)
    assert config == {
        "n_steps": 5,
        "batch_size": 4,
        "learning_rate": 0.003,
        "batches_per_step": 100,
        "validation_size": 128,
        "seed": 7,
        "model": {
            "context_length": 8,
            "vocab_size": 104,
            "n_layers": 1,
            "n_heads": 2,
            "d_model": 8,
            "d_hidden": 32,
            "dropout": 0.2,
        },
        "optimizer": {
            "grad_clipping": None,
            "beta_1": 0.9,
            "beta_2": 0.999,
            "epsilon": 1e-5,
            "weight_decay": 1e-4,
        },
        "tokenizer": "char",
    }
    lines = rest[end + 1 :].split("\n", 8)
    for number, line in enumerate(lines[:5], 1):
        assert STEP.fullmatch(line).groups()[:2] == (str(number), "5")
        assert line.startswith(f"step {number:>3}/5: ")
    assert re.fullmatch(r"store checkpoint model to: \.data[/\\]checkpoints[/\\]\d+_4", lines[5])
    assert lines[6] == "store trained model to: model"
    assert lines[7] == "generate example text"
    assert len(lines[8]) <= 201  # 200 tokens of one character, none for an unknown one
    assert len(lines[8]) > 150
    assert lines[8].endswith("\n")


def test_a_training_run_goes_on_after_its_output_is_closed(folder, corpus):
    training = start(folder, *TINY, "-n", "3", "-t", corpus.name, "-o", "without_reader")
    while "step   1/3" not in training.stdout.readline():
        assert training.poll() is None
    training.stdout.close()
    assert (training.stderr.read(), training.wait()) == ("", 0)
    checkpoint.load(folder / "without_reader")


@not_on_windows("Windows has no sh")
def test_without_standard_streams_the_model_is_saved(folder, corpus):
    words = [*TINY, "-n", "1", "-t", corpus.name, "-o", "without_streams"]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = subprocess.run([*shell, sys.executable, ROOT / "train.py", *words], cwd=folder)
    assert process.returncode == 0
    checkpoint.load(folder / "without_streams")


def test_loss_falls(trained):
    train_losses, validation_losses = np.array(losses(trained.out), float).T
    assert abs(validation_losses[0] - np.log(104)) < 0.1  # uniform over the vocabulary
    assert validation_losses[-1] < validation_losses[0] - 1
    assert train_losses[-1] < train_losses[0] - 1


@pytest.mark.parametrize("place", ["model", ".data/checkpoints/*_4"])
def test_models_and_checkpoints_load(trained, folder, place):
    [path] = folder.glob(place)
    model, tokenizer = checkpoint.load(path)
    config = json.loads((path / "config.json").read_text())
    printed, _ = json.JSONDecoder().raw_decode(trained.out.split("\n", 1)[1])
    assert config == printed
    assert model.config == GPTConfig(**config["model"])
    assert tokenizer.name == "char"
    assert all(np.isfinite(p.numpy()).all() for p in model.parameters().values())


def test_checkpoints_are_stored_every_ten_steps_from_the_fifth_on_and_at_the_end():
    config = TrainingConfig(n_steps=16)
    assert [step for step in range(16) if trainer.is_checkpoint(step, config)] == [4, 14, 15]


def test_a_seed_repeats_the_losses_and_x_writes_nothing(call, folder, corpus, trained):
    before = files(folder)
    again, other = (
        call(train.main, *TINY, "-n", "2", "-s", seed, "-t", corpus, "-x").out for seed in (7, 8)
    )
    assert files(folder) == before
    assert losses(again) == losses(trained.out)[:2]
    assert all(a != b for a, b in zip(losses(again), losses(other), strict=True))
    assert "store" not in again


def test_without_o_the_model_is_saved_in_the_data_folder(call, folder, corpus):
    out = call(train.main, *TINY, "-n", "1", "-t", corpus).out
    [place] = re.findall(r"store trained model to: (.*)", out)
    assert re.fullmatch(r"\.data[/\\]gpt_2k_8context_\d+", place)
    checkpoint.load(folder / place)


@pytest.mark.parametrize("sizes", [["-c", "1"], ["-d", "1", "-h", "1"]])
def test_the_smallest_models_train_and_generate(call, folder, corpus, sizes):
    """With a context of 1 the model is a bigram model, with width 1 a unigram model."""
    name = f"smallest{sizes[0]}"
    options = [*TINY, *sizes, "-n", "2", "-t", corpus, "-o", name]
    result = call(train.main, *options)
    assert result.status == 0, result.err
    (_, before), (_, after) = losses(result.out)
    assert float(after) < float(before) - 0.3
    assert call(run.main, folder / name, "-n", "20").status == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "16"], ["--d-model 16 contradicts the model", "it has --d-model 48"]),
        (["-l", "1"], ["--n-layers 1", "--n-layers 2"]),
        (["-h", "6"], ["--n-heads 6", "--n-heads 4"]),
        (["--tokenizer", "char"], ["--tokenizer char", "--tokenizer bpe"]),
        (["--vocab-size", "300"], ["--vocab-size 300", "--vocab-size 512"]),
        (["-c", "65"], ["--context-length 65 is beyond the model's 64"]),
        (["--format", "burn"], ["gpt-burn has no GPT-2"]),
    ],
)
def test_flags_that_contradict_the_initial_model_are_refused(call, corpus, options, words):
    pytest.importorskip("tiktoken")
    assert_error(call(train.main, "--init-from", GPT2, "-t", corpus, *options), 1, words)


def test_flags_that_agree_with_the_initial_model_are_accepted(call, folder, corpus):
    pytest.importorskip("tiktoken")
    (folder / "bpe").mkdir()  # not read as a tokenizer's folder
    options = ["-h", "4", "-d", "48", "--tokenizer", GPT2, "-c", "16", "--dropout", "0"]
    words = ["--init-from", GPT2, "-t", corpus, "-b", "2", "--validation-size", "2", "-n", "1"]
    result = call(train.main, *words, *options, "-o", "fine_tuned")
    assert result.status == 0, result.err
    config, _ = json.JSONDecoder().raw_decode(result.out.split("\n", 1)[1])
    assert config["tokenizer"] == "bpe"
    sizes = {"d_model": 48, "n_heads": 4, "context_length": 16, "dropout": 0, "gpt2": True}
    assert config["model"].items() >= sizes.items()
    refused = call(train.main, "--resume", ".data/checkpoints", "-n", "2", "--format", "burn")
    assert_error(refused, 1, ["gpt-burn has no GPT-2"])


def test_vowel_tokenizer_trains_is_saved_and_generates(call, folder, corpus):
    options = ["--tokenizer", "vowel", "--vocab-size", "104", "-t", corpus, "-o", "vowel"]
    result = call(train.main, *TINY, "-n", "1", *options)
    assert result.status == 0
    config = json.loads((folder / "vowel" / "config.json").read_text())
    assert (config["tokenizer"], config["model"]["vocab_size"]) == ("vowel", 104)
    _, tokenizer = checkpoint.load(folder / "vowel")
    text = corpus.read_text()
    expected = tokenizers.SimpleVowelTokenizer.train([text], 104)
    assert tokenizer.tokens == expected.tokens

    result = call(run.main, folder / "vowel", "-p", " ", "-n", "30")
    assert (result.status, result.err) == (0, "")
    known = "|".join(re.escape(token.decode()) for token in tokenizer.tokens[:-1])
    assert re.fullmatch(rf" ({known}){{30}}\n", result.out)


def test_a_text_in_another_script_has_a_vocabulary_of_its_characters(call, folder):
    # 103 characters with the line break, as many as gpt-burn's vocabulary: jits are shared
    text = ("чайник на плите поёт, дождь идёт. " + "".join(map(chr, range(0x410, 0x473)))) * 50
    (folder / "ru.txt").write_text(text, encoding="utf-8")
    result = call(train.main, *TINY, "-n", "1", "-t", "ru.txt", "-o", "ru")
    assert result.status == 0
    own = "ru.txt: the vocabulary is its own 103 characters, for gpt-burn's 103 leave out 94.0 %\n"
    assert result.err == own
    for path in ("ru", re.search(r"checkpoint model to: (.+)", result.out)[1]):
        _, tokenizer = checkpoint.load(folder / path)
        assert tokenizer.decode(range(tokenizer.vocab_size)) == "".join(sorted({"\n", *text}))
    result = call(run.main, "ru", "-p", "плита ", "-n", "30")
    assert (result.status, result.err) == (0, "")
    assert re.fullmatch(f"плита [{text}\n]{{30}}\n", result.out)
    refused = call(train.main, "--init-from", "ru", "-t", "ru.txt", "--format", "burn")
    assert_error(refused, 1, ["--format burn", "no other characters than its own"])


def test_a_model_in_gpt_burns_format_has_gpt_burns_vocabulary(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("fr.txt").write_text("où été garçon " * 50, encoding="utf-8")
    config = changed(TrainingConfig(), {"text_corpus": (Path("fr.txt"),), "format": "burn"})
    assert (
        train.read_corpus(config, None, World()).tokenizer.tokens
        == tokenizers.CharTokenizer().tokens
    )
    lost = "warning: 28.6 % of fr.txt is not in the vocabulary and left out: é ç ù\n"
    assert capsys.readouterr().err == lost


def test_validation_size_and_checkpoint_every(call, folder):
    options = ["--validation-size", "8", "--checkpoint-every", "2", "-n", "3", "-o", "options"]
    result = call(train.main, *TINY, *options)
    assert result.status == 0
    assert '"validation_size": 8' in result.out
    # the folder of a later run in the same second ends with a number
    stored = re.findall(r"checkpoint model to: [^_\n]+_(\d+)(?:_\d+)?\n", result.out)
    assert stored == ["1", "2"]  # after 2 steps, and the last one


def test_a_new_run_replaces_the_model_in_its_folder_after_a_step(call, folder):
    def kept() -> dict[str, bytes]:
        return {name: (folder / "taken" / name).read_bytes() for name in files(folder / "taken")}

    call(train.main, *TINY, "-n", "2", "-o", "taken")
    (folder / "taken" / "best" / "notes.txt").write_text("mine")
    before = kept()
    failed = call(train.main, *TINY, "-n", "2", "-r", "1e30", "-o", "taken")
    assert failed.status == 1 and kept() == before

    vowels = ["--tokenizer", "vowel", "--vocab-size", "104"]
    assert call(train.main, *TINY, *vowels, "-n", "1", "-o", "taken").status == 0
    after = kept()
    assert after["best/config.json"] == after["config.json"] != before["config.json"]
    assert after["best/notes.txt"] == b"mine"
    checkpoint.load(folder / "taken" / "best")
    assert after["metrics.csv"].count(b"\n") == 2


@pytest.fixture(scope="module")
def bad_files(folder, corpus) -> None:
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_text("x" * 70)
    (folder / "latin.txt").write_bytes(b"a" * 1234 + b"\xe4" + b"a" * 1234)
    (folder / "notes").mkdir()
    (folder / "notes" / "diary.txt").write_text("dear diary")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-t", "missing.txt"], ["there is no missing.txt", "--text-corpus"]),
        (["-t", "notes"], ["diary.txt is too short", "1 tokens"]),
        (["-t", "notes/diary.txt", "-t", "latin.txt"], ["latin.txt is not UTF-8", "offset 1234"]),
        (["-t", "empty.txt"], ["empty.txt is too short", "0 tokens", "--context-length 8"]),
        (["-t", "short.txt"], ["short.txt is too short", "7 tokens", "--context-length 8"]),
        (["-t", "latin.txt"], ["not UTF-8", "0xe4", "offset 1234", "convert"]),
        (["-d", "1000000"], ["GiB", "choose a smaller"]),
        (["-l", "2000000000"], ["GiB", "choose a smaller"]),
        (["-b", "2000000000"], ["GiB", "choose a smaller", "--batch-size"]),
        (["--tokenizer", "words"], ["--tokenizer words is not known", "char, vowel, bpe, or a"]),
        (["-o", "corpus.txt"], ["corpus.txt is a file", "name a folder"]),
        (["-o", "corpus.txt/model"], ["cannot save to", "corpus.txt"]),
        pytest.param(
            ["-o", "/proc/gpt-tiny/model"],
            ["cannot save to /proc/gpt-tiny/model"],
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
        ),
        (["-o", "notes"], ["notes exists and is not a model folder", "name another"]),
    ],
)
def test_errors_are_one_line_and_leave_no_file(call, bad_files, folder, options, words):
    before = files(folder)
    text = [] if "-t" in options else ["-t", "corpus.txt"]
    result = call(train.main, *TINY, *text, *options)
    result.err = result.err.rpartition(" are joined into one text\n")[
        2
    ]  # a message before the error
    assert_error(result, 1, words)
    assert result.out == ""
    assert files(folder) == before
    assert (folder / "notes" / "diary.txt").read_text() == "dear diary"


def test_more_memory_than_the_container_has_is_refused(call, corpus, monkeypatch):
    monkeypatch.setattr(checks.machine, "memory", lambda: 3 << 29)
    with Context(ATTENTION_BLOCKS=0):
        result = call(train.main, *TINY, "-c", "1024", "-b", "32", "-t", corpus, "-x")
    assert_error(result, 1, ["takes about 1.9 GiB of memory, and there are 1.5", "--batch-size"])


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_the_estimated_memory_is_the_memory_used(folder, corpus):
    code = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import train
from training import checks
from training.config import TrainingConfig
train.DEFAULTS = TrainingConfig(batches_per_step=1)
train.print_example = lambda *_: None
def record(config, n_tokens):
    print(*memory_taken(config, n_tokens), file=sys.stderr)
    return 0, 0
memory_taken, checks.memory_taken = checks.memory_taken, record
train.main()
# not getrusage: its peak includes the parent process
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(int(peak.split()[1]) << 10, file=sys.stderr)
"""
    words = [*TINY, "-c", "1024", "-b", "32", "--validation-size", "4", "-n", "1", "-x"]
    words += ["-t", corpus.name]
    process = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=os.environ | {"ROOT": str(ROOT), "DEV": "CPU"},
        capture_output=True,
        text=True,
    )
    n_score_bytes, estimated, used = map(int, process.stderr.split())
    assert 0.8 < estimated / used < 1.3
    assert n_score_bytes == 0 and used < 1 << 29


def test_a_context_whose_scores_take_gigabytes_is_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(checks.machine, "memory", lambda: 64 << 30)
    short, long = (
        TrainingConfig(model=GPTConfig(n, 104, 1, 1, 32, 128), batch_size=4) for n in (1024, 8258)
    )
    corpus = SimpleNamespace(ids=range(100_000), n_training=90_000)
    world = SimpleNamespace(size=1, n_on_machine=1)
    with Context(ATTENTION_BLOCKS=0):
        checks.check_sizes(short, corpus, world)
        assert capsys.readouterr().err == ""
        checks.check_sizes(long, corpus, world)
    warning = capsys.readouterr().err
    assert "--context-length 8258 takes 7.1 of about 7.3 GiB" in warning, warning
    assert warning.count("\n") == 1 and "--accumulate" in warning


def test_workers_on_several_machines_split_the_memory_of_a_batch(monkeypatch):
    monkeypatch.setattr(checks.machine, "memory", lambda: 1 << 29)
    config = TrainingConfig(model=GPTConfig(2048, 104, 1, 2, 256, 1024), batch_size=8)
    corpus = SimpleNamespace(ids=range(100_000), n_training=90_000)
    checks.check_sizes(config, corpus, SimpleNamespace(size=2, n_on_machine=1))
    with pytest.raises(ValueError, match="choose a smaller"):
        checks.check_sizes(config, corpus, SimpleNamespace(size=2, n_on_machine=2))


@pytest.mark.parametrize(
    "flag", ["-c", "-d", "-l", "-h", "-n", "-b", "-m", "--vocab-size", "--sample-every"]
)
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many", "", "99999999999999999999"])
def test_an_invalid_size_is_refused(call, flag, value):
    result = call(train.main, flag, value)
    assert_error(result, 2, [flag, repr(value), "--help"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "100", "-h", "3"], ["--d-model 100 is not divisible by --n-heads 3"]),
        (["-r", "-0.1"], ["-r/--learning-rate", "'-0.1'"]),
        (["-r", "nan"], ["-r/--learning-rate", "'nan'"]),
        (["-r", "inf"], ["-r/--learning-rate", "'inf'"]),
        (["--dropout", "1"], ["--dropout", "below 1"]),
        (["-s", "-1"], ["-s/--seed", "'-1'"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["corpus.txt"], ["corpus.txt"]),
        (["-n"], ["-n/--n-steps"]),
        (["-t", ""], ["-t/--text-corpus", "the path is empty"]),
        (["--resume", ""], ["--resume", "the path is empty"]),
    ],
)
def test_invalid_values_are_refused_by_the_name_of_the_option(call, options, words):
    result = call(train.main, *options)
    assert_error(result, 2, [*words, "--help"])


@pytest.mark.parametrize(
    ("options", "device", "status", "words"),
    [
        (["-n", "0"], "CPU", 2, ["-n/--n-steps", "'0'"]),
        ([], "ABACUS", 1, ["DEV=ABACUS", "these do:", "CPU"]),
        ([], "QCOM", 1, ["DEV=QCOM does not open here", "these do:", "CPU"]),
        ([], "CPU:x", 1, ["DEV=CPU:x does not open here", "no renderer 'X'"]),
    ],
)
def test_the_process_ends_with_one_line_and_its_status(folder, options, device, status, words):
    environment = {**os.environ, "DEV": device}
    process = subprocess.run(
        [sys.executable, ROOT / "train.py", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert_error(Result(process.returncode, process.stdout, process.stderr), status, words)
    assert process.stdout == ""


@pytest.mark.parametrize(("script", "backend"), [("train.py", "CUDA"), ("run.py", "METAL")])
def test_a_backend_chosen_by_its_former_variable_is_refused(folder, script, backend):
    environment = {name: value for name, value in os.environ.items() if name != "DEV"}
    process = subprocess.run(
        [sys.executable, ROOT / script, *([] if script == "train.py" else [REFERENCE])],
        cwd=folder,
        env=environment | {backend: "1"},
        capture_output=True,
        text=True,
    )
    result = Result(process.returncode, process.stdout, process.stderr)
    assert_error(result, 1, [f"{backend}=1", f"DEV={backend}"])


def test_help_names_every_option_and_the_backends(call):
    result = call(train.main, "--help")
    assert (result.status, result.err) == (0, "")
    assert "-h, --help" not in result.out  # -h is the number of heads
    flags = "-o -c -d -l -h -n -b -r -s -t -m -x --help --tokenizer --vocab-size --dropout"
    for flag in flags.split():
        assert re.search(rf"^ +{flag}\b", result.out, re.M), flag
    assert "DEV" in result.out
    assert "CPU" in result.out
