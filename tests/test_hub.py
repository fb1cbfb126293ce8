"""Models by name: the real client of the Hugging Face Hub, beside a server that speaks like it."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, ROOT, Result, assert_error

import run
import tokenizers
import train
from models import checkpoint, hub, safetensors

pytest.importorskip("huggingface_hub")
pytest.importorskip("tiktoken")

NEEDED = ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
FILES = {name: (GPT2 / name).read_bytes() for name in NEEDED}
REFERENCE = json.loads((GPT2 / "expected.json").read_text(encoding="utf-8"))[0]
GREEDY = ("-p", REFERENCE["text"], "-n", "8", "--temperature", "0")


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    cuts: int = 0  # so many answers with model.safetensors break off in the middle
    holds: bool = False  # none gets further than that
    is_halfway: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        return sorted(file for method, file in self.requests if method == "GET")


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        data, hub = self.answer(), self.server.hub
        if self.path.endswith("/model.safetensors") and (hub.cuts or hub.holds):
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            if hub.holds:
                hub.is_halfway.set()
                hub.may_end.wait()
            else:
                hub.cuts -= 1
        else:
            self.wfile.write(data)

    def answer(self) -> bytes:
        """Sends status and headers; returns the body."""
        hub = self.server.hub
        match = re.fullmatch("/(.+)/resolve/([^/]+)/(.+)", self.path)
        name, revision, file = match.groups() if match else ("", "", self.path)
        hub.requests.append((self.command, file))
        hub.tokens.add(self.headers["Authorization"])
        files = hub.repositories.get(name, {})
        commit = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        headers = {"X-HF-Warning": "rate; log in for higher limits", "X-Repo-Commit": commit}
        if name in ("gated", "forbidden"):
            status, headers = 403, {"X-Error-Code": "GatedRepo"} if name == "gated" else {}
        elif name not in hub.repositories:  # as the Hub says it to those who are not logged in
            status, headers = 401, {"X-Error-Message": "Invalid username or password."}
        elif file not in files or revision not in ("main", commit):
            status, headers["X-Error-Code"] = 404, "EntryNotFound"
        else:
            status, headers["ETag"] = 200, f'"{hashlib.sha256(files[file]).hexdigest()}"'
        data = files[file] if status == 200 else b""
        if begin := int((self.headers["Range"] or "bytes=0-")[6:-1]):
            status, headers["Content-Range"] = 206, f"bytes {begin}-{len(data) - 1}/{len(data)}"
            hub.requests[-1] = ("GET", f"{file} from {begin}")
        data = data[begin:]
        self.send_response(status)
        for header in (headers | {"Content-Length": len(data)}).items():
            self.send_header(*map(str, header))
        self.end_headers()
        return data

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.hub = Hub(f"http://127.0.0.1:{http.server_port}", {"gpt2": FILES})
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield http.hub
        http.hub.may_end.set()
        http.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


@pytest.fixture(autouse=True)
def client(server, tmp_path, monkeypatch):
    """Has the client read its variables anew, which it does when it is imported."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            del sys.modules[name]

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    variables = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "cache")}
    variables |= {"no_proxy": "*"}
    variables["HF_HUB_DISABLE_TELEMETRY"] = "1"  # with it, the client asks for more than files
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    forget()
    yield forget
    forget()


def start(folder: Path, *words: str | Path, **options) -> subprocess.Popen:
    """run.py in a process of its own, with the server for the Hub."""
    command = [sys.executable, ROOT / "run.py", *words]
    options |= dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, text=True, encoding="utf-8", **options)


@pytest.fixture(scope="module")
def expected() -> str:
    tokenizer = tokenizers.load("bpe", GPT2)
    return REFERENCE["text"] + tokenizer.decode(REFERENCE["greedy_ids"][:8]) + "\n"


def stored(folder: Path) -> list[str]:
    """What the models in the cache have."""
    return sorted(path.name for path in folder.glob("cache/hub/models--*/snapshots/*/*"))


