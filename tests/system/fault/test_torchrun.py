"""torchrun as users start it: over two nodes, and with the words of the rank that failed first."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_run import SETTINGS, STAGES, finished_stages

from srcfast import distributed
from srcfast.errors import ConfigError
from srcfast.launch import read_launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LIMIT = 600.0  # seconds, on a busy machine
# On rank 1 alone the data can't be read: rank 0 waits for it, and ends with an error of its own.
ONE_RANK_FAILS = """
import os, sys
from srcfast.stages import calibration_run
from srcfast.cli.app import app
from srcfast.errors import InputError

def unreadable(*arguments):
    raise InputError(file="train.jsonl", line=7, expected="JSON", found="a hole in the disk")

if os.environ["RANK"] == "1":
    calibration_run.read_training_samples = unreadable
app(sys.argv[1:])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(SETTINGS, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def over_two_nodes(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The output of a calibration that two launches of torchrun made together, under umask 077; what each launch said."""
    output = tmp_path_factory.mktemp("nodes")
    where = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = [*TORCHRUN, *where, "--rdzv-id=two-nodes", "-m", "srcfast", "calibrate", str(config), f"output={output}"]
    nodes = [
        subprocess.Popen(
            command, env=ENVIRONMENT, umask=0o077, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    told = [node.communicate(timeout=LIMIT)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    return output, told


@pytest.mark.slow
def test_a_calibration_runs_over_two_nodes_as_torchrun_starts_them(over_two_nodes: tuple[Path, list[str]]) -> None:
    output, told = over_two_nodes
    assert sorted("page: " in one for one in told) == [False, True], "one rank of the two speaks"
    assert tuple(finished_stages(output / "small")) == STAGES
    assert (output / "small" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_no_file_of_a_run_is_open_to_others_than_the_umask_says(over_two_nodes: tuple[Path, list[str]]) -> None:
    output, _ = over_two_nodes
    modes = {path.relative_to(output): stat.S_IMODE(path.stat().st_mode) for path in output.rglob("*")}
    assert len(modes) > 50 and Path("small/.lock") in modes and Path("small/report/index.html") in modes
    assert {path: oct(mode) for path, mode in modes.items() if mode not in (0o600, 0o700)} == {}
    assert all(mode == 0o700 for path, mode in modes.items() if (output / path).is_dir())


@pytest.mark.slow
def test_the_error_of_the_rank_that_failed_is_the_one_shown(config: Path, tmp_path: Path) -> None:
    script = tmp_path / "one_rank_fails.py"
    script.write_text(ONE_RANK_FAILS, encoding="utf-8")
    words = [str(script), "calibrate", str(config), f"output={tmp_path}"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode != 0
    _, _, root_cause = done.stderr.partition("Root Cause")
    assert "rank      : 1 " in root_cause, done.stderr[-4000:]
    assert "train.jsonl, line 7: expected JSON, found a hole in the disk" in root_cause
    assert "srcfast rank 1: train.jsonl, line 7: expected JSON" in done.stderr


def test_a_rank_takes_the_gpu_of_its_place_on_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 11 of two nodes with 8 GPUs each is the fourth of its node."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "8"}
    launch = read_launch({"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", **where})
    distributed._take_gpu("cuda", launch.local_rank)
    assert taken == [3]
    with pytest.raises(ConfigError, match=r"at most as many ranks on a node as it has GPUs \(8\).*--nproc-per-node=8"):
        distributed._take_gpu("cuda", 8)
