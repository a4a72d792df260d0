"""The examples of a study are the first samples that one arm aligns and the other doesn't, with counts of both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from srcfast.errors import ConfigError
from srcfast_benchmarks import study_examples


def run(tmp_path: Path, before: list[bool], after: list[bool], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    data = [{"name": "world", "format": "world", "split": "test", "limit": 4}]
    arms = {"old": {"settings": {"iterations": 0}}, "new": {"settings": {"iterations": 0}}}
    settings = {"data": {"train": data, "evaluation": data}}
    study = {"name": "trial", "output": str(tmp_path / "runs"), "settings": settings, "arms": arms}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    ids = [f"s{n}" for n in range(4)]
    answers = {
        arm: {
            "world-test": [
                {"id": id, "text": f"{arm} {id}", "aligned": ok} for id, ok in zip(ids, aligned, strict=True)
            ]
        }
        for arm, aligned in (("old-0", before), ("new-0", after))
    }
    monkeypatch.setattr(study_examples, "read_predictions", lambda config, model: answers[config.name])
    drawn = study_examples.read_dataset

    def renamed(*args: Any) -> Any:
        return [replace(sample, id=id) for sample, id in zip(drawn(*args), ids, strict=True)]

    monkeypatch.setattr(study_examples, "read_dataset", renamed)
    study_examples.main(
        tmp_path / "study.yaml", "old", "new", ["world-test"], tmp_path / "out.json", tmp_path / "images"
    )
    return json.loads((tmp_path / "out.json").read_text())  # type: ignore[no-any-return]


def test_the_first_sample_that_was_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, [True, False, False, True], [False, False, True, True], monkeypatch)["world-test"]
    assert (result["old"], result["new"]) == ("old-0 s2", "new-0 s2")
    assert (result["gained"], result["lost"], result["samples"]) == (1, 1, 4)
    assert Image.open(tmp_path / "images" / result["picture"]).size[0] > 10


def test_a_set_without_a_gain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="world-test"):
        run(tmp_path, [True] * 4, [True] * 4, monkeypatch)
