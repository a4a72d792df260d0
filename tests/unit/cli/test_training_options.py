"""How training is run, through the command line: profiles, workers, recomputed activations, other optimizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.made_rows import write_rows
from safetensors.torch import load_file
from test_commands import preference_rows

Srcfast = Callable[..., Result]
LOOP = ("dpo.micro_batch_size=2", "dpo.gradient_accumulation_steps=2", "lora.r=4", "dpo.learning_rate=1e-3")


@pytest.fixture
def tuned(srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path) -> Callable[..., tuple[Path, Result]]:
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(12, seed=2))

    def run(name: str, *words: str) -> tuple[Path, Result]:
        output = tmp_path / name
        options = ("--model", model_dir, "--data", data, "--image-root", image_root, "--output", output)
        result = srcfast("dpo", *options, *LOOP, *words)
        assert result.exit_code == 0, result.output
        return output, result

    return run


def weights(output: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(output / "adapter_model.safetensors").items())])


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_profiled_steps_are_written_beside_the_adapter_and_told(tuned: Callable[..., tuple[Path, Result]]) -> None:
    output, result = tuned("out", "--quiet", "--profile", "1:3")
    assert "2 steps in" in result.stdout and "gemm" in result.stdout and "host" in result.stdout
    assert {file.name for file in (output / "profile").iterdir()} == {"trace.json", "memory.json", "summary.json"}
    summary = json.loads((output / "profile" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2 and summary["shares"]["gemm"] > 0
    assert sum(summary["shares"].values()) == pytest.approx(1.0)


def test_steps_that_name_none_stop_before_anything_is_read(srcfast: Srcfast) -> None:
    result = srcfast("dpo", "--data", "nowhere.jsonl", "--output", "nowhere", "--profile", "5:2")
    assert result.exit_code == 2 and "--profile: expected the first step" in result.output


def test_workers_and_recomputing_change_nothing(tuned: Callable[..., tuple[Path, Result]]) -> None:
    plain, _ = tuned("plain", "dpo.activation_checkpointing=0")
    expected = weights(plain)
    for name, words in {
        "workers": ("dpo.loader_workers=2",),
        "recomputed": ("dpo.activation_checkpointing=1",),
    }.items():
        output, _ = tuned(name, *words)
        torch.testing.assert_close(weights(output), expected, rtol=0.0, atol=0.0)
    rows = metrics(plain)
    assert len(rows) == 3
    for row in rows:
        assert row["mfu"] > 0 and row["peak_memory_bytes"] > 1 << 20 and row["tokens_per_second"] > 0


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_another_optimizer_goes_where_adamw_goes(tuned: Callable[..., tuple[Path, Result]], optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain, other = (metrics(tuned(name, f"dpo.optimizer={name}")[0]) for name in ("adamw", optimizer))
    assert other[0]["loss"] == plain[0]["loss"]
    # Moments of 8 bits: a few per cent of an update.
    moved = plain[-1]["margin"] - plain[0]["margin"]
    assert abs(moved) > 1e-4
    assert other[-1]["margin"] - other[0]["margin"] == pytest.approx(moved, rel=0.2)
