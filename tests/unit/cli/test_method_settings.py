"""`srcfast calibrate` and `srcfast dpo` with candidates beside the search, finalists, credited spans and derived pairs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.data.jsonl import read_shards
from srcfast.data.rationale_format import parse_response

SETTINGS = """
name: small
seed: 4
iterations: 1
quiet: true
model: {path: embedded}
scorer: {path: embedded, finalists: 2, adaptive_audit: 0.0}
data:
  train:
    - {name: world, format: world, split: train, limit: 32, use: [rationale]}
    - {name: world-fresh, format: world, split: train, seed: 1, limit: 12, use: [calibration]}
  evaluation:
    - {name: world, format: world, split: test, limit: 3}
lora: {r: 8, alpha: 16}
rationale: {samples: 24, epochs: 6, micro_batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 3.0e-3}
candidates:
  {num_candidates: 3, num_beams: 2, proposals: 2, plain_samples: 10, max_sentence_tokens: 24, max_new_tokens: 96, batch_size: 6}
curation: {min_margin: 0.0, min_confidence: 0.0, left_out_negatives: 1, rationale_pairs: true}
dpo: {epochs: 2, micro_batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 1.0e-3, credit: sentence}
evaluation: {max_new_tokens: 48, batch_size: 3, bootstrap_resamples: 100, headroom_samples: 2}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run."""
    output = tmp_path_factory.mktemp("whole")
    (output / "small.yaml").write_text(SETTINGS, encoding="utf-8")
    result = CliRunner().invoke(app, ["calibrate", str(output / "small.yaml"), f"output={output}"])
    assert result.exit_code == 0, result.output
    return output / "small"


def shards(run: Path, stage: str) -> list[dict[str, Any]]:
    return [row for _, _, row in read_shards(run / "iteration-1" / stage)]


@pytest.mark.slow
def test_candidates_beside_the_search_come_last_and_finalists_alone_are_compared(whole: Path) -> None:
    sampled: dict[str, list[bool]] = {}
    for row in shards(whole, "candidates"):
        sampled.setdefault(row["sample_id"], []).append(row.get("sampled", False))
    assert len(sampled) == 12 and all(flags == sorted(flags) for flags in sampled.values())
    assert sum(map(sum, sampled.values())) > 12
    summary = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    scores = shards(whole, "scores")
    assert all(row["verdicts"] <= 4 * 3 for row in scores) and any(len(row["scores"]) > 6 for row in scores)
    funnel = summary["funnel"]["iteration-1"]
    assert funnel["comparisons"] == sum(row["verdicts"] for row in scores)
    assert funnel["candidate_tokens"] == sum(len(row["token_ids"]) for row in shards(whole, "candidates"))
    (headroom,) = summary["headroom"]
    assert headroom["comparisons"] <= 2 * 4 * 3 and headroom["tokens"] > 100


@pytest.mark.slow
def test_derived_pairs_are_trained_with_and_each_has_the_reference_of_its_credit(whole: Path) -> None:
    pairs = shards(whole, "preferences")
    funnel = json.loads((whole / "summary.json").read_text(encoding="utf-8"))["funnel"]["iteration-1"]
    counts = Counter(pair.get("derived") for pair in pairs)
    assert (
        counts
        == {
            None: funnel["kept"],
            "left_out": funnel["left_out_negatives"],
            "rationale": funnel["rationale_pairs"],
        }
        and min(counts.values()) > 0
    )
    for pair in pairs:
        assert pair["credit"] == ("answer" if pair.get("derived") == "rationale" else "sentence")
        assert pair["reference_chosen_logprob"] <= pair["reference_chosen_span_logprob"] + 1e-4 <= 2e-4
        if "derived" in pair:
            assert parse_response(pair["rejected"]).answer == parse_response(pair["chosen"]).answer
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["stage"] == "iteration-1/dpo"]
    assert len(steps) == 2 * -(-len(pairs) // 4)
    assert abs(steps[0]["margin"]) < 1e-4 and steps[-1]["margin"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("stated", [True, False])
def test_the_command_trains_the_same_adapter_whether_references_are_stated_or_not(
    whole: Path, stated: bool, tmp_path: Path
) -> None:
    data = whole / "iteration-1" / "preferences"
    if not stated:
        data = tmp_path / "pairs.jsonl"
        rows = [
            {name: value for name, value in pair.items() if not name.startswith("reference_")}
            for pair in shards(whole, "preferences")
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = [
        "epochs=2",
        "micro_batch_size=4",
        "gradient_accumulation_steps=1",
        "learning_rate=1.0e-3",
        "credit=sentence",
    ]
    words = [
        "--data",
        str(data),
        "--image-root",
        str(whole.parent / "images"),
        "--adapter",
        str(whole / "rationale" / "adapter"),
    ]
    result = CliRunner().invoke(app, ["dpo", "--quiet", *words, "--output", str(tmp_path / "out"), "seed=5", *section])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["references_computed"] == (0 if stated else summary["pairs"])
    own = load_file(tmp_path / "out" / "adapter_model.safetensors")
    other = load_file(whole / "iteration-1" / "adapter" / "adapter_model.safetensors")
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0 if stated else 1e-4, msg=name)