def test_a_name_is_fetched_once_and_then_asked_of_no_one(
    server, client, call, monkeypatch, tmp_path, expected
):
    server.repositories["gpt2"] = FILES | {"pytorch_model.bin": b"pickle", "README.md": b"long"}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with start(tmp_path, "gpt2", *GREEDY) as first:
        assert first.communicate() == (expected, "")
    assert server.fetched() == NEEDED == stored(tmp_path)
    assert server.tokens == {"Bearer hf_secret"}

    server.requests.clear()
    for _ in range(2):
        again = call(run.main, "gpt2", *GREEDY)
        assert (again.status, again.out, again.err) == (0, expected, "")
        client()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert server.requests == []


def test_a_generation_config_is_fetched_where_there_is_one(server, call, tmp_path):
    ends = json.dumps({"eos_token_id": REFERENCE["greedy_ids"][0]}).encode()
    server.repositories["gpt2"] = FILES | {"generation_config.json": ends}
    assert call(run.main, "gpt2", *GREEDY).out == REFERENCE["text"] + "\n"
    assert server.fetched() == sorted([*NEEDED, "generation_config.json"]) == stored(tmp_path)

    server.requests.clear()
    assert call(run.main, "gpt2", *GREEDY).out == REFERENCE["text"] + "\n"
    assert server.requests == []


def test_a_folder_wins_over_the_name(monkeypatch):
    monkeypatch.chdir(GPT2.parent)
    assert checkpoint.find(Path(GPT2.name)) == Path(GPT2.name)


def test_weights_in_several_files_are_fetched_and_run_like_one(server, call, tmp_path, expected):
    files = {name: FILES[name] for name in NEEDED if name != "model.safetensors"}
    server.repositories["someone/large-gpt2"] = files | cut_in_two(tmp_path)
    assert call(run.main, "someone/large-gpt2", *GREEDY).out == expected
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert stored(tmp_path) == sorted([*files, *shards, "model.safetensors.index.json"])

    server.requests.clear()
    assert call(run.main, "someone/large-gpt2", *GREEDY).out == expected
    assert server.requests == []


def cut_in_two(folder: Path) -> dict[str, bytes]:
    tensors = safetensors.read(GPT2 / "model.safetensors")
    names = sorted(tensors)
    parts, weight_map = {}, {}
    for index, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{index}-of-00002.safetensors"
        safetensors.write(folder / file, {name: tensors[name] for name in part})
        parts[file] = (folder / file).read_bytes()
        weight_map |= dict.fromkeys(part, file)
    return parts | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


def test_a_training_starts_from_a_name_and_takes_its_tokenizer_by_name(server, call, tmp_path):
    (tmp_path / "text").write_text("too short")
    assert_error(call(train.main, "--tokenizer", "gpt2", "-t", "text", "-x"), 1, ["too short"])
    assert server.fetched() == stored(tmp_path) == ["merges.txt", "vocab.json"]

    named = ("--init-from", "gpt2", "--tokenizer", "gpt2")
    assert_error(call(train.main, *named, "-t", "text", "-x"), 1, ["too short"])
    assert server.fetched() == NEEDED


def test_a_tokenizer_json_is_fetched_where_its_lists_are_not(server, call, tmp_path, expected):
    merges = FILES["merges.txt"].decode().splitlines()[1:]
    model = {"type": "BPE", "vocab": json.loads(FILES["vocab.json"]), "merges": merges}
    whole = json.dumps({"model": model, "pre_tokenizer": {"type": "ByteLevel"}}).encode()
    files = {name: FILES[name] for name in ("config.json", "model.safetensors")}
    files |= {"tokenizer.json": whole, "tokenizer_config.json": b'{"pad_token": null}'}
    server.repositories["saved"] = files
    assert call(run.main, "saved", *GREEDY).out == expected
    assert server.fetched() == sorted(files) == stored(tmp_path)

    server.requests.clear()
    assert call(run.main, "saved", *GREEDY).out == expected
    assert server.requests == []


