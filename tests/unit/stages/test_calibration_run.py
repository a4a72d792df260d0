"""What the stages of a calibration share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.plain_scoring import plain_shares
from PIL import Image

import srcfast.world
from srcfast import calibrate
from srcfast.config.load import load_config
from srcfast.config.settings import Config
from srcfast.data.jsonl import read_shards, write_shards
from srcfast.data.records import Candidate
from srcfast.errors import ConfigError
from srcfast.models.lora import adapters
from srcfast.models.scorer import load_scorer
from srcfast.stages.calibration_run import CALIBRATION, RATIONALE, CalibrationRun
from srcfast.stages.policy import Policy
from srcfast.stages.prompts import image_keys
from srcfast.world.degraded_references import degrade_reference
from srcfast.world.samples import world_samples

ASSETS = Path(srcfast.world.__file__).parent / "assets"


def test_a_training_and_an_evaluation_set_may_use_the_same_ids(model_dir: Path, tmp_path: Path) -> None:
    for name, color in (("train", "red"), ("test", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30), color).save(tmp_path / name / "0.png")
        row = {"id": "0", "image": "0.png", "question": "what color", "answer": color, "facts": ["It is so."]}
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row) + "\n")
    sets = {
        name: f"data.{part}=[{{name: {name}, format: jsonl, path: {tmp_path}/{name}/rows.jsonl}}]"
        for name, part in (("train", "train"), ("test", "evaluation"))
    }
    words = [f"model.path={model_dir}", f"output={tmp_path / 'runs'}", *sets.values()]
    run = CalibrationRun(load_config(None, words))
    (held_out,) = run.evaluation_sets[0].samples
    assert run.samples["0"].answer == "red" and held_out.answer == "blue"
    for sample, color in ((run.samples["0"], (255, 0, 0)), (held_out, (0, 0, 255))):
        (key,) = image_keys(sample)
        assert run.policy.features.load(key).getpixel((0, 0)) == color
    assert run.num_samples == 2


def test_a_run_without_rounds_needs_no_data_to_calibrate_on(model_dir: Path, tmp_path: Path) -> None:
    row = {"id": "0", "image": "0.png", "question": "what color", "answer": "red", "rationale": "It is red."}
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = f"data.train=[{{name: a, format: jsonl, path: {tmp_path}/rows.jsonl, use: [rationale]}}]"
    words = [f"model.path={model_dir}", f"output={tmp_path / 'runs'}", data]
    run = CalibrationRun(load_config(None, [*words, "iterations=0"]))
    assert [sample.id for sample in run.rationale_samples] == ["0"] and run.calibration_samples == []
    with pytest.raises(ConfigError, match="a dataset with use 'calibration'"):
        CalibrationRun(load_config(None, [*words, "iterations=1", "name=other"]))
    with pytest.raises(ConfigError, match="a dataset with use 'rationale'"):
        CalibrationRun(
            load_config(None, [*words[:2], data.replace("[rationale]", "[calibration]"), "iterations=0", "name=none"])
        )


def test_a_run_with_other_settings_leaves_the_files_of_the_finished_one(model_dir: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    row = {"id": "0", "image": "0.png", "question": "what color", "answer": "red", "facts": ["It is so."]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = [
        f"model.path={model_dir}",
        f"output={tmp_path / 'runs'}",
        f"data.train=[{{name: a, format: jsonl, path: {tmp_path}/rows.jsonl}}]",
    ]
    run = CalibrationRun(load_config(None, words))
    run.directory.finish_stage("rationale", {"seed": 0}, seconds=1.0)
    written = {file: file.read_bytes() for file in run.directory.path.glob("*") if file.is_file()}
    assert run.directory.config_file in written
    with pytest.raises(ConfigError, match="'rationale' finished with seed = 0, this run asks for 1"):
        CalibrationRun(load_config(None, [*words, "seed=1"]))
    assert {file: file.read_bytes() for file in run.directory.path.glob("*") if file.is_file()} == written


def test_a_new_adapter_is_not_taken_for_the_bare_base(model_dir: Path) -> None:
    policy = Policy(load_config(None, [f"model.path={model_dir}", "lora.r=2"]), [])
    assert adapters(policy.fresh())
    assert not adapters(policy.use(None))


@pytest.mark.parametrize(("number", "before"), [(1, "rationale"), (2, "iteration-1/dpo")])
def test_a_round_s_stages_depend_on_the_adapter_before_it(number: int, before: str) -> None:
    run: Any = CalibrationRun.__new__(CalibrationRun)
    run.config, run.samples_of = Config(), lambda iteration: []
    of = f"iteration-{number}"
    stages = {
        "candidates": {before},
        "scores": {f"{of}/candidates"},
        "preferences": {before, f"{of}/candidates", f"{of}/scores"},
        "dpo": {before, f"{of}/preferences"},
    }
    for kind, earlier in stages.items():
        hashes = {name for name in run._inputs_of(f"{of}/{kind}").hashes if name.startswith("files of ")}
        assert hashes == {f"files of {stage}" for stage in earlier}


@pytest.mark.parametrize("rehearsal", [0.0, 0.5])
@pytest.mark.parametrize("teacher", [None, "notes.jsonl"])
def test_each_stage_depends_on_the_samples_and_models_that_it_reads(rehearsal: float, teacher: str | None) -> None:
    run: Any = CalibrationRun.__new__(CalibrationRun)
    run.config = Config.model_validate({"dpo": {"rehearsal_weight": rehearsal}, "rationale": {"teacher": teacher}})
    run.samples_of, run.rationale_samples, run.evaluation_sets = lambda iteration: [iteration], ["rationales"], []
    base, scorer = {"model.path"}, {"scorer.path"}
    notes = set() if teacher is None else {"rationale.teacher"}
    rehearsed = ({RATIONALE}, notes) if rehearsal else (set[str](), set[str]())
    stages = {
        "rationale": ({RATIONALE}, base | notes),
        "base/evaluation": (set(), base),
        "base/headroom": (set(), base | scorer),
        "iteration-2/candidates": ({CALIBRATION}, base),
        "iteration-2/scores": ({CALIBRATION}, scorer),
        "iteration-2/preferences": ({CALIBRATION}, base),
        "iteration-2/dpo": ({CALIBRATION} | rehearsed[0], base | rehearsed[1]),
    }
    for stage, (samples, files) in stages.items():
        inputs = run._inputs_of(stage)
        assert inputs.samples.keys() == samples, stage
        assert {name for name in inputs.hashes if not name.startswith("files of ")} == files, stage
        if CALIBRATION in samples:
            assert inputs.samples[CALIBRATION][0] == [2], stage  # those of its round


def test_scores_follow_the_datasets_references_and_the_r_scorer_s_calibration(model_dir: Path, tmp_path: Path) -> None:
    judge = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "judge"))
    entry = {"temperature": 1.7, "verdict": "choice", "ece_before": 0.3, "ece_after": 0.1, "pairs": 7}
    (judge / "calibration.json").write_text(json.dumps({"partial": entry}))
    words = [
        f"model.path={model_dir}",
        f"output={tmp_path / 'runs'}",
        f"scorer.path={judge}",
        "scorer.reference=partial",
        "data.train=[{name: w, format: world, limit: 3, seed: 4, reference: partial}]",
    ]
    run = CalibrationRun(load_config(None, words))
    truth = {sample.id: sample for sample in world_samples("train", 3, 4, image_dir=tmp_path)}
    texts = ["It is red. Answer: red", "It is blue. Answer: blue", "So it is. Answer: yes"]
    groups = {
        key: [Candidate(f"{key}#{n}", key, text, "", "", -1.0, (1, 2)) for n, text in enumerate(texts)] for key in truth
    }
    ordered = [candidate for sample in run.samples_of(1) for candidate in groups[sample.id]]
    write_shards(run.artifacts.shards(1, "candidates"), (candidate.to_json() for candidate in ordered))
    calibrate.score(run, 1)
    stage = run.directory.manifest()["iteration-1/scores"]
    assert stage["calibration"] == {"ece_before": 0.3, "ece_after": 0.1}
    scorer = load_scorer(ASSETS / "scorer").eval()
    rows = [row for *_, row in read_shards(run.artifacts.shards(1, "scores"))]
    assert {row["sample_id"] for row in rows} == set(truth)
    for row in rows:
        sample = degrade_reference(truth[row["sample_id"]], "partial", 4)
        lines = [
            "Details are missing from the reference.",
            f"Question: {sample.question}",
            f"Facts: {' '.join(sample.facts)}",
            f"Answer: {sample.answer}\n",
        ]
        shares = plain_shares(scorer, "\n".join(lines), texts[0], texts[2]) ** (1 / 1.7)
        expected = shares @ np.array([1.0, 0.5, 0.0]) / shares.sum()
        assert row["raw"][0][2] == pytest.approx(expected, abs=1e-5)  # fp32
