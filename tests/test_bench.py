import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.skipif(
    "GPT_TINY_BENCH" not in os.environ, reason="takes a minute: .ci/run asks for it"
)
def test_the_small_bench_measures_every_row(tmp_path):
    commands = [
        [BENCH / "bench.py", "--small", "--json", "start*warm"],
        [BENCH / "accelerator.py", "--small", "--json"],
        [
            BENCH / "bench.py",
            "--small",
            "--json",
            "train*",
            "busy-1*",
            "muon*",
            "generate*",
            "first-token",
            "run",
        ],
    ]
    environment = os.environ | {"DEV": "CPU"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
        )
        for command in commands
    ]
    results = [json.loads(process.communicate()[0]) for process in processes]
    lines = [line for result in results for line in result["lines"]]
    assert {line["row"] for line in lines} == {
        "train-small-dropout",
        "train-small-no-dropout",
        "busy-1-small",
        "muon-small",
        "float32-plain",
        "float32-beam",
        "bfloat16-plain",
        "bfloat16-beam",
        "start-small-warm",
        "generate-float32",
        "generate-half",
        "generate-past",
        "generate-stride",
        "first-token",
        "run",
    }
    for line in lines:
        assert line["ours"]["figure"] > 0, line
        assert line["ours"]["memory"] > 0, line
        if line["peer"]:  # has no figure where PyTorch isn't installed
            assert line["peer"]["figure"] or line["peer"]["note"], line
    assert results[2]["versions"]["tinygrad"]
