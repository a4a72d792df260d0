"""What torchrun says is checked before anything relies on it; a GPU that PyTorch can't use is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch

from srcfast import distributed
from srcfast.config.load import load_config
from srcfast.errors import ConfigError
from srcfast.launch import Launch, read_launch

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_without_torchrun_a_process_is_alone() -> None:
    assert read_launch({"PATH": "/bin"}) == Launch(0, 1, 0, False)
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: expected a whole number from 1 to .*'abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "\u0664"}, "WORLD_SIZE"),  # a digit, but none of ASCII
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"),
        ({"RANK": "4"}, "RANK: expected a whole number from 0 to 3"),
        ({"RANK": "x"}, "RANK"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: expected a whole number from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE: expected a whole number from 1 to 4"),
        ({"MASTER_PORT": "66000"}, "MASTER_PORT"),
        ({"MASTER_ADDR": None}, "found no MASTER_ADDR"),
        ({"RANK": None}, "found no RANK"),
        (
            {"RANK": None, "LOCAL_RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None, "TORCHELASTIC_RUN_ID": None},
            "WORLD_SIZE=4",
        ),
        (
            dict.fromkeys([name for name in TORCHRUN if name != "TORCHELASTIC_RUN_ID"]),
            "TORCHELASTIC_RUN_ID: expected RANK",
        ),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(changes: dict[str, str | None], named: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=named):
        read_launch(environment)


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2"}, {"TORCHELASTIC_RUN_ID": "x"}, {"RANK": "7"}]
)
def test_a_command_says_so_without_a_trace(variables: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN} | variables
    result = subprocess.run(
        [sys.executable, "-m", "srcfast", "config"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and next(iter(variables)) in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("device", ["meta", "cuda:", "cuda:-1", "CUDA", "gpu", "cuda:1000", "cpu:0 ", "mps", ""])
def test_a_device_that_is_none_of_ours_is_refused_with_the_settings(device: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.device"):
        load_config(None, [f"model.device={json.dumps(device)}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined() -> None:
        with distributed.process_group(timedelta(seconds=5), "cuda"):
            pytest.fail("it went on")

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"model\.device.*built without CUDA.*Fix.*model\.device=cpu"):
        joined()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=r"model\.device.*no GPU that PyTorch sees.*nvidia-smi"):
        joined()


def test_a_gpu_of_a_number_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 2)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    match: Any = r"found 2 GPUs.*cuda:0 to cuda:1"
    with pytest.raises(ConfigError, match=match), distributed.process_group(timedelta(seconds=5), "cuda:2"):
        pytest.fail("it went on")
    with distributed.process_group(timedelta(seconds=5), "cuda:1"):
        pass
