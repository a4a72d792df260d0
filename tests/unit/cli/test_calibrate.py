"""`srcfast calibrate`: the whole method on the embedded models, stopped and continued, from a config file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.data.jsonl import read_jsonl
from srcfast.stages import dpo

SETTINGS = """
name: small
iterations: 2
quiet: true
model: {path: embedded}
scorer: {path: embedded}
data:
  train:
    - {name: world, format: world, split: train, limit: 64, use: [rationale]}
    - {name: world-fresh, format: world, split: train, seed: 1, limit: 48, use: [calibration]}
  evaluation:
    - {name: world, format: world, split: test, limit: 24}
    - {name: easy-vqa, format: easy_vqa, split: test, limit: 8}
lora: {r: 8, alpha: 16}
rationale: {samples: 64, epochs: 6, micro_batch_size: 8, gradient_accumulation_steps: 1, learning_rate: 2.0e-3}
candidates: {samples: 24, num_candidates: 4, max_sentence_tokens: 24, max_new_tokens: 96, batch_size: 24}
curation: {min_margin: 0.1, min_confidence: 0.1, min_rating: 0.2}
dpo: {epochs: 2, micro_batch_size: 24, gradient_accumulation_steps: 1, rehearsal_weight: 1.0, sft_weight: 1.0}
evaluation: {max_new_tokens: 96, batch_size: 32, bootstrap_resamples: 100, headroom_samples: 6}
"""
STAGES = ["candidates", "headroom", "scores", "preferences", "dpo", "evaluation"]  # of a round, as they come


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    result = CliRunner().invoke(app, ["calibrate", str(config_file), f"output={output}", "quiet=false"])
    assert result.exit_code == 0, result.output
    assert "iteration-2" in result.output
    assert str(output / "small" / "report" / "index.html") in result.output.replace("\n", "")
    return output / "small"


def contents(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_stage_took_the_memory_that_was_forecast(whole: Path) -> None:
    """On a CPU: weights, gradients, the optimizer's state and what was kept for backward, counted."""
    manifest = contents(whole / "manifest.json")
    assert all(stage["memory"]["rss_growth_bytes"] >= 0 for stage in manifest.values())
    for name, stage in manifest.items():
        record = stage["memory"]
        assert record["forecast_bytes"] == pytest.approx(record["measured_bytes"], rel=0.1), name
    assert [one["memory"] for one in contents(whole / "summary.json")["stages"]] == [
        stage["memory"] for stage in manifest.values()
    ]


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_names(whole: Path) -> None:
    summary, manifest = contents(whole / "summary.json"), contents(whole / "manifest.json")
    rounds = [f"iteration-{k}/{stage}" for k in (1, 2) for stage in STAGES]
    assert list(manifest) == ["base/evaluation", "rationale", "rationale/evaluation", *rounds]
    models = ["base", "rationale", "iteration-1", "iteration-2"]
    assert [(e["model"], e["dataset"], e["n"]) for e in summary["evaluations"]] == [
        (model, name, n) for model in models for name, n in (("world", 24), ("easy-vqa", 8))
    ]
    keys = {
        "accuracy",
        "accuracy_ci95",
        "by_ability",
        "rationale_accuracy",
        "right_answer_wrong_rationale",
        "alignment",
    }
    for entry in summary["evaluations"]:
        assert keys <= entry.keys() and entry["accuracy_ci95"][0] <= entry["accuracy"] <= entry["accuracy_ci95"][1]
    assert [s["name"] for s in summary["stages"]] == list(manifest)
    assert summary["seconds"] > 0 and summary["peak_rss_bytes"] > 50e6
    for k in (1, 2):
        kept = summary["funnel"][f"iteration-{k}"]["kept"]
        pairs = [
            row
            for file in sorted((whole / f"iteration-{k}" / "preferences").glob("*.jsonl"))
            for _, row in read_jsonl(file)
        ]
        assert len(pairs) == kept > 0
        assert {"sample_id", "prompt", "chosen", "rejected", "confidence", "reference_chosen_logprob"} <= pairs[
            0
        ].keys()
        assert (whole / f"iteration-{k}" / "adapter" / "adapter_config.json").is_file()
    fresh = [
        {
            row["sample_id"]
            for file in (whole / f"iteration-{k}" / "candidates").glob("*.jsonl")
            for _, row in read_jsonl(file)
        }
        for k in (1, 2)
    ]
    assert not fresh[0] & fresh[1]  # every round has its own questions
    assert "<img" in (whole / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_before_the_first_update_of_every_round_the_margin_is_0(whole: Path) -> None:
    rows = [row for _, row in read_jsonl(whole / "metrics.jsonl")]
    for k in (1, 2):
        first = next(row for row in rows if row["stage"] == f"iteration-{k}/dpo")
        assert first["step"] == 0 and first["margin"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(whole: Path, config_file: Path, srcfast: Callable[..., Result]) -> None:
    manifest, adapter = (
        contents(whole / "manifest.json"),
        whole / "iteration-2" / "adapter" / "adapter_model.safetensors",
    )
    before = adapter.stat().st_mtime_ns
    result = srcfast("calibrate", config_file, f"output={whole.parent}")
    assert result.exit_code == 0, result.output
    assert contents(whole / "manifest.json") == manifest and adapter.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(
    whole: Path, config_file: Path, srcfast: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = dpo.train_preference

    def stopped(*arguments: Any, on_step: Callable[[dict[str, Any]], None], **more: Any) -> Any:
        def on_some_steps(metrics: dict[str, Any]) -> None:
            on_step(metrics)
            if metrics["step"] == 1:
                raise KeyboardInterrupt

        return train(*arguments, on_step=on_some_steps, **more)

    with monkeypatch.context() as patched:
        patched.setattr(dpo, "train_preference", stopped)
        assert srcfast("calibrate", config_file, f"output={tmp_path}").exit_code != 0
    run = tmp_path / "small"
    assert list(contents(run / "manifest.json"))[-1] == "iteration-1/preferences"
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "iteration-1/dpo", "st')  # a line that was being written
    assert srcfast("calibrate", config_file, f"output={tmp_path}").exit_code == 0
    for k in (1, 2):
        adapter = Path(f"iteration-{k}") / "adapter" / "adapter_model.safetensors"
        ours, theirs = load_file(run / adapter), load_file(whole / adapter)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    steps = [[(row["stage"], row["step"]) for _, row in read_jsonl(one / "metrics.jsonl")] for one in (run, whole)]
    assert steps[0] == steps[1]
    evaluations = [contents(one / "summary.json")["evaluations"] for one in (run, whole)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_other_settings_for_a_finished_stage_are_refused(
    whole: Path, config_file: Path, srcfast: Callable[..., Result]
) -> None:
    result = srcfast("calibrate", config_file, f"output={whole.parent}", "rationale.epochs=7")
    assert result.exit_code != 0 and "rationale" in result.output and "Traceback" not in result.output


def test_an_evaluation_set_that_is_empty_is_named_before_a_model_is_run(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    text = SETTINGS.replace("    - {name: easy-vqa, format: easy_vqa, split: test, limit: 8}\n", "")
    text = text.replace(
        "  evaluation:\n", f"  evaluation:\n    - {{name: mine, format: jsonl, path: {tmp_path}/empty.jsonl}}\n"
    )
    (tmp_path / "small.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path / "small.yaml"), f"output={tmp_path}"])
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "empty.jsonl" in result.output and "'mine'" in result.output and "Fix" in result.output
    assert not (tmp_path / "small" / "manifest.json").exists()
