"""What the stages of a calibration share."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from srcfast.config.load import load_config
from srcfast.stages.calibration_run import CalibrationRun
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
