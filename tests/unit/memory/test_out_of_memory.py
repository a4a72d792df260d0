"""Where memory runs out: the forecast and what to change, never a trace; and what a run keeps out of memory beforehand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.made_rows import sentence, write_rows

from srcfast.cli import commands
from srcfast.config.load import load_config
from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import OutOfMemory
from srcfast.memory.out_of_memory import explain_out_of_memory, is_out_of_memory
from srcfast.memory.plan import STAGES, forecast_stage, largest_forest
from srcfast.models.lora import adapters, save_adapter
from srcfast.stages import policy as loading
from srcfast.stages import rationale

Srcfast = Callable[..., Result]
CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.76 GiB"

SETTINGS = """
name: small
iterations: 1
model: {path: embedded}
scorer: {path: embedded}
data:
  train:
    - {name: world, format: world, split: train, limit: 16, use: [rationale]}
    - {name: world-fresh, format: world, split: train, seed: 1, limit: 8, use: [calibration]}
lora: {r: 4, alpha: 8}
rationale: {epochs: 1, micro_batch_size: 4, gradient_accumulation_steps: 1}
"""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_SAYS),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_every_way_of_saying_that_memory_ran_out_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_the_cpu_allocators_own_error_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert is_out_of_memory(raised.value)


def test_other_errors_pass_as_they_are() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), explain_out_of_memory(Config(), "dpo"):
            raise error


@pytest.mark.parametrize("stage", [*STAGES, "headroom"])
def test_each_stage_says_what_was_expected_found_and_to_be_changed(stage: str) -> None:
    with pytest.raises(OutOfMemory) as raised, explain_out_of_memory(Config(), stage):
        raise torch.OutOfMemoryError(CUDA_SAYS)
    text = str(raised.value)
    part = "candidates" if stage == "headroom" else stage
    assert text.startswith(f"{part}: expected a peak of ")
    assert "weights" in text and CUDA_SAYS in text
    fix = text.partition("Fix: ")[2]
    setting, _, value = fix.partition(" ")[0].partition("=")
    # The setting is one that there is, and takes this value.
    changed = load_config(None, [f"{setting}={value}"])
    assert forecast_stage(changed, part).peak < forecast_stage(Config(), part).peak


def test_a_run_stops_with_the_mend_and_goes_on_from_there(
    srcfast: Srcfast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SETTINGS, encoding="utf-8")

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(rationale, "fine_tune_rationale", no_memory)
    result = srcfast("calibrate", config, f"output={tmp_path}", "quiet=true")
    assert result.exit_code == 1
    assert "rationale: expected a peak of" in result.output and "Fix: " in result.output
    assert "Traceback" not in result.output
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert list(manifest) == ["base/evaluation"]
    record = manifest["base/evaluation"]["memory"]
    assert record["forecast_bytes"] == record["measured_bytes"] > 1e6


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("rationale", "rationale: expected a peak of"),
        ("candidates", "candidates: expected a peak of"),
        ("score", "scores: expected a peak of"),
        ("dpo", "dpo: expected a peak of"),
        ("evaluate", "evaluation: expected a peak of"),
        ("logprob", "preferences: expected a peak of"),
        ("scorer", "lower scorer_training.token_budget"),
    ],
)
def test_single_commands_say_it_too(
    srcfast: Srcfast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, found: str
) -> None:
    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(commands, "require_option", no_memory)
    result = srcfast(command, "--data", tmp_path / "x.jsonl", "--output", tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert found in result.output and "Fix: " in result.output


def test_a_training_command_records_forecast_against_measured(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    rng = random.Random(5)
    rows = [
        {
            "sample_id": f"p{index}",
            "images": [rng.choice(("a.png", "b.png"))],
            "prompt": sentence(rng, rng.randint(3, 9)),
            "chosen": f"<see> {sentence(rng, rng.randint(2, 12))} </see> <answer> two </answer>",
            "rejected": f"<see> {sentence(rng, rng.randint(2, 12))} </see> <answer> three </answer>",
            "confidence": 0.5,
        }
        for index in range(9)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    where = ("--model", model_dir, "--data", data, "--image-root", image_root, "--output", tmp_path / "out")
    for optimizer in ("adamw", "adamw_8bit"):
        if optimizer != "adamw":
            pytest.importorskip("bitsandbytes")
        words = (
            "lora.r=4",
            "epochs=2",
            "micro_batch_size=3",
            "gradient_accumulation_steps=1",
            f"optimizer={optimizer}",
        )
        result = srcfast("dpo", *where, *words, "--quiet")
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "out" / "summary.json").read_text())["memory"]
        assert record["forecast_bytes"] == pytest.approx(record["measured_bytes"], rel=0.1)


def test_the_forecast_is_of_the_largest_forest_that_the_loop_makes() -> None:
    rng = random.Random(3)
    sizes = [rng.randint(10, 90) for _ in range(23)]
    loop = TrainingConfig(
        epochs=3, micro_batch_size=4, gradient_accumulation_steps=2, token_budget=200, activation_checkpointing=0
    ).seeded(9)
    trees = [Tree((Segment(torch.zeros(size, dtype=torch.int64).numpy()),)) for size in sizes]
    from srcfast.data.batching import global_batch, num_steps

    largest = max(
        forest.num_tokens
        for step in range(num_steps(23, loop))
        for forest in Forest.pack([trees[i] for i in global_batch(23, step, loop)], 200, max_trees=4)
    )
    assert sum(sizes[i] for i in largest_forest(sizes, loop)) == largest


# What leaves memory -----------------------------------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.arange(5, 40).numpy()
    with torch.no_grad():
        return model(Forest.of([Tree((Segment(tokens),))]), {}) @ model.decoder.head_weight.T


@pytest.fixture
def two_adapters(tmp_path: Path) -> list[Path]:
    """Adapters that change what the embedded model says, each in its own way."""
    config = Config()
    folders = []
    for seed in (1, 2):
        model = loading.load_model(config, config.lora.model_copy(update={"r": 3 + seed}).seeded(seed))
        generator = torch.Generator().manual_seed(seed)
        for layer in adapters(model).values():
            layer.lora_B.data.normal_(std=0.05, generator=generator)
        folders.append(tmp_path / f"adapter-{seed}")
        folders[-1].mkdir()
        save_adapter(model, folders[-1])
    return folders


def test_another_adapter_is_put_on_the_same_base(two_adapters: list[Path]) -> None:
    policy = loading.Policy(Config(), [])
    base = policy.model
    bare = logits_of(policy.use(None))
    for adapter in (*two_adapters, *two_adapters[:1]):
        found = policy.use(adapter)
        assert found is base  # no second model, not even for a moment
        assert torch.equal(logits_of(found), logits_of(loading.load_model(Config(), adapter)))
        assert not torch.allclose(logits_of(found), bare, atol=1e-3)
        assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in found.named_parameters())
    assert torch.equal(logits_of(policy.use(None)), bare) and not adapters(base)
    fresh = policy.fresh()
    assert fresh is base
    torch.testing.assert_close(
        logits_of(fresh), bare, rtol=1e-4, atol=1e-4
    )  # B begins at nought; fp32 in another order
    assert next(iter(adapters(fresh).values())).lora_A.shape[0] == Config().lora.r


def test_the_policy_leaves_while_the_r_scorer_judges_where_both_do_not_fit(two_adapters: list[Path]) -> None:
    plenty = load_config(None, ["scorer.token_budget=256"])
    beside = forecast_stage(plenty, "scores", memory=1e12).peak
    tight = plenty.model_copy(update={"memory": str(round(beside / 0.9 * 0.97))})
    policy = loading.Policy(plenty, [])
    policy.use(two_adapters[0])
    policy.offload()
    assert policy.in_memory
    policy = loading.Policy(tight, [])
    before = logits_of(policy.use(two_adapters[0]))
    policy.offload()
    policy.offload()
    assert not policy.in_memory
    assert torch.equal(logits_of(policy.use(two_adapters[0])), before)
    assert policy.in_memory and policy.features.model is policy.model
    loading.load_scorer_for(plenty)  # takes the limit back
    # The forecast of judging says the same.
    assert forecast_stage(tight, "scores").peak < beside


def test_no_gradient_stays_behind_a_training_stage(tmp_path: Path, srcfast: Srcfast, monkeypatch: Any) -> None:
    seen: list[Any] = []
    save = loading.Policy.save

    def watched(self: Any, directory: Path) -> None:
        save(self, directory)
        seen.extend(parameter.grad for parameter in self.model.parameters())
        raise MemoryError

    monkeypatch.setattr(loading.Policy, "save", watched)
    config = tmp_path / "small.yaml"
    config.write_text(SETTINGS, encoding="utf-8")
    assert srcfast("calibrate", config, f"output={tmp_path}", "quiet=true").exit_code == 1
    assert seen and all(gradient is None for gradient in seen)
