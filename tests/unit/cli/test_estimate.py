"""`srcfast estimate`: what it counts, what it says fits, what it would change, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.shapes_7b import write_configs
from safetensors.torch import load_file

from srcfast import distributed
from srcfast.config.load import load_config
from srcfast.memory.advice import advice, with_setting
from srcfast.memory.plan import STAGES, Lengths, forecast_stage, policy_sizes

Srcfast = Callable[..., Result]
GIB = 1024**3


def estimate(srcfast: Srcfast, *words: Any) -> dict[str, Any]:
    result = srcfast("estimate", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def shapes_7b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_configs(tmp_path_factory.mktemp("shapes"))


def settings_7b(shapes_7b: tuple[Path, Path], *words: str) -> Any:
    model, scorer = shapes_7b
    return load_config(
        None, [f"model={{path: {model}, dtype: bfloat16, device: cuda}}", f"scorer.path={scorer}", *words]
    )


def test_it_counts_what_the_checkpoint_holds(srcfast: Srcfast, model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    words = ("--model", model_dir, "--memory", "64MiB", "lora.r=4", "lora.target_modules=[q_proj, down_proj]")
    plain, quantised = (estimate(srcfast, *words, f"model.quantize={kind}") for kind in ("none", "nf4"))
    assert plain["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert plain["weight_bytes"] == 4 * plain["total_parameters"]
    # two layers; q: 64 -> 64, down: 192 -> 64
    assert plain["adapter_parameters"] == 2 * (4 * (64 + 64) + 4 * (64 + 192))
    assert plain["kv_bytes_per_token"] == 2 * 2 * 64 * 4
    linear = sum(t.numel() for n, t in tensors.items() if "language_model" in n and n.endswith("_proj.weight"))
    saved = plain["weight_bytes"] - quantised["weight_bytes"]
    assert saved == pytest.approx(linear * (4 - 0.5159), rel=1e-3)  # 4.127 bits a weight, as the QLoRA paper has it


def test_a_config_alone_says_the_same_as_a_checkpoint(srcfast: Srcfast, model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(model_dir / "config.json", tmp_path)
    with_weights, without = (estimate(srcfast, "--model", path, "--memory", "1GiB") for path in (model_dir, tmp_path))
    assert without == with_weights


def test_no_weight_is_read(srcfast: Srcfast, model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(model_dir / "config.json", tmp_path)
    whole = (model_dir / "model.safetensors").read_bytes()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(whole[: 8 + int.from_bytes(whole[:8], "little")])  # the header alone
    assert estimate(srcfast, "--model", tmp_path) == estimate(srcfast, "--model", model_dir)
    weights.write_bytes(whole[:20])
    result = srcfast("estimate", "--model", tmp_path)
    assert result.exit_code == 2 and "model.safetensors" in result.output


def test_a_model_that_cannot_be_run_is_refused(srcfast: Srcfast, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    result = srcfast("estimate", "--model", tmp_path)
    assert (
        result.exit_code == 2 and "config.json" in result.output and "causal language model, found t5" in result.output
    )


def test_7b_shapes_have_the_parameters_that_their_authors_state(srcfast: Srcfast, shapes_7b: tuple[Path, Path]) -> None:
    found = estimate(srcfast, "--model", shapes_7b[0], "--scorer", shapes_7b[1], "--memory", "24GiB")
    assert found["total_parameters"] == pytest.approx(7.06e9, rel=0.001)  # the model's page: 7.06 B
    assert found["parameters"]["vision"] == pytest.approx(304e6, rel=0.01)  # CLIP ViT-L/14's tower, 336 pixels
    assert found["assumed"]["image"] == 576


@pytest.mark.parametrize("memory", [12, 24, 80])
def test_the_largest_token_budget_fits_and_a_larger_one_does_not(shapes_7b: tuple[Path, Path], memory: int) -> None:
    from srcfast.memory.advice import largest_value

    config = settings_7b(shapes_7b, "model.quantize=nf4")
    largest = largest_value(config, "dpo.token_budget", "dpo", memory=memory * GIB)
    at, above = (
        forecast_stage(config, "dpo", memory=memory * GIB, token_budget=budget) for budget in (largest, largest + 64)
    )
    assert at.peak <= 0.9 * memory * GIB < above.peak


@pytest.mark.parametrize("stage", STAGES)
def test_what_it_would_change_makes_each_stage_fit(shapes_7b: tuple[Path, Path], stage: str) -> None:
    config = settings_7b(shapes_7b)
    memory = 4.2 * GIB if stage == "scores" else 12 * GIB  # too little for a 7B LVLM, or a 1.5B R-Scorer, as it is
    changes = advice(config, stage, memory=memory)
    assert changes and not forecast_stage(config, stage, memory=memory).fits(memory)
    for change in changes:
        config = with_setting(config, change.setting, change.value)
    assert forecast_stage(config, stage, memory=memory).fits(memory)
    # The last of them was needed.
    last = changes[-1]
    without = with_setting(config, last.setting, _value(settings_7b(shapes_7b), last.setting))
    assert not forecast_stage(without, stage, memory=memory).fits(memory)


def _value(config: Any, setting: str) -> Any:
    section, _, name = setting.partition(".")
    return getattr(getattr(config, section), name)


def test_what_fits_is_left_alone(shapes_7b: tuple[Path, Path]) -> None:
    assert all(not advice(settings_7b(shapes_7b), stage, memory=200 * GIB) for stage in STAGES)


def test_a_base_shared_out_over_ranks_takes_its_part_and_two_whole_layers(srcfast: Srcfast, model_dir: Path) -> None:
    words = ("--model", model_dir, "--memory", "1GiB")
    whole = estimate(srcfast, *words)
    shared = estimate(srcfast, *words, "distributed.shard=true", "distributed.ranks=4")
    tensors = load_file(model_dir / "model.safetensors")
    linear = 4 * sum(t.numel() for n, t in tensors.items() if "language_model" in n and n.endswith("_proj.weight"))
    assert whole["weight_bytes"] - shared["weight_bytes"] == 0.75 * linear
    for before, after in zip(whole["stages"], shared["stages"], strict=True):
        if before["stage"] in ("preferences", "dpo"):  # of two layers, all is whole for a moment
            less = before["peak_bytes"] - after["peak_bytes"]
            assert less == pytest.approx(0.75 * linear - linear, abs=2)


def test_a_run_counts_with_the_ranks_that_there_are(
    shapes_7b: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings_7b(shapes_7b, "distributed.ranks=8", "distributed.shard=true")
    planned = policy_sizes(config).weight_bytes
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 2)
    assert policy_sizes(config).weight_bytes > 2 * planned


def test_sharing_the_base_out_is_advised_where_there_are_ranks_and_it_is_needed(
    shapes_7b: tuple[Path, Path],
) -> None:
    def asked(*words: str) -> set[str]:
        config = settings_7b(shapes_7b, "model.quantize=nf4", *words)
        return {change.setting for change in advice(config, "dpo", memory=4.5 * GIB)}

    assert "distributed.shard" in asked("distributed.ranks=8")
    assert "distributed.shard" not in asked()
    config = settings_7b(shapes_7b, "distributed.ranks=8", "distributed.shard=true")
    assert not forecast_stage(settings_7b(shapes_7b), "dpo", memory=12 * GIB).fits(12 * GIB)
    assert forecast_stage(config, "dpo", memory=12 * GIB).fits(12 * GIB)


def test_time_is_the_necessary_work_over_the_stated_rate(srcfast: Srcfast, shapes_7b: tuple[Path, Path]) -> None:
    # 640 prompt and 192 response tokens, shared prefix, references stored, nothing recomputed: 27.9 TFLOP a pair without
    # adapters, by an independent count of published implementations.
    words = (
        "--model",
        shapes_7b[0],
        "--scorer",
        shapes_7b[1],
        "--memory",
        "80GiB",
        "candidates.samples=500",
        "iterations=3",
    )
    found = estimate(srcfast, *words, "--flops", "400e12", "lora.r=1")
    dpo = next(stage for stage in found["stages"] if stage["stage"] == "dpo")
    assert dpo["samples"] == 500 and dpo["times"] == 3
    assert dpo["flops"] / 1500 == pytest.approx(27.9e12, rel=0.05)  # the tower, once an image, is on top
    assert dpo["seconds"] == pytest.approx(dpo["flops"] / 400e12)


def test_longer_responses_take_more(shapes_7b: tuple[Path, Path]) -> None:
    config = settings_7b(shapes_7b, "dpo.micro_batch_size=1")
    short, long = (forecast_stage(config, "dpo", memory=80 * GIB, lengths=Lengths(64, n)) for n in (100, 300))
    assert long.activations > short.activations


def test_the_tables_name_stages_what_fits_and_what_to_change(srcfast: Srcfast, shapes_7b: tuple[Path, Path]) -> None:
    words = ("--model", shapes_7b[0], "--scorer", shapes_7b[1], "--memory", "12GiB", "model.dtype=bfloat16")
    result = srcfast("estimate", *words, "model.device=cuda")
    assert result.exit_code == 0, result.output
    assert all(f"{stage}: " in result.output for stage in STAGES)
    assert "model.quantize=nf4" in result.output


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * GIB), ("80 GB", 80 * 10**9), ("1.5k", 1500), ("500000", 500000)]
)
def test_sizes_are_read_in_both_systems(text: str, size: int) -> None:
    from srcfast.units import parse_bytes

    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["12 apples", "", "-1GiB", "0"])
def test_a_size_that_is_none_is_refused(srcfast: Srcfast, model_dir: Path, text: str) -> None:
    result = srcfast("estimate", "--model", model_dir, f"--memory={text}")
    assert result.exit_code == 2 and "--memory" in result.output
    result = srcfast("estimate", "--model", model_dir, f"memory={text or '0'}")
    assert result.exit_code == 2 and "memory: expected" in result.output
