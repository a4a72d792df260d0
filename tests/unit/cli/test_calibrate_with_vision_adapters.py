"""A whole calibration whose adapters reach projector and tower, stopped within DPO and continued; then merged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import ADAPTERS, STAGES, Server, assert_same, finished_stages, result_of
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
WORDS = ("lora.projector=true", "lora.tower_layers=1", "checkpoint.steps=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The directories of a run that nothing befell, and of one that was killed at its third checkpoint of DPO."""
    folder = tmp_path_factory.mktemp("adapted")
    server = Server(folder)
    try:
        whole = server.run(folder / "whole", words=WORDS)
        assert whole.status == 0, whole.said
        at = {"kind": "kill", "only": "os.rename checkpoint/iteration-1/dpo/step-00000003"}
        killed = server.run(folder / "killed", at, words=WORDS)
        assert killed.status == -9, killed.said
        assert finished_stages(folder / "killed" / "small") == [*STAGES[: STAGES.index("iteration-1/dpo")]]
        continued = server.run(folder / "killed", words=WORDS)
        assert continued.status == 0, continued.said
    finally:
        server.close()
    return folder / "whole" / "small", folder / "killed" / "small"


def contents(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_that_was_killed_in_dpo_ends_as_the_other(runs: tuple[Path, Path]) -> None:
    assert_same(runs[1], result_of(runs[0]))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_round_s_adapter_has_trained_weights_on_images(adapter: str, runs: tuple[Path, Path]) -> None:
    tensors = load_file(runs[0] / adapter / "adapter_model.safetensors")
    of_images = [
        name for name in tensors if "multi_modal_projector." in name or "vision_tower.encoder.layers.3." in name
    ]
    assert len(of_images) == 2 * (2 + 6) and len(tensors) == len(of_images) + 2 * 7 * 5
    assert all(bool(tensors[name].any()) for name in of_images)


def test_generation_s_log_probabilities_are_the_reference_s(runs: tuple[Path, Path]) -> None:
    """Written with the adapter folded in, checked by a forward pass with it, and compared by DPO's first step."""
    references = contents(runs[0] / "manifest.json")["iteration-1/preferences"]["references"]
    assert references["rechecked"] > 0 and references["worst"] < references["tolerance"]


def test_the_merged_model_answers_as_base_and_adapter_do(runs: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, merged = runs[0] / "iteration-1" / "adapter", tmp_path / "merged"

    def srcfast(*words: object) -> None:
        command = [sys.executable, "-m", "srcfast", *map(str, words)]
        subprocess.run(command, check=True, capture_output=True)

    srcfast("merge", "--model", "embedded", "--adapter", adapter, "--output", merged)
    said = []
    for name, words in (("both", ("--model", "embedded", "--adapter", adapter)), ("one", ("--model", merged))):
        output = tmp_path / name
        srcfast("evaluate", runs[0].parents[1] / "small.yaml", *words, "--output", output)
        (rows,) = output.rglob("*.jsonl")
        said.append([json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines()])
    assert said[0] == said[1] and len(said[0]) == 3
