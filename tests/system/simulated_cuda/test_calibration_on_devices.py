"""Whole calibrations on simulated devices: as on the CPU, on one device and two, stopped and continued, on each preset."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_cuda
import torch
import yaml
from click.testing import Result
from safetensors.numpy import load_file
from typer.testing import CliRunner

from srcfast.stages.policy import Policy
from srcfast.units import parse_bytes

pytestmark = pytest.mark.simulated
PRESETS = ("12GiB", "16GiB", "24GiB", "48GiB", "80GiB")
SETTINGS = """
name: small
quiet: true
threads: 1
model: {path: embedded}
scorer: {path: embedded}
data:
  train:
    - {name: world, format: world, split: train, limit: 64, use: [rationale]}
    - {name: world-fresh, format: world, split: train, seed: 1, limit: 12, use: [calibration]}
  evaluation:
    - {name: world, format: world, split: test, limit: 6}
    - {name: easy-vqa, format: easy_vqa, split: test, limit: 4}
lora: {r: 8, alpha: 16}
rationale: {samples: 64, epochs: 6, learning_rate: 2.0e-3, micro_batch_size: 8, gradient_accumulation_steps: 1}
candidates: {samples: 12, num_candidates: 4, max_sentence_tokens: 24, max_new_tokens: 96}
curation: {min_margin: 0.0, min_confidence: 0.0, min_rating: 0.0}
dpo: {epochs: 1, micro_batch_size: 4, gradient_accumulation_steps: 1, rehearsal_weight: 1.0}
evaluation: {max_new_tokens: 96, batch_size: 8, bootstrap_resamples: 100, headroom_samples: 3}
"""
BEFORE_ROUNDS = ("base/evaluation", "rationale", "rationale/evaluation")
FILES = ("candidates", "scores", "preferences")
EVALUATIONS = ("base", "rationale", "iteration-1")
MAIN = Path(simulated_cuda.__file__).parent / "__main__.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


def calibrate(config: Path, output: Path, *words: str) -> Path:
    """In this process."""
    result = invoke("calibrate", config, f"output={output}", *words)
    assert result.exit_code == 0, result.output[-3000:]
    return output / "small"


def invoke(*words: Any) -> Result:
    from srcfast.cli.app import app

    return CliRunner().invoke(app, [str(word) for word in words])


def calibrate_on_two(config: Path, output: Path, *words: str) -> Path:
    """By torchrun, two ranks of one simulated device each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(MAIN)]
    environment = {**os.environ, "SIMULATED_CUDA": "2", "OMP_NUM_THREADS": "1", "SRCFAST_KERNELS": "torch"}
    command = [*launcher, "-m", "srcfast", "calibrate", str(config), f"output={output}", "model.device=cuda", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return output / "small"


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted((run / "iteration-1" / kind).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def losses_of(run: Path, stage: str) -> np.ndarray:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([row["loss"] for row in rows if row.get("stage", stage) == stage])


def tuned(run: Path, adapter: str) -> np.ndarray:
    tensors = load_file(run / adapter / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def on_cpu(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(config, tmp_path_factory.mktemp("cpu"), "model.device=cpu")


class AfterStages:
    """Watches a calibration: by how much more than the policy's tensors is allocated when a stage has ended, in bytes."""

    def __init__(self) -> None:
        self.beside: list[int] = []
        self._end_stage = Policy.end_stage

    def end_stage(self, policy: Policy) -> None:
        self._end_stage(policy)
        held = {}
        for tensor in [*policy.model.parameters(), *policy.model.buffers()] if policy.in_memory else ():
            held[tensor.untyped_storage().data_ptr()] = -(-tensor.untyped_storage().nbytes() // 512) * 512
        self.beside.append(torch.cuda.memory_allocated() - sum(held.values()))


@pytest.fixture(scope="module")
def after_stages() -> AfterStages:
    return AfterStages()


@pytest.fixture(scope="module")
def on_device(config: Path, tmp_path_factory: pytest.TempPathFactory, after_stages: AfterStages) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "end_stage", lambda policy: after_stages.end_stage(policy))
        gc.collect()
        before = torch.cuda.memory_allocated()
        run = calibrate(config, tmp_path_factory.mktemp("device"), "model.device=cuda")
    after_stages.beside = [found - before for found in after_stages.beside]
    return run


def test_a_calibration_gives_what_it_gives_on_the_cpu(on_cpu: Path, on_device: Path) -> None:
    for stage in EVALUATIONS:
        files = sorted((on_cpu / "predictions" / stage).glob("*.jsonl"))
        assert files
        for file in files:
            assert (on_device / "predictions" / stage / file.name).read_bytes() == file.read_bytes()
    for kind, names in (
        ("candidates", ("id", "text", "token_ids")),
        ("scores", ("sample_id",)),
        ("preferences", ("sample_id", "chosen", "rejected")),
    ):
        ours, theirs = rows_of(on_device, kind), rows_of(on_cpu, kind)
        assert ours and [[row[name] for name in names] for row in ours] == [
            [row[name] for name in names] for row in theirs
        ]
    for ours, theirs in zip(rows_of(on_device, "candidates"), rows_of(on_cpu, "candidates"), strict=True):
        # Sums of up to 96 fp32 log-probabilities, under adapters that rounding has moved apart.
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)
    for stage in ("rationale", "iteration-1/dpo"):
        ours, theirs = losses_of(on_device, stage), losses_of(on_cpu, stage)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5, err_msg=stage)
    # AdamW divides by the gradient's size, which enlarges rounding in fp32.
    np.testing.assert_allclose(
        tuned(on_device, "rationale/adapter"), tuned(on_cpu, "rationale/adapter"), rtol=1e-2, atol=1e-4
    )


def test_nothing_of_a_stage_outlives_it(on_device: Path, after_stages: AfterStages) -> None:
    assert after_stages.beside == [0] * 9


def test_nothing_of_a_calibration_stays_in_memory(config: Path, on_device: Path, tmp_path: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        continue_rounds(on_device, config, tmp_path, "model.device=cuda")
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def continue_rounds(run: Path, config: Path, output: Path, *words: str, two: bool = False) -> Path:
    """A run as it was before its first round, continued."""
    copy = output / "small"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "iteration-1")
    (copy / "summary.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({name: manifest[name] for name in BEFORE_ROUNDS}), encoding="utf-8")
    return calibrate_on_two(config, output, *words) if two else calibrate(config, output, *words)


def assert_same_round(run: Path, expected: Path) -> None:
    for kind in FILES:
        shards = sorted((expected / "iteration-1" / kind).glob("*.jsonl"))
        assert shards
        for shard in shards:
            assert (run / "iteration-1" / kind / shard.name).read_bytes() == shard.read_bytes(), shard.name
    np.testing.assert_allclose(
        tuned(run, "iteration-1/adapter"), tuned(expected, "iteration-1/adapter"), rtol=1e-3, atol=1e-5
    )


def test_two_devices_give_the_round_of_one_from_the_same_adapter(config: Path, on_device: Path, tmp_path: Path) -> None:
    assert_same_round(continue_rounds(on_device, config, tmp_path, two=True), on_device)


def test_two_devices_that_share_out_the_layers_calibrate_from_start_to_end(
    config: Path, on_device: Path, tmp_path: Path
) -> None:
    run = calibrate_on_two(config, tmp_path, "distributed.shard=true")
    assert [row["token_ids"] for row in rows_of(run, "candidates")] == [
        row["token_ids"] for row in rows_of(on_device, "candidates")
    ]
    np.testing.assert_allclose(losses_of(run, "rationale"), losses_of(on_device, "rationale"), rtol=1e-3, atol=1e-5)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`stop_at(n)`: SIGTERM comes while the n-th step of a training is under way."""
    from srcfast.training import loop

    whole = loop.accumulate
    counted = {"steps": 0, "at": 0}

    def accumulate(*args: Any, **kwargs: Any) -> Any:
        counted["steps"] += 1
        if counted["steps"] == counted["at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    monkeypatch.setattr(loop, "accumulate", accumulate)
    yield lambda step: counted.update(steps=0, at=step)


@pytest.mark.parametrize("step", [20, 50])  # of the rationale stage's 48, and of DPO
def test_stopped_and_continued_it_gives_the_same(
    config: Path, on_device: Path, tmp_path: Path, stop_at: Any, step: int
) -> None:
    words = (f"output={tmp_path}", "model.device=cuda")
    stop_at(step)
    assert invoke("calibrate", config, *words).exit_code == 128 + signal.SIGTERM
    stop_at(0)
    run = calibrate(config, tmp_path, "model.device=cuda")
    assert_same_round(run, on_device)
    assert np.array_equal(tuned(run, "rationale/adapter"), tuned(on_device, "rationale/adapter"))


@pytest.fixture(scope="module")
def tuned_model(on_device: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, able to state rationales: so presets need few steps, whatever their batches."""
    merged = tmp_path_factory.mktemp("tuned") / "model"
    adapter = on_device / "rationale" / "adapter"
    assert invoke("merge", "--model", "embedded", "--adapter", adapter, "--output", merged).exit_code == 0
    return merged


def write_preset_settings(config: Path, model: Path, path: Path) -> Path:
    """The settings without what presets set, for a few samples of a model that states rationales already."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["model"]["path"] = str(model)
    settings["rationale"] = {"samples": 16, "epochs": 1, "learning_rate": 1e-4}
    settings["dpo"] = {"epochs": 1, "rehearsal_weight": 1.0}
    settings["candidates"]["samples"] = settings["data"]["train"][1]["limit"] = 4
    del settings["evaluation"]["batch_size"]
    settings["evaluation"]["headroom_samples"] = 1
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_calibrates(config: Path, tuned_model: Path, tmp_path: Path, preset: str) -> None:
    """A small model in place of one of 7B; all that a preset sets stays as it is. Its losses are those of the CPU."""
    settings = write_preset_settings(config, tuned_model, tmp_path / "preset.yaml")
    run = calibrate(settings, tmp_path / "device", f"preset={preset}", "model.device=cuda")
    assert rows_of(run, "candidates") and rows_of(run, "preferences")
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))
    limit = parse_bytes(preset)
    assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(limit / torch.cuda.mem_get_info()[1], rel=1e-6)
    on_cpu = ("rationale", settings, "--output", tmp_path / "cpu", f"preset={preset}", "model.device=cpu")
    result = invoke(*on_cpu)
    assert result.exit_code == 0, result.output[-2000:]
    # bf16 rounds to 0.4 %, in other places on a GPU than on a CPU.
    np.testing.assert_allclose(losses_of(run, "rationale"), losses_of(tmp_path / "cpu", "rationale"), rtol=0.02)


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_calibrates_on_two_devices(config: Path, tuned_model: Path, tmp_path: Path, preset: str) -> None:
    settings = write_preset_settings(config, tuned_model, tmp_path / "preset.yaml")
    run = calibrate_on_two(settings, tmp_path / "two", f"preset={preset}")
    assert rows_of(run, "preferences") and (run / "iteration-1" / "adapter" / "adapter_model.safetensors").is_file()
