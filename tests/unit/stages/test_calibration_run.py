"""What the stages of a calibration share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from srcfast.config.load import load_config
from srcfast.config.settings import Config
from srcfast.errors import ConfigError
from srcfast.models.lora import adapters
from srcfast.stages.calibration_run import CALIBRATION, RATIONALE, CalibrationRun
from srcfast.stages.policy import Policy
from srcfast.stages.prompts import image_keys


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
