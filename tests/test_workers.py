"""Data-parallel training over MPI: losses, equal parameters, signals, devices and its end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
from conftest import ROOT
from tinygrad import Context, Device

import train
from backend.arrays import FlatBuffer
from gpt_tiny import GPTConfig
from models import checkpoint
from training import checkpoint as training_checkpoint
from training import launch, workers
from training.checks import check_batch_size
from training.config import TrainingConfig, changed
from training.trainer import Trainer

pytest.importorskip("mpi4py", reason="training with workers needs the extra mpi")

MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
TIMEOUT = 120  # seconds, far beyond any run of these tests
# validation batches hold two windows for any number of workers: all share a jit
TINY = ["-d", "8", "-l", "1", "-h", "2", "-c", "8", "-b", "8", "--validation-size", "22"]
TINY += ["--dropout", "0"]  # masks differ between workers
TEXT = ROOT / "README.md"


def start(folder: Path, *words: str) -> subprocess.Popen:
    return conftest.start(folder, *words, env=os.environ | {"DEV": "CPU"})


def train_ranks(
    folder: Path,
    n_workers: int,
    *words: str,
    launcher: list[str] | None = None,
    text: Path | str = TEXT,
    stdin=None,
) -> list[dict]:
    """Runs tests/ranks.py and returns the record of each rank: losses, checksum and device."""
    launcher = launcher or [MPIEXEC, "-n", str(n_workers)]
    words = [*TINY, "-x", "-n", "1", "-t", text, *words]
    command = [*launcher, sys.executable, ROOT / "tests/ranks.py", *words]
    options = {"stdin": stdin, "cwd": folder, "timeout": TIMEOUT}
    run = subprocess.run(command, capture_output=True, text=True, **options)
    assert run.returncode == 0, run.stderr + run.stdout
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(n_workers)]


@pytest.fixture(scope="module")
def mpi() -> None:
    """Skips if mpiexec can't start processes: in some sandboxes, or without a host name."""
    code = "from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"
    command = [MPIEXEC, "-n", "2", sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if run.returncode:
        pytest.skip(f"MPI does not work on this machine: {run.stderr}")


@pytest.fixture(scope="module")
def losses(mpi, tmp_path_factory) -> list[float]:
    """Training losses of the first 50 batches with one worker."""
    return train_ranks(tmp_path_factory.mktemp("one"), 1)[0]["losses"]


@pytest.mark.parametrize(("n_workers", "text"), [(2, TEXT), (4, "-")])
def test_workers_give_the_losses_of_one_and_equal_parameters(tmp_path, losses, n_workers, text):
    assert len(losses) == 50
    with TEXT.open() as stdin:
        records = train_ranks(tmp_path, n_workers, text=text, stdin=stdin)
    for record in records:
        np.testing.assert_allclose(record["losses"], losses, rtol=0, atol=1e-5)
        assert record["device"] == "CPU"
    assert len({record["checksum"] for record in records}) == 1


def test_workers_with_muon_and_accumulation_give_the_losses_of_one(tmp_path, mpi):
    words = ["--optimizer", "muon", "--grad-clip", "1"]
    [single] = train_ranks(tmp_path, 1, *words)
    records = train_ranks(tmp_path, 2, *words, "--accumulate", "2")
    for record in records:
        np.testing.assert_allclose(record["losses"], single["losses"], rtol=0, atol=1e-4)
    assert len({record["checksum"] for record in records}) == 1


def test_workers_split_each_batch_and_have_distinct_dropout_keys():
    config = changed(TrainingConfig(), {"batch_size": 8, "accumulate": 2, "batches_per_step": 3})
    corpus = SimpleNamespace(
        n_training=100, windows=lambda starts, n: np.arange(n) + starts[:, None]
    )
    optimizer, world = SimpleNamespace(rates=lambda n: [n]), workers.World()
    parts = {"config": config, "corpus": corpus, "optimizer": optimizer, "world": world}

    def plan() -> list[np.ndarray]:
        tensors = Trainer.make_plan(SimpleNamespace(**parts), 0, np.random.default_rng(0))
        return [tensor.numpy() for tensor in tensors]

    [windows, _, rates], world.size = plan(), 2
    [first_windows, first_keys, first_rates], world.rank = plan(), 1
    second_windows, second_keys, second_rates = plan()
    np.testing.assert_array_equal(np.concatenate([first_windows, second_windows], 1), windows)
    assert len({*first_keys.ravel(), *second_keys.ravel()}) == 3 * 2 * 2  # batches, parts, workers
    assert rates.tolist() == first_rates.tolist() == second_rates.tolist()


HOSTS = [f"tiny_{name}_{os.getpid()}" for name in "ab"]  # names of network namespaces


def link_hosts() -> list[str] | None:
    """Creates two linked network namespaces and returns the command that enters the first; None
    without the permission."""
    commands = """
        ip netns add {0}
        ip netns add {1}
        ip link add wire netns {0} type veth peer name wire netns {1}
        ip -n {0} link set wire addrgenmode none
        ip -n {1} link set wire addrgenmode none
        ip -n {0} addr add 10.77.0.1/24 dev wire
        ip -n {1} addr add 10.77.0.2/24 dev wire
        ip -n {0} link set wire up
        ip -n {1} link set wire up
        ip -n {0} link set lo up
        ip -n {1} link set lo up"""
    for command in commands.format(*HOSTS).strip().splitlines():
        if subprocess.run(command.split(), capture_output=True).returncode:
            return None
    deadline = time.monotonic() + TIMEOUT
    for name in HOSTS:  # UCX takes no link that Linux calls down, for up to a second
        command = ["ip", "-n", name, "link", "show", "wire"]
        while b"state UP" not in subprocess.run(command, capture_output=True).stdout:
            assert time.monotonic() < deadline, "the link between the hosts stays down"
    return ["ip", "netns", "exec", HOSTS[0]]


@pytest.fixture
def namespaces():
    """Command prefix that enters the first host."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2")
    try:
        enter = link_hosts()
        if enter is None:
            pytest.skip("network namespaces need root")
        yield enter
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def count_received_bytes(enter: list[str]) -> int:
    statistics = ["cat", "/sys/class/net/wire/statistics/rx_bytes"]
    return int(subprocess.run([*enter, *statistics], capture_output=True, check=True).stdout)


def test_two_machines_give_the_losses_of_one(tmp_path, losses, namespaces):
    shell = tmp_path / "shell"  # in place of ssh: enters the host's namespace
    shell.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != 10.77.0.1 ] && [ "$1" != 10.77.0.2 ]; do shift; done\n'
        f"case $1 in *.1) name={HOSTS[0]};; *) name={HOSTS[1]};; esac; shift\n"
        'exec ip netns exec $name sh -c "$*"\n'
    )
    shell.chmod(0o755)
    hosts = ["-hosts", "10.77.0.1,10.77.0.2", "-ppn", "1", "-launcher", "ssh"]
    launcher = [*namespaces, MPIEXEC, "-n", "2", *hosts, "-launcher-exec", str(shell)]
    # TCP only: two machines share no memory
    launcher += ["-genv", "UCX_TLS", "tcp,self", "-genv", "UCX_NET_DEVICES", "wire"]
    before = count_received_bytes(namespaces)
    records = train_ranks(tmp_path, 2, launcher=launcher)
    for record in records:
        np.testing.assert_allclose(record["losses"], losses, rtol=0, atol=1e-5)
    n_bytes = 100 * 4 * GPTConfig(8, 104, 1, 2, 8, 32).n_parameters
    assert count_received_bytes(namespaces) - before > n_bytes / 2


def test_gradients_in_gpu_memory_are_summed_in_one_message():
    class Ranks:
        messages = 0

        def Allreduce(self, in_place, array):
            self.messages += 1
            array *= 2

    world, buffer = workers.World(), FlatBuffer({"ones": (2, 3), "numbers": (5,)})
    world.size, world.ranks, world.mpi = 2, Ranks(), SimpleNamespace(IN_PLACE=None)
    buffer.write({"ones": np.ones((2, 3)), "numbers": np.arange(5)})
    buffer.memory = None  # as on a GPU
    buffer.apply_in_place(world.all_reduce)
    ones, numbers = buffer.read().values()
    assert np.all(ones == 2) and ones.shape == (2, 3)
    np.testing.assert_array_equal(numbers, 2 * np.arange(5))
    assert world.ranks.messages == 1


def test_each_worker_of_a_machine_takes_another_gpu_and_a_share_of_the_cores(monkeypatch):
    numbers = {name: SimpleNamespace(value=8) for name in ("NUM_CPU_THREADS", "PARALLEL")}
    chosen = SimpleNamespace(value=[])
    for name, variable in (numbers | {"DEV": chosen}).items():
        monkeypatch.setattr(workers, name, variable)
    monkeypatch.setattr(workers.devices, "in_use", lambda: "CUDA")
    monkeypatch.setattr(workers.devices, "check", lambda: None)
    world = workers.World()
    world.size = world.n_on_machine = 4
    world.machine_ranks = SimpleNamespace(
        rank=3, allgather=lambda _: [{0, 1, 2, 3}, {4, 5, 6, 7}], bcast=lambda _: "CUDA"
    )
    world.take_device()
    assert chosen.value[0].device == "CUDA:3"
    assert {variable.value for variable in numbers.values()} == {2}


def test_a_worker_opens_only_its_gpu(tmp_path, mpi):
    code = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import train
from pathlib import Path
from tinygrad import Device
def note(config, tokenizer, world):
    Path(str(world.rank)).write_text(" ".join(Device._opened_devices))
    sys.exit()
train.read_corpus = note
train.main()
"""
    command = [MPIEXEC, "-n", "2", sys.executable, "-c", code, "-x", "--workers", "auto"]
    environment = os.environ | {"ROOT": str(ROOT), "DEV": "NULL"}  # a GPU that does nothing
    options = {"env": environment, "cwd": tmp_path, "timeout": TIMEOUT}
    run = subprocess.run(command, capture_output=True, text=True, **options)
    assert run.returncode == 0, run.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["NULL", "NULL:1"]


def test_auto_is_one_worker_for_devices_without_numbers(monkeypatch):
    monkeypatch.setenv("DEV", "NULL")
    with Context(DEV="NULL"):
        assert launch.count_workers("auto") == 1
    assert "NULL" not in Device._opened_devices  # left for the workers to open


def test_auto_is_one_worker_per_gpu(tmp_path, monkeypatch):
    (tmp_path / "tinygrad.py").write_text(
        "class Devices:\n"
        "    DEFAULT = device = 'CUDA'\n"
        "    count = lambda self: 3\n"
        "    __getitem__ = lambda self, _: self\n"
        "Device = Devices()\n"
        "print('opened device CUDA from pid:1')  # with DEBUG=1\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Context(DEV="CUDA"):
        assert launch.count_workers("auto") == 3


def test_an_indivisible_batch_is_refused_with_sizes_that_fit():
    config = TrainingConfig(batch_size=12, accumulate=2)
    check_batch_size(config, 3)
    with pytest.raises(
        ValueError, match="--batch-size 12 can't be shared by 4 workers: try 8 or 16"
    ):
        check_batch_size(config, 4)


def test_without_mpi4py_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"--workers 2 needs MPI: pip install '\.\[mpi\]'"):
        launch.launch(2, ["train.py"])


def test_mpiexecs_banner_is_removed_however_reads_split_it():
    before, banner = b"step 1\n== a ==\n\n", launch.BANNER + b"==\n=   BAD TERMINATION\n"
    for step in (1, 2, 3, 30, 100):
        data = before + banner
        chunks = iter([data[i : i + step] for i in range(0, len(data), step)] + [b""])
        shown = b""
        for text, is_banner in launch.split_at_banner(chunks.__next__):
            shown += text
            if is_banner:
                break
        assert is_banner and shown.rstrip() == before.rstrip()


def test_output_of_workers_is_passed_on_line_by_line():
    chunks = [b"step 1\n", b"\n", b"=", b"= 2\n===", b"\n" + 39 * b"=", b""]
    parts = list(launch.split_at_banner(iter(chunks).__next__))
    assert b"".join(text for text, _ in parts) == b"".join(chunks)
    assert parts[0] == (b"step 1\n", False) and not any(banner for _, banner in parts)


def test_without_workers_mpi_is_not_imported():
    code = "import sys, train; train.World(); print('mpi4py' in sys.modules)"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def newest(folder: Path) -> training_checkpoint.Checkpoint:
    return training_checkpoint.load(folder / ".data/checkpoints", train.make_parser().parse_given)


def wait_for(training: subprocess.Popen, text: str) -> str:
    while text not in (line := training.stdout.readline()):
        assert line, training.stderr.read()
    return line


def status_of(pid: int | str) -> tuple[str, int] | None:
    """State and parent id of a process; None if it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return state, int(parent)
    except OSError:
        return None


def descendants(training: subprocess.Popen) -> list[int]:
    """Process ids of mpiexec, its proxy, the ranks and their children."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    found = [training.pid]
    for pid in found:
        found += [p for p in pids if (status := status_of(p)) and status[1] == pid]
    return found[1:]


def wait_for_end(processes: list[int]) -> None:
    """Asserts that the processes end within 10 s: some end after their launcher."""
    deadline = time.monotonic() + 10
    while any((status := status_of(pid)) and status[0] != "Z" for pid in processes):
        assert time.monotonic() < deadline, processes


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_interrupted_or_killed_workers_end_and_resume_with_another_number(tmp_path, mpi):
    words = [*TINY, "-n", "1000", "--checkpoint-every", "1"]
    training = start(tmp_path, *words, "--workers", "2")
    wait_for(training, "step   1/")
    processes = descendants(training)
    training.send_signal(signal.SIGINT)
    out, err = training.communicate(timeout=TIMEOUT)
    assert training.returncode == 130 and "Traceback" not in err
    assert out.count("interrupted; to go on") == 1
    wait_for_end(processes)

    resume = ["--resume", ".data/checkpoints"]
    resumed = start(tmp_path, *resume, "--workers", "4")
    first = int(re.search(r"step +(\d+)/", wait_for(resumed, "step ")).group(1))
    wait_for(resumed, "store checkpoint")
    processes = descendants(resumed)
    [launcher] = [p for p in processes if "proxy" in Path(f"/proc/{p}/cmdline").read_text()]
    ranks = [p for p in processes if status_of(p)[1] == launcher]
    os.kill(ranks[-1], signal.SIGKILL)
    out, err = resumed.communicate(timeout=TIMEOUT)
    assert resumed.returncode == 1
    assert err.splitlines()[-1].startswith("error: a worker was killed") and "Trace" not in err
    wait_for_end(processes)

    single = start(tmp_path, *resume)
    assert int(re.search(r"step +(\d+)/", wait_for(single, "step ")).group(1)) > first
    single.kill()
    single.communicate()


@pytest.mark.parametrize(("n_steps", "number", "status"), [(3, 0, 0), (1000, signal.SIGINT, 130)])
def test_workers_go_on_without_a_reader_of_their_output(tmp_path, mpi, n_steps, number, status):
    words = [*TINY, "-n", str(n_steps), "-o", "model", "--workers", "2"]
    training = start(tmp_path, *words)
    wait_for(training, "step   1/")
    training.stdout.close()
    training.stderr.close()
    training.send_signal(number)
    assert training.wait(timeout=TIMEOUT) == status
    if number:
        assert newest(tmp_path).progress.step >= 1
    else:
        checkpoint.load(tmp_path / "model")


def test_a_corpus_that_differs_between_machines_is_refused(tmp_path, mpi):
    for rank, text in enumerate(("abc ", "abd ")):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "text.txt").write_text(text * 500)
    code = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import command_line, train
from training import workers
os.chdir(os.environ["PMI_RANK"])  # another folder on each machine
workers.World.broadcast_on_machine = lambda world, make: make()
command_line.run(train.main)
"""
    command = [MPIEXEC, "-n", "2", sys.executable, "-c", code, *TINY, "-x", "-t", "text.txt"]
    options = {"env": os.environ | {"ROOT": str(ROOT)}, "cwd": tmp_path, "timeout": TIMEOUT}
    run = subprocess.run(command, capture_output=True, text=True, **options)
    assert run.returncode == 1 and not run.stdout
    assert re.search(r"^error: rank 1 on \S+ has another corpus than rank 0$", run.stderr, re.M)
