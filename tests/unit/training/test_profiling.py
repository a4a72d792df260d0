"""Profiles of chosen steps: what is written, and how time is divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_model import SmallModel
from test_training import SETTINGS, response_items

from srcfast.config.settings import LoRAConfig
from srcfast.errors import ConfigError
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training.items import Objective
from srcfast.training.loop import train
from srcfast.training.profiler import StepProfiler, allocations, parse_steps, summarise


def span(name: str, start: float, duration: float, category: str = "cpu_op", thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": thread}


def test_a_cpu_s_time_is_each_operator_s_own_and_the_rest_the_host_s() -> None:
    events = [
        span("_LoRALinears", 0.0, 50.0),
        span("aten::mm", 10.0, 20.0),
        span("aten::mul", 30.0, 15.0),  # within a function of the house: its elementwise work
        span("aten::bmm", 60.0, 10.0),
        span("aten::add", 80.0, 20.0),
        span("aten::copy_", 85.0, 5.0),
        {"ph": "i", "name": "[memory]", "ts": 3.0, "args": {"Bytes": 64}},
    ]
    found = summarise(events, 1)
    assert found.seconds == pytest.approx(100e-6)
    expected = {"gemm": 0.2, "attention": 0.1, "srcfast": 0.3, "other": 0.2, "host": 0.2}
    assert found.shares == pytest.approx(expected)
    assert found.operations[0][0] == "aten::mm" and found.operations[0][1] == pytest.approx(20e-6)
    assert dict((name, spent) for name, spent, _ in found.operations)["_LoRALinears"] == pytest.approx(15e-6)


def test_a_gpu_s_time_is_its_kernels_and_what_it_waited_the_host_s() -> None:
    events = [
        span("aten::mm", 0.0, 5.0),
        span("nvjet_tst_128x256_64x4", 10.0, 30.0, "kernel", thread=7),
        span("flash_fwd_kernel<...>", 40.0, 20.0, "kernel", thread=7),
        span("rms_norm_kernel", 60.0, 10.0, "kernel", thread=7),
        span("void at::native::vectorized_elementwise_kernel<4>", 80.0, 10.0, "kernel", thread=7),
        span("Memcpy HtoD", 80.0, 10.0, "gpu_memcpy", thread=8),  # beside it, on another stream
        span("cudaLaunchKernel", 90.0, 10.0, "cuda_runtime"),
    ]
    found = summarise(events, 2)
    # 70 of 100 microseconds are busy; in ten of them two things run, which share what there is.
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.shares["host"] == pytest.approx(0.3)
    assert found.shares["gemm"] / found.shares["attention"] == pytest.approx(1.5)
    assert found.shares["srcfast"] / found.shares["gemm"] == pytest.approx(1 / 3)
    assert found.shares["other"] / found.shares["gemm"] == pytest.approx(2 / 3)
    assert "2 steps" in found.text() and "nvjet_tst_128x256_64x4" in found.text()


def test_the_steps_that_are_named_are_profiled_and_written(tmp_path: Path) -> None:
    profiler = StepProfiler(parse_steps("1:3"), tmp_path / "profile")
    model = SmallModel(dtype=torch.float32, lora=LoRAConfig(r=3, alpha=32.0))
    seen = []
    train(
        model,
        response_items(40),
        objective=Objective(rationale_loss, response_tokens),
        settings=SETTINGS,
        on_step=lambda metrics: seen.append((metrics["step"], profiler.summary is not None)),
        profiler=profiler,
    )
    assert seen == [(0, False), (1, False), (2, False), (3, True), (4, True)]
    assert profiler.summary is not None and profiler.summary.steps == 2
    shares = profiler.summary.shares
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0.0
    events = json.loads((tmp_path / "profile" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    # One backward and one update a step.
    updates = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step#")]
    assert len(updates) == 2
    memory = json.loads((tmp_path / "profile" / "memory.json").read_text(encoding="utf-8"))
    taken = [row for row in memory["allocations"] if row["bytes"] > 0]
    assert len(taken) > 100 and max(row["bytes"] for row in taken) >= 37 * 4
    summary = json.loads((tmp_path / "profile" / "summary.json").read_text(encoding="utf-8"))
    assert summary["shares"] == pytest.approx(shares) and summary["operations"][0][1] > 0


def test_a_run_that_ends_before_is_profiled_at_its_end(tmp_path: Path) -> None:
    profiler = StepProfiler(range(3, 6), tmp_path)
    train(
        SmallModel(lora=LoRAConfig(r=3, alpha=32.0)),
        response_items(16),
        objective=Objective(rationale_loss, response_tokens),
        settings=SETTINGS,
        profiler=profiler,
    )
    assert profiler.summary is not None and profiler.summary.steps == 2  # all that there are


def test_allocations_are_told_in_the_order_of_time() -> None:
    rows = [
        {"ph": "i", "name": "[memory]", "ts": 5.0, "args": {"Bytes": -64, "Addr": 1, "Total Allocated": 0}},
        {"ph": "i", "name": "[memory]", "ts": 3.0, "args": {"Bytes": 64, "Addr": 1, "Total Allocated": 64}},
        span("aten::mm", 0.0, 5.0),
    ]
    assert [(row["bytes"], row["total_bytes"]) for row in allocations(rows)] == [(64, 64), (-64, 0)]


@pytest.mark.parametrize("text", ["3", "6:3", "4:4", "a:b", "-1:2", "1:2:3"])
def test_steps_that_name_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--profile: expected the first step"):
        parse_steps(text)


@pytest.mark.gpu
@pytest.mark.timing
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_s_profile_holds_its_kernels_and_the_allocator_s_history(tmp_path: Path) -> None:
    profiler = StepProfiler(range(1, 3), tmp_path)
    train(
        SmallModel(dtype=torch.float32, lora=LoRAConfig(r=3, alpha=32.0)).cuda(),
        response_items(40),
        objective=Objective(rationale_loss, response_tokens),
        settings=SETTINGS,
        profiler=profiler,
    )
    assert profiler.summary is not None and profiler.summary.shares["srcfast"] > 0
    memory = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    assert memory["segments"] and memory["device_traces"]
