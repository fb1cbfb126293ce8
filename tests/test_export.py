"""export.py: programs compiled from a model give the output of run.py.

GPT_TINY_TARGETS=1 adds programs for other machines; they need qemu-aarch64-static and wine.
"""

import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DATA, GPT2, REFERENCE, assert_error, not_on_windows
from tinygrad.helpers import Context

import export
import run
from gpt_tiny import GPTConfig, initial_weights
from models import checkpoint, safetensors
from runtime import build, sources
from tokenizers import CharTokenizer, SimpleVowelTokenizer, Tokenizer

PROMPTS = json.loads((REFERENCE / "expected.json").read_text())
GREEDY = ["-n", "200", "--temperature", "0"]
DRAWN = [
    ["-s", "7"],
    ["-s", "123456789012345678901234567890", "--temperature", "0.7", "--top-k", "9"],
    ["--top-p", "0.8", "--stride", "5", "-s7"],
    ["--temperature=1.5", "--stop", "e", "--seed=3"],
    ["--stop", "no such text", "-s", "2"],
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[dict, Path]:
    return {}, tmp_path_factory.mktemp("programs")


@pytest.fixture
def program(made, call, monkeypatch):
    """Returns a function that exports a model with options of export.py, once per module."""
    programs, folder = made

    def program(model: Path, *options: str) -> Path:
        if (model, options) not in programs:
            if "--weights" in options:  # share products among cores, as in a large model
                monkeypatch.setattr(sources, "MIN_SHARED_BYTES", 0)
            path = folder / f"program_{len(programs)}.exe"
            assert call(export.main, model, "-o", path, *options).status == 0
            programs[model, options] = path
        return programs[model, options]

    return program


def started(*words, stdin: str | bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    environment = {**os.environ, "WINEDEBUG": "-all", **environment}
    return subprocess.run(
        list(map(str, words)), input=stdin, capture_output=True, env=environment, timeout=300
    )


def output(*words, **options) -> str:
    process = started(*words, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout.decode()


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    """Saves an untrained model for the tokenizer."""
    config = GPTConfig(9, tokenizer.vocab_size, n_layers=1, n_heads=3, d_model=21, d_hidden=50)
    settings = {name: value for name, value in vars(config).items() if value is not False}
    checkpoint.save(folder, {"model": settings}, initial_weights(config, 1), tokenizer)
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    tokenizer = SimpleVowelTokenizer.read(DATA / "tokenizers" / "vowel.bin")
    return saved(tmp_path_factory.mktemp("models") / "pieces", tokenizer)


@pytest.fixture(scope="module")
def russian(tmp_path_factory) -> Path:
    """A model with other characters than gpt-burn's."""
    tokenizer = CharTokenizer(["\n", *" ',1Het", *map(chr, range(0x430, 0x450)), *"日語🔥"])
    return saved(tmp_path_factory.mktemp("models") / "russian", tokenizer)


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> Path:
    """A GPT-2 with two end ids, an added token, a padding token, and rows without a token but with
    the highest logits."""
    folder = shutil.copytree(GPT2, tmp_path_factory.mktemp("models") / "marked")
    config = json.loads((GPT2 / "config.json").read_text()) | {"vocab_size": 520}
    roles = {"eos_token_id": [511, 309], "pad_token_id": 513}
    files = {"config.json": config, "generation_config.json": roles}
    files["added_tokens.json"] = {"<|user|>": 512, "<|pad|>": 513}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tensors = dict(safetensors.read(GPT2 / "model.safetensors"))
    table = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = np.concatenate([table, 1.5 * table[262:270]])
    safetensors.write(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("vectors", ["0", "1", "2"])
def test_greedy_texts_are_gpt_burns_at_each_vector_width(program, vectors):
    for prompt in PROMPTS:
        words = [program(REFERENCE), "-p", prompt["prompt"], *GREEDY]
        assert output(*words, VECTORS=vectors) == prompt["greedy"] + "\n"


@pytest.mark.parametrize(
    ("model", "weights"),
    [("char", None), ("russian", "int8"), ("pieces", "float16"), ("marked", None)],
)
def test_a_program_gives_the_texts_of_run_py(program, call, request, model, weights):
    if model == "marked":
        pytest.importorskip("tiktoken")
    folder = REFERENCE if model == "char" else request.getfixturevalue(model)
    options = ["--weights", weights] if weights else []
    story = program(folder, *options)
    for words in (GREEDY, *DRAWN):
        words = ["-p", "Hello, it's the 1st", "-n", "70", *words]
        assert output(story, *words) == call(run.main, folder, *options, *words).out


def test_a_program_stops_at_each_end_id(program, call, marked):
    pytest.importorskip("tiktoken")
    greedy = json.loads((GPT2 / "expected.json").read_text(encoding="utf-8"))[0]
    words = ["-p", greedy["text"], "-n", "8", "--temperature", "0"]
    text = output(program(marked), *words)
    assert text == call(run.main, marked, *words).out
    assert len(text) < len(call(run.main, GPT2, *words).out)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-p", ""], ""),
        (["-p", "-"], "\ufeff"),
        (["-p", "-"], "\ufeffThe<|user|>"),
        (["-p", "the<|user|> the<|endoftext|>"], ""),
        (["-p", "the<|user|> the<|endoftext|>", "--no-special"], ""),
        (["-i"], "\ufeff\n\ufeffA<|endoftext|>\n<|pad|>"),
    ],
)
def test_special_tokens_in_prompts_are_handled_as_by_run_py(
    program, call, pipe, marked, words, text
):
    pytest.importorskip("tiktoken")
    words = [*words, "-n", "9", "-s", "3"]
    pipe(text.encode())
    ours = call(run.main, marked, *words)
    theirs = started(program(marked), *words, stdin=text)
    assert (ours.status, ours.out) == (theirs.returncode, theirs.stdout.decode())
    assert ours.err == theirs.stderr.decode() == ""


def test_standard_input_is_one_prompt_or_one_per_line(program, call):
    story, short = program(REFERENCE), ["-n", "20", "--temperature", "0"]
    whole = output(story, "-p", "The\n class", *short)
    assert output(story, "-p", "-", *short, stdin="The\r\n class") == whole
    lines = [output(story, "-p", line, *short).removeprefix(line) for line in ("A", "The b")]
    assert output(story, "-i", *short, stdin="A\n\nThe b") == "".join(lines)


@pytest.mark.parametrize("flags", [["-p", "-"], ["-i"]])
@pytest.mark.parametrize(
    "text",
    [
        b"The\r\n\r\nclass\rA\n",
        b"\xef\xbb\xbfThe \xc3\xa9\xe2\x80\x8b\r\n\r\na\xe9b",
        b"\xef\xbb\xbfa\xc3",
    ],
)
def test_a_program_reads_standard_input_as_run_py_does(program, call, pipe, flags, text):
    words = [*flags, "-n", "9", "--temperature", "0"]
    pipe(text)
    ours = call(run.main, REFERENCE, *words)
    theirs = started(program(REFERENCE), *words, stdin=text)
    assert (ours.status, ours.out) == (theirs.returncode, theirs.stdout.decode())
    assert ours.err == theirs.stderr.decode()


@not_on_windows("Windows has no such terminals")
@pytest.mark.parametrize(
    ("environment", "is_bold"),
    [({"TERM": "xterm"}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_a_prompt_is_bold_on_a_terminal_that_knows_bold(program, environment, is_bold):
    shown, terminal = os.openpty()
    words = [program(REFERENCE), "-p", "The", "-n", "1", "--temperature", "0"]
    subprocess.run(words, stdout=terminal, env=environment, check=True)
    os.close(terminal)
    assert os.read(shown, 1000).startswith(b"\033[1mThe\033[0m" if is_bold else b"The")
    os.close(shown)


@pytest.mark.parametrize(
    "prompt", ["日本The é日\t\u3000🔥\u200b", "The " * 600 + "\r\né"], ids=["some", "one"]
)
@pytest.mark.parametrize("model", ["char", "pieces"])
def test_unknown_characters_give_the_warning_of_run_py(program, call, pieces, model, prompt):
    folder, options = (pieces, ["--weights", "float16"]) if model == "pieces" else (REFERENCE, [])
    words = ["-p", prompt, "-n", "5"]
    ours = call(run.main, folder, *options, *words)
    theirs = started(program(folder, *options), *words)
    assert (ours.out, ours.err) == (theirs.stdout.decode(), theirs.stderr.decode())
    assert ours.err.startswith("warning: ")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["-n", "0"], 2, "argument --n-new-tokens: '0' is not a whole number of at least 1"),
        (["--top-k", "x"], 2, "argument --top-k: 'x' is not a whole number of at least 1"),
        (["--temperature", "nan"], 2, "argument --temperature: 'nan' is not a number"),
        (["-s", "-1"], 2, "argument --seed: '-1' is not a whole number of at least 0"),
        (["--stride", "65"], 1, "a stride of 65 is beyond the context of 64"),
        (["--stop", ""], 2, "--stop is empty"),
        (["--stop", "x" * 1001], 2, "give 1 to 1000 bytes"),
        (["-n5", "--no-such"], 2, "unrecognized arguments: --no-such"),
        (["-n", "5", "-p"], 2, "argument -p: expected one argument"),
        (["other"], 2, "unrecognized arguments: other"),
        (["-p", ""], 1, "the prompt is empty"),
        ([b"-p", b"a\xff"], 1, "not UTF-8: invalid byte 0xff at offset 1"),
        ([b"--stop", b"a\xff"], 1, "--stop is not UTF-8: invalid byte 0xff at offset 1"),
    ],
)
def test_wrong_usage_of_a_program_is_an_error_of_one_line(program, words, status, says):
    process = subprocess.run([program(REFERENCE), *words], capture_output=True)
    assert (process.returncode, process.stdout) == (status, b"")
    assert process.stderr.startswith(b"error: ") and process.stderr.count(b"\n") == 1
    assert says in process.stderr.decode()


def test_a_program_shows_its_flags(program):
    shown = output(program(REFERENCE), "--help")
    assert "--temperature N" in shown and "-h, --help" in shown
    assert output(program(REFERENCE), "-h") == shown


def assert_refuses(copy: bytes, path: Path, *emulator: str) -> None:
    path.write_bytes(copy)
    path.chmod(0o755)
    process = started(*emulator, path)
    assert (process.returncode, process.stdout) == (1, b""), len(copy)
    assert process.stderr == b"error: this program is truncated or altered\n"


def altered(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 128]) + data[place + 1 :]


@pytest.mark.skipif("sys.platform == 'darwin'", reason="macOS refuses such a program itself")
def test_a_truncated_or_altered_program_refuses(program, tmp_path):
    data = program(REFERENCE).read_bytes()
    place = len(data) - 100_000  # within the weights
    for copy in (altered(data, place), data[:-8], data[:-1], data[:place]):
        assert_refuses(copy, tmp_path / "copy")


# sizes that end within the checksum code, constants, code and data before the weights
CUTS = [1500, 4096, 4097, 16_000, 30_000, 100_000, 213_000, 215_000, 217_000]


@pytest.mark.skipif("sys.platform != 'linux'", reason="other systems refuse such a program")
def test_a_program_truncated_or_altered_in_its_code_refuses(program, tmp_path):
    data = program(REFERENCE).read_bytes()
    for copy in (*(data[:n] for n in CUTS), altered(data, 100_000)):
        assert_refuses(copy, tmp_path / "copy")


def test_weights_are_in_the_precision_of_their_file(program):
    weights = (REFERENCE / "model.mpk").stat().st_size
    assert weights < program(REFERENCE).stat().st_size < weights + 400_000


@pytest.mark.parametrize("cores", ["1", "2", "3", "24"])
def test_any_number_of_cores_gives_the_same_text(program, russian, cores):
    story = program(russian, "--weights", "int8")
    assert output(story, *GREEDY, NUM_CPU_THREADS=cores) == output(
        story, *GREEDY, NUM_CPU_THREADS="1"
    )


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["nowhere"], 1, "there is no model folder nowhere"),
        ([REFERENCE, "--target", "vax-vms"], 2, "x86_64-windows"),
        ([REFERENCE, "--target", "x86_64-linux", "--page"], 2, "--target"),
        ([REFERENCE, "-o", DATA], 1, "is a folder"),
        ([REFERENCE, "-o", REFERENCE / "config.json" / "story"], 1, "config.json"),
        ([], 2, "model_path"),
    ],
)
def test_errors_of_export_are_one_line_and_leave_no_file(call, folder, words, status, says):
    before = sorted(folder.iterdir())
    result = call(export.main, *words)
    assert_error(result, status, [says])
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def unloaded(monkeypatch) -> None:
    def load(folder: Path):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoint, "load", load)


