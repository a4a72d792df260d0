"""A batch whose numbers were not finite is kept, and comes out as before when it is run again; or it is said that it doesn't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from made_rows import preference_rows, write_rows

from srcfast.config import load_config
from srcfast.data.records import Sample
from srcfast.errors import SrcfastError
from srcfast.loading import features_of, load_model
from srcfast.replay import kept_if_not_finite
from srcfast.runtime.training import NotFinite
from srcfast.stages.rationale import fine_tune_rationale

Srcfast = Callable[..., Result]
LOOP = ("micro_batch_size=2", "gradient_accumulation_steps=1", "--quiet")


@pytest.fixture
def stopped(srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path) -> tuple[Path, str]:
    """(not-finite/, what was said) of a DPO training in which one pair's reference is beyond fp32."""
    files = ("--model", model_dir, "--image-root", image_root, "--output", tmp_path / "out", "lora.r=4", *LOOP)
    rows = preference_rows(4, seed=1)
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    rows[2] |= {"reference_chosen_logprob": -1.0, "reference_rejected_logprob": -1e300}
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    assert srcfast("dpo", "--data", pairs, *files).exit_code == 0
    result = srcfast("dpo", "--data", bad, *files)
    assert result.exit_code == 1 and "Traceback" not in result.output
    return tmp_path / "out" / "not-finite", result.output


def test_a_batch_that_is_not_finite_is_kept_and_comes_out_as_before(
    srcfast: Srcfast, stopped: tuple[Path, str]
) -> None:
    place, told = stopped
    assert f"srcfast replay {place}" in told
    kept = json.loads((place / "batch.json").read_text())
    assert {"step", "weights_sha256", "config", "error"} <= set(kept)
    assert len(kept["preferences"]) == 2 and "p2" in {row["sample_id"] for row in kept["preferences"]}
    result = srcfast("replay", place)
    assert result.exit_code == 1
    assert f"reproduced: step {kept['step']}: the loss is not finite" in result.output


def test_where_it_does_not_come_out_as_before_that_is_said(srcfast: Srcfast, stopped: tuple[Path, str]) -> None:
    place, _ = stopped
    kept = json.loads((place / "batch.json").read_text())
    for row in kept["preferences"]:
        row["reference_rejected_logprob"] = -1.0
    (place / "batch.json").write_text(json.dumps(kept))
    result = srcfast("replay", place)
    assert result.exit_code == 0 and f"not reproduced: step {kept['step']} has loss" in result.output


def test_other_weights_than_those_it_met_are_refused(srcfast: Srcfast, stopped: tuple[Path, str]) -> None:
    place, _ = stopped
    kept = json.loads((place / "batch.json").read_text())
    (place / "batch.json").write_text(json.dumps(kept | {"weights_sha256": "0" * 64}))
    result = srcfast("replay", place)
    assert result.exit_code == 2 and f"expected weights with SHA-256 {'0' * 64}" in result.output


def test_a_directory_that_holds_no_batch_is_named(srcfast: Srcfast, tmp_path: Path) -> None:
    result = srcfast("replay", tmp_path)
    assert result.exit_code == 2 and "batch.json" in result.output and "Traceback" not in result.output


def test_a_step_run_again_has_the_numbers_of_the_training(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    config = load_config(None, [f"model.path={model_dir}", "lora.r=4", "rationale.micro_batch_size=2"], None)
    loop = config.rationale.training_settings(0)
    raps = [
        (
            Sample(f"s{n}", (name,), "what color is it", "red", image_root=image_root),
            f"<see> {name}. </see> <answer> red </answer>",
        )
        for n, name in enumerate(("a.png", "b.png", "c.png"))
    ]
    model = load_model(config, config.lora.lora_config(0))
    with (
        pytest.raises(SrcfastError, match="step 0: made up.*srcfast replay"),
        kept_if_not_finite("rationale", config, model, raps, loop, tmp_path),
    ):
        raise NotFinite(0, "step 0: made up")
    features = features_of(model, [sample for sample, _ in raps])
    first = fine_tune_rationale(model, raps, loop, features=features)[0]
    told = srcfast("replay", tmp_path / "not-finite").output
    assert f"has loss {first['loss']:.6g} and gradient norm {first['grad_norm']:.6g} here" in told