def test_added_tokens_are_fetched_and_not_a_tokenizer_json_beside_the_lists(server, call, tmp_path):
    (tmp_path / "text").write_text("too short")
    added = {"added_tokens.json": b'{"<|pad|>": 512}', "tokenizer.json": b"long"}
    server.repositories["gpt2"] = FILES | added
    assert_error(call(train.main, "--tokenizer", "gpt2", "-t", "text", "-x"), 1, ["too short"])
    assert server.fetched() == ["added_tokens.json", "merges.txt", "vocab.json"]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, call, tmp_path, expected):
    tensors = dict(safetensors.read(GPT2 / "model.safetensors"))
    tensors["h.0.attn.bias"] = np.zeros((1, 1, 2500, 2500), np.float32)  # as in old files
    safetensors.write(tmp_path / "large", tensors)
    server.repositories["gpt2"] = FILES | {"model.safetensors": (tmp_path / "large").read_bytes()}
    server.cuts = 1
    result = call(run.main, "gpt2", *GREEDY)
    if result.status != 0:  # older clients leave it to the next run
        assert_error(result, 1, ["does not give its model.safetensors"])
        result = call(run.main, "gpt2", *GREEDY)
    assert (result.out, result.err) == (expected, "")
    pieces = 10 << 20  # bytes that the client writes at a time
    assert server.fetched() == sorted([*NEEDED, f"model.safetensors from {pieces}"])


def test_after_ctrl_c_what_is_whole_stays_and_the_rest_is_fetched(server, call, signals, tmp_path):
    server.holds = True
    with start(tmp_path, "gpt2", *GREEDY) as process:
        server.is_halfway.wait()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "")
    assert stored(tmp_path) == ["config.json", "merges.txt", "vocab.json"]

    server.holds = False
    server.requests.clear()
    assert call(run.main, "gpt2", *GREEDY).status == 0
    assert server.fetched() == ["model.safetensors"]


def test_a_full_disk_is_an_error_and_no_part_of_a_file_is_taken_for_it(tmp_path):
    resource = pytest.importorskip("resource")

    def limit():  # of the bytes in a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with start(tmp_path, "gpt2", preexec_fn=limit) as process:
        result = Result(process.wait(), *process.communicate())
    assert_error(result, 1, ["cannot store model.safetensors in", "cache", "File too large"])
    assert stored(tmp_path) == ["config.json", "merges.txt", "vocab.json"]


LLAMA = json.dumps({"model_type": "llama"}).encode()
OTHERS = {
    "pickled": {name: FILES[name] for name in NEEDED if name != "model.safetensors"},
    "llama": FILES | {"config.json": LLAMA},
    "empty": {},
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/nothing", ["there is no model folder someone/nothing, and no such name on"]),
        ("forbidden", ["does not give its config.json: HTTP status 403"]),
        ("gated", ["gated is gated: ask for access at http", "/gated", "hf auth login"]),
        ("pickled", ["has no model.safetensors", "pickles (pytorch_model.bin) are not loaded"]),
        ("llama", ["config.json: model_type is 'llama': only 'gpt2' is known"]),
        ("empty", ["empty on the Hub has no config.json"]),
        ("a/b/c", ["there is no model folder a/b/c"]),
        (".data", ["there is no model folder .data"]),
    ],
)
def test_what_the_hub_does_not_give_is_an_error_of_one_line(server, call, name, words):
    server.repositories |= OTHERS
    server.repositories["pickled"]["pytorch_model.bin"] = b"\x80\x04."
    assert_error(call(run.main, name), 1, words)
    assert not {"model.safetensors", "pytorch_model.bin"}.intersection(server.fetched())


def test_without_a_network_the_error_says_so_at_once(server, client, call, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = call(run.main, "gpt2")
    words = "there is no model folder gpt2, and http://127.0.0.1:9 does not give its config.json: "
    assert_error(result, 1, [words])
    client()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = call(run.main, "gpt2")
    assert_error(result, 1, ["there is no model folder gpt2", "lacks its", "HF_HUB_OFFLINE"])
    assert server.requests == []


def test_without_the_client_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"no model folder gpt2;.* pip install '\.\[gpt2\]'"):
        checkpoint.load("gpt2")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "a", "a_b/c.d-e", "x" * 96])
def test_a_name_on_the_hub_is_one(name):
    assert hub.is_name(Path(name))


@pytest.mark.parametrize(
    "path",
    ["/gpt2", "a/b/c", "..", ".data", "a--b", "a..b", "a.", "-a", "a.git", "größe", "a b", "a:b"],
)
def test_a_path_is_not_taken_for_a_name(path):
    assert not hub.is_name(Path(path))
