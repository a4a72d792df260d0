"""torchrun as users start it: over two nodes, and with the words of the rank that failed first."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import SETTINGS, STAGES, finished_stages

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# On rank 1 alone the data can't be read: rank 0 waits for it, and ends with an error of its own.
ONE_RANK_FAILS = """
import os, sys
from srcfast import calibrate
from srcfast.cli import app
from srcfast.errors import InputError

def unreadable(*arguments):
    raise InputError(file="train.jsonl", line=7, expected="JSON", found="a hole in the disk")

if os.environ["RANK"] == "1":
    calibrate.read_training_samples = unreadable
app(sys.argv[1:])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SETTINGS, encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_calibration_runs_over_two_nodes_as_torchrun_starts_them(config: Path, tmp_path: Path) -> None:
    where = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    words = ["-m", "srcfast", "calibrate", str(config), f"output={tmp_path}"]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *where, "--rdzv-id=two-nodes", *words],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    told = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert sorted("page: " in one for one in told) == [False, True], "one rank of the two speaks"
    assert tuple(finished_stages(tmp_path / "small")) == STAGES
    assert (tmp_path / "small" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_the_error_of_the_rank_that_failed_is_the_one_shown(config: Path, tmp_path: Path) -> None:
    script = tmp_path / "one_rank_fails.py"
    script.write_text(ONE_RANK_FAILS, encoding="utf-8")
    words = [str(script), "calibrate", str(config), f"output={tmp_path}"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    _, _, root_cause = done.stderr.partition("Root Cause")
    assert "rank      : 1 " in root_cause, done.stderr[-4000:]
    assert "train.jsonl, line 7: expected JSON, found a hole in the disk" in root_cause
    assert "srcfast rank 1: train.jsonl, line 7: expected JSON" in done.stderr
