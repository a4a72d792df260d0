"""What NCCL is told, by stand-ins for it and for a device: where a rank is away, gloo says so first, and by its number."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.rank_processes import run_ranks, values_of, wait_until_ended

from srcfast import distributed

SHORT = timedelta(seconds=3)


def test_nccl_gives_up_a_minute_behind_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, timedelta] = {}

    def of_all(timeout: timedelta, group: Any) -> None:  # as torch sets it: of every backend
        told.update(cpu=timeout, cuda=timeout)

    def of_one(device: torch.device) -> Any:
        return SimpleNamespace(_set_default_timeout=lambda timeout: told.update({device.type: timeout}))

    monkeypatch.setattr(distributed, "_set_pg_timeout", of_all)
    monkeypatch.setattr(distributed, "_get_default_group", lambda: SimpleNamespace(_get_backend=of_one))
    monkeypatch.setattr(distributed, "_has_nccl", True)
    monkeypatch.setattr(distributed, "_timeout", distributed.START_TIMEOUT)
    monkeypatch.setattr(distributed, "_timeout_after_start", SHORT)
    distributed.end_startup_timeout()
    assert told == {"cpu": SHORT, "cuda": SHORT + timedelta(minutes=1)}


def sum_on_a_device(folder: Path) -> list[bool]:
    """The first sum of a stand-in for a tensor on a GPU, to which rank 2 comes late or never; whether all were there."""
    distributed.barrier()
    distributed.end_startup_timeout()
    seen = []

    def connect(tensor: Any, async_op: bool) -> Any:
        seen.append(all(distributed._counter(f"arrived/{other}") >= 4 for other in range(3)))
        return SimpleNamespace(wait=lambda: None)

    distributed.dist.all_reduce = connect  # this process ends with the test
    if distributed.rank() == 2:
        time.sleep(0.5) if folder.name == "late" else wait_until_ended(folder, 0)
    distributed.all_reduce_async(SimpleNamespace(is_cuda=True))()  # type: ignore[arg-type]
    distributed.barrier()  # rank 0 holds the store that the others ask
    return seen


def test_nccl_connects_only_once_all_ranks_have_come(tmp_path: Path) -> None:
    (late := tmp_path / "late").mkdir()
    assert values_of(run_ranks(3, sum_on_a_device, late)) == [[True]] * 3
    (never := tmp_path / "never").mkdir()
    here = run_ranks(3, sum_on_a_device, never, SHORT)[0]  # which holds the store, and so can always name
    assert "timed out waiting for rank 2:" in here["error"]


def wait_for_a_device(folder: Path) -> float:
    """A device is busy for half a second, then for ever but on rank 1, which does not come to the exchange behind it."""
    distributed.barrier()
    distributed.end_startup_timeout()
    began = time.monotonic()
    distributed.wait_for(SimpleNamespace(query=lambda: time.monotonic() > began + 0.5))  # type: ignore[arg-type]
    took = time.monotonic() - began
    if folder.name == "never":
        if distributed.rank() == 1:
            wait_until_ended(folder, 0)
        distributed._arrive()
        distributed.wait_for(SimpleNamespace(query=lambda: False))  # type: ignore[arg-type]
    return took


def test_a_device_that_waits_for_another_rank_s_is_waited_for_no_longer_than_a_rank(tmp_path: Path) -> None:
    (well := tmp_path / "well").mkdir()
    assert min(values_of(run_ranks(2, wait_for_a_device, well, SHORT))) > 0.5
    (never := tmp_path / "never").mkdir()
    here = run_ranks(2, wait_for_a_device, never, SHORT)[0]
    assert "timed out waiting for rank 1:" in here["error"] and "the device is still busy" in here["error"]