@not_on_windows("Windows has no named pipes")
@pytest.mark.parametrize("is_page", [False, True])
def test_an_output_that_is_no_regular_file_is_refused_before_the_model_is_loaded(
    call, tmp_path, unloaded, is_page
):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    before = sorted(tmp_path.iterdir())
    for name in ("pipe", "loop", "notes"):
        page = ["--page"] if is_page else []
        assert_error(call(export.main, REFERENCE, *page, "-o", tmp_path / name), 1, [name])
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "loop").is_symlink()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is unwritable, even for root")
def test_an_unwritable_output_is_refused_before_the_model_is_loaded(call, unloaded):
    for page in ([], ["--page"]):
        result = call(export.main, REFERENCE, *page, "-o", "/proc/story/text")
        assert_error(result, 1, ["cannot save to /proc/story/text: "])


@not_on_windows("links need an administrator")
@pytest.mark.parametrize("name", ["config.json", "model.mpk", "model.safetensors", "merges.txt"])
def test_files_of_the_model_are_refused_as_outputs(call, tmp_path, unloaded, name):
    shutil.copytree(REFERENCE, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model" / name)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for output in ("model/" + name, "link"):
        result = call(export.main, tmp_path / "model", "-o", tmp_path / output)
        assert_error(result, 1, ["is a file of the model"])
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize(("name", "written"), [("story.v2", "story.v2"), ("a.html", "a")])
def test_a_large_page_is_a_folder_named_after_the_output(
    call, tmp_path, monkeypatch, name, written
):
    def write_sources(decoder, tokenizer, help_text: str, folder: Path) -> SimpleNamespace:
        (folder / "model.bin").write_bytes(b"weights")
        return SimpleNamespace(n_file_bytes=7, n_halves=0, n_memory_bytes=0)

    monkeypatch.setattr(export, "MAX_PAGE_BYTES", 1000)
    monkeypatch.setattr(export, "write_sources", write_sources)
    monkeypatch.setattr(build, "page_text", lambda title, sources, address: address)
    for _ in range(2):  # the second takes the place of the first
        result = call(export.main, REFERENCE, "--page", "-o", tmp_path / name)
        assert result.status == 0 and f"{written} is a folder" in result.out
        assert sorted(os.listdir(tmp_path / written)) == ["index.html", "model.bin"]
    assert os.listdir(tmp_path) == [written]


def test_a_large_page_never_replaces_another_folder(call, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_PAGE_BYTES", 1000)
    monkeypatch.setattr(export, "write_sources", None)
    (tmp_path / "story").mkdir()
    (tmp_path / "story" / "notes.txt").touch()
    result = call(export.main, REFERENCE, "--page", "-o", tmp_path / "story.html")
    assert_error(result, 1, ["story exists and is no page of ours"])


def test_a_program_too_large_for_its_system_is_refused(call, folder, monkeypatch):
    monkeypatch.setattr(build, "MAX_MODEL_BYTES", 100_000)
    before = sorted(folder.iterdir())
    words = [REFERENCE, "--target", "aarch64-macos"]
    assert_error(call(export.main, *words), 1, ["GB", "--weights int8"])
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("system", "machine", "target"),
    [
        ("Darwin", "arm64", "aarch64-macos"),
        ("Darwin", "x86_64", "x86_64-macos"),
        ("Linux", "aarch64", "aarch64-linux"),
        ("Windows", "AMD64", "x86_64-windows"),
        ("Windows", "ARM64", "x86_64-windows"),  # which Windows emulates
    ],
)
def test_the_default_target_is_this_machine(monkeypatch, system, machine, target):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert export.this_machine() == target and target in build.TARGETS


def test_compilation_uses_no_more_cores_than_allowed(monkeypatch, tmp_path):
    def compile_c(_, output: Path, *arguments) -> Path:
        output.write_bytes(b"")
        return output

    def threads(n: int) -> ThreadPoolExecutor:
        assert n == 1
        return ThreadPoolExecutor(n)

    monkeypatch.setattr(build, "compile_c", compile_c)
    monkeypatch.setattr(build, "ThreadPoolExecutor", threads)
    (tmp_path / "model.bin").write_bytes(bytes(64))
    with Context(NUM_CPU_THREADS=1):
        build.write_program(build.TARGETS["x86_64-linux"], tmp_path, tmp_path / "story")


def test_a_page_too_large_for_a_browser_is_refused(call, folder, monkeypatch):
    monkeypatch.setattr(export, "MAX_WASM_BYTES", 100_000)
    before = sorted(folder.iterdir())
    assert_error(call(export.main, REFERENCE, "--page"), 1, ["GB", "--weights int8"])
    assert sorted(folder.iterdir()) == before


needs_targets = pytest.mark.skipif(
    "GPT_TINY_TARGETS" not in os.environ, reason="GPT_TINY_TARGETS is not set"
)


@needs_targets
@pytest.mark.parametrize(
    ("target", "emulator"), [("aarch64-linux", "qemu-aarch64-static"), ("x86_64-windows", "wine")]
)
def test_programs_for_other_machines_give_the_same_texts(program, target, emulator, tmp_path):
    story = program(REFERENCE, "--target", target)
    assert shutil.which(emulator), emulator
    here = program(REFERENCE)
    prompt = PROMPTS[3]  # in German, and longer than the context
    for words in (["-p", prompt["prompt"], *GREEDY], ["-p", "日", "-n", "100", "-s", "5"]):
        expected = output(here, *words)
        assert output(emulator, story, *words, WINEPREFIX=str(tmp_path)) == expected
    if target == "aarch64-linux":
        data = story.read_bytes()
        for copy in (data[:1500], data[:20_000], data[:130_000], altered(data, 60_000)):
            assert_refuses(copy, tmp_path / "copy", emulator)


def test_the_linked_model_is_not_one_in_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("model.bin").write_bytes(b"another")
    Path("sources").mkdir()
    Path("sources/model.bin").write_bytes(b"the model")
    target, sources = build.TARGETS["aarch64-macos"], tmp_path / "sources"
    assert b"the model" in build.model_object(target, sources).read_bytes()


def load_commands(data: bytes) -> list[tuple[int, bytes]]:
    """Number and bytes of each load command of a 64-bit Mach-O file."""
    commands, place = [], 32
    for _ in range(int.from_bytes(data[16:20], "little")):
        number, size = struct.unpack_from("<II", data, place)
        commands.append((number, data[place : place + size]))
        place += size
    return commands


@needs_targets
@pytest.mark.parametrize(("processor", "page"), [("x86_64", 4096), ("aarch64", 16384)])
def test_a_program_for_macos_is_a_valid_mach_o_file(program, processor, page):
    """Checked against Apple's mach-o/loader.h, as no test machine runs the program."""
    data = program(REFERENCE, "--target", f"{processor}-macos").read_bytes()
    commands, segments, end, address = load_commands(data), {}, 0, 0
    kind = {"x86_64": 0x1000007, "aarch64": 0x100000C}[processor]
    assert struct.unpack_from("<II", data) == (0xFEEDFACF, kind)
    for segment in (words for number, words in commands if number == 0x19):
        first, n, start, size = struct.unpack_from("<4Q", segment, 24)
        assert first % page == start % page == 0 and first >= address and start >= end
        address, end = first + n, start + size
        segments[segment[8:24].rstrip(b"\0")] = data[start:end]
    assert list(segments)[-1] == b"__LINKEDIT" and end == len(data)
    libraries = [words[24:].rstrip(b"\0") for number, words in commands if number == 0xC]
    assert libraries == [b"/usr/lib/libSystem.B.dylib"]
    here = program(REFERENCE, "--target", "x86_64-linux").read_bytes()
    place = int.from_bytes(here[-24:-16], "little")
    assert segments[b"__MODEL"][:-24] == here[place:-24]


@needs_targets
def test_the_signature_of_a_program_for_arm_macs_has_the_digest_of_each_page(program):
    """Constants are from Apple's xnu, osfmk/kern/cs_blobs.h; signatures are big-endian."""
    data = program(REFERENCE, "--target", "aarch64-macos").read_bytes()
    [words] = [words for number, words in load_commands(data) if number == 0x1D]
    place, size = struct.unpack_from("<II", words, 8)
    assert place + size == len(data)
    signature = data[place:]
    magic, length, n, kind, start = struct.unpack_from(">5I", signature)
    assert (magic, n, kind) == (0xFADE0CC0, 1, 0) and length <= size
    directory = signature[start:]
    numbers = struct.unpack_from(">9I4B", directory)
    magic, _, _, flags, hashes, _, _, n_pages, end, hash_bytes, hash_kind, _, log_page = numbers
    assert (magic, hash_bytes, hash_kind, end) == (0xFADE0C02, 32, 2, place)  # of SHA-256
    assert flags & 2  # without a certificate
    pages = [data[at : min(at + (1 << log_page), end)] for at in range(0, end, 1 << log_page)]
    digests = b"".join(hashlib.sha256(page).digest() for page in pages)
    assert digests == directory[hashes : hashes + 32 * n_pages]
