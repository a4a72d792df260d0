"""Numbers that lie, as a user meets them: each command ends by name, and what it tells to do can be done as it stands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers.made_rows import preference_rows, write_rows

from srcfast.config.settings import LoRAConfig
from srcfast.models import load_lvlm
from srcfast.models.lora import save_adapter

Srcfast = Callable[..., Result]
LOOP = ("lora.r=4", "micro_batch_size=2", "gradient_accumulation_steps=1", "--quiet")


@pytest.fixture
def dpo(srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path) -> Callable[..., Result]:
    """DPO of four pairs, of which the third has these fields."""

    def run(output: Path, *words: str, **fields: object) -> Result:
        rows = preference_rows(4, seed=5)
        rows[2] |= fields
        files = ("--data", write_rows(tmp_path / "pairs.jsonl", rows), "--image-root", image_root, "--output", output)
        return srcfast("dpo", "--model", model_dir, *files, *LOOP, *words)

    return run


def test_a_stored_log_probability_above_0_is_refused(dpo: Callable[..., Result], tmp_path: Path) -> None:
    result = dpo(tmp_path / "out", reference_chosen_logprob=0.25, reference_rejected_logprob=-9.0)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "reference_chosen_logprob" in result.output and "found 0.25" in result.output and "Fix" in result.output
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_margin_before_the_first_update_is_refused(dpo: Callable[..., Result], tmp_path: Path) -> None:
    result = dpo(tmp_path / "out", reference_chosen_logprob=-9000.0, reference_rejected_logprob=-9.0)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert re.search(
        r"p2: before the first update.*reference_chosen_logprob is stored as -9000 and is -.*Fix: compute the reference again",
        " ".join(result.output.split()),
    )
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_stored_references_that_are_the_policy_s_are_taken(
    dpo: Callable[..., Result], srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    pair = preference_rows(4, seed=5)[2]
    asked = [
        {"images": pair["images"], "prompt": pair["prompt"], "response": pair[side]} for side in ("chosen", "rejected")
    ]
    files = ("--data", write_rows(tmp_path / "asked.jsonl", asked), "--image-root", image_root)
    told = srcfast("logprob", "--model", model_dir, *files, "--output", tmp_path / "told.jsonl", "--quiet")
    assert told.exit_code == 0, told.output
    chosen, rejected = (json.loads(line)["logprob"] for line in (tmp_path / "told.jsonl").read_text().splitlines())
    result = dpo(tmp_path / "out", reference_chosen_logprob=chosen, reference_rejected_logprob=rejected)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["references_computed"] == 3


@pytest.mark.parametrize("command", ["evaluate", "candidates", "logprob", "merge"])
def test_an_adapter_that_changes_nothing_is_refused_wherever_it_is_used(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path, command: str
) -> None:
    save_adapter(load_lvlm(model_dir, lora=LoRAConfig(r=2, alpha=32.0)), tmp_path / "adapter")
    row = {"id": "a", "images": ["a.png"], "question": "what", "answer": "red", "prompt": "what", "response": "red"}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    files = () if command == "merge" else ("--data", data, "--image-root", image_root, "--quiet")
    options = ("--model", model_dir, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")
    result = srcfast(command, *options, *files)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert (
        "adapter_model.safetensors" in result.output and "expected an adapter that changes the model" in result.output
    )
    assert not list((tmp_path / "out").rglob("*.safetensors")) + list((tmp_path / "out").rglob("*.jsonl"))


def test_the_command_that_is_printed_runs_the_batch_again_as_it_stands(
    dpo: Callable[..., Result], tmp_path: Path
) -> None:
    """In a shell, and from a directory whose name a shell would take apart."""
    output = tmp_path / "my run; (2)"
    result = dpo(output, "beta=1e38")  # its gradient is none
    assert result.exit_code == 1
    printed = re.search(r"to run it again: (srcfast replay .*)", result.output)
    assert printed is not None, result.output
    kept = json.loads((output / "not-finite" / "batch.json").read_text(encoding="utf-8"))
    assert printed[1] == kept["command"]
    shell = f'srcfast() {{ {shlex.quote(sys.executable)} -m srcfast "$@"; }}; {printed[1]}'
    again = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 1 and f"reproduced: step {kept['step']}: the gradient is not finite" in again.stderr
