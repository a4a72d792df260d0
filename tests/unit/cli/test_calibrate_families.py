"""`srcfast calibrate` and `srcfast merge` on small checkpoints of other families, by the general backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.family_models import Turn, inputs_of, plain_logits
from helpers.small_checkpoints import assert_close
from helpers.taught_family import TaughtFamily, rows
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.models import load_lvlm

pytestmark = [pytest.mark.long, pytest.mark.slow]

STAGES = ["candidates", "headroom", "scores", "preferences", "dpo", "evaluation"]


@pytest.fixture(scope="module", params=["qwen3_vl", "internvl"])
def calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaughtFamily:
    taught = TaughtFamily(request.param, tmp_path_factory.mktemp(request.param))
    taught.calibrate("runs")
    return taught


def contents(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_calibration_leaves_what_the_contract_names(calibrated: TaughtFamily) -> None:
    run = calibrated.runs["runs"]
    manifest, summary = contents(run / "manifest.json"), contents(run / "summary.json")
    assert list(manifest) == [
        "base/evaluation",
        "rationale",
        "rationale/evaluation",
        *(f"iteration-1/{stage}" for stage in STAGES),
    ]
    for stage in manifest.values():
        memory = stage["memory"]
        assert memory["forecast_bytes"] > 0 and memory["measured_bytes"] > 0
    assert [(entry["model"], entry["n"]) for entry in summary["evaluations"]] == [
        (model, 6) for model in ("base", "rationale", "iteration-1")
    ]
    candidates = rows(run / "iteration-1" / "candidates")
    assert {row["sample_id"] for row in candidates} == {str(number) for number in range(12)}
    assert 12 < len(candidates) <= 3 * 12
    pairs = rows(run / "iteration-1" / "preferences")
    assert len(pairs) == summary["funnel"]["iteration-1"]["kept"] > 2
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"] and pair["reference_chosen_logprob"] < 0
        texts = {row["text"] for row in candidates if row["sample_id"] == pair["sample_id"]}
        assert {pair["chosen"], pair["rejected"]} <= texts
    for adapter in (run / "rationale" / "adapter", run / "iteration-1" / "adapter"):
        assert {file.name for file in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "<img" in (run / "report" / "index.html").read_text(encoding="utf-8")


def test_reference_log_probabilities_are_those_of_a_plain_pass(calibrated: TaughtFamily) -> None:
    """Of the adapter of stage 1, which the preferences were made with, in transformers with PEFT."""
    peft = pytest.importorskip("peft")
    ours = load_lvlm(calibrated.base, backbone="transformers")
    theirs = AutoModelForImageTextToText.from_pretrained(calibrated.base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, calibrated.runs["runs"] / "rationale" / "adapter").eval()
    for pair in rows(calibrated.runs["runs"] / "iteration-1" / "preferences")[:3]:
        image = Image.open(calibrated.questions.parent / pair["images"][0]).convert("RGB")
        inputs = inputs_of(calibrated.processor, Turn(pair["prompt"], ("image",)), {"image": image})
        for kind in ("chosen", "rejected"):
            response = torch.from_numpy(ours.encode_response(pair[kind]))
            with torch.no_grad():
                logits = plain_logits(theirs, inputs, response)[inputs["input_ids"].shape[1] - 1 : -1]
            expected = float(logits.log_softmax(-1).gather(1, response[:, None]).sum())
            # fp32, some hundred tokens
            assert pair[f"reference_{kind}_logprob"] == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_merged_directory_loads_in_transformers_with_the_same_logits(
    calibrated: TaughtFamily, tmp_path: Path
) -> None:
    adapter = calibrated.runs["runs"] / "iteration-1" / "adapter"
    command = ["merge", "--model", str(calibrated.base), "--adapter", str(adapter), "--output", str(tmp_path / "m")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    theirs, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "m", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    ours = load_lvlm(calibrated.base, backbone="transformers", lora=adapter)
    image = Image.open(calibrated.questions.parent / "0.png").convert("RGB")
    inputs = inputs_of(calibrated.processor, Turn("what color is it?", ("image",)), {"image": image})
    prompt, response = ours.encode_prompt("what color is it?", [image]), ours.encode_response("It is red.")
    tree = Tree((Segment(prompt), Segment(response, 0)), ("image",))
    features = {"image": ours.encode_images([image])[0]}
    with torch.no_grad():
        logits = ours(Forest.of([tree]), features) @ ours.decoder.head_weight.T
        expected = plain_logits(theirs.eval(), inputs, torch.from_numpy(response))
        base = load_lvlm(calibrated.base, backbone="transformers")
        without = base(Forest.of([tree]), features) @ base.decoder.head_weight.T
    assert_close(logits, expected, 1e-4)  # the merged weights are rounded once more
    assert float((without - expected).abs().max()) > 1e-2 * float(expected.abs().max())
    again = load_lvlm(tmp_path / "m")  # with tokenizer and processor
    assert again.encode_prompt("what color is it?", [image]).tolist() == prompt.tolist()
