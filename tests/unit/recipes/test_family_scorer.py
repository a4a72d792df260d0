"""The recipe of an R-Scorer that starts from a base of the study, in a few steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from srcfast.data.rationale_format import format_response
from srcfast.data.records import Sample
from srcfast.errors import SrcfastError
from srcfast.models.scorer import load_scorer
from srcfast.models.text_model import load_text_model
from srcfast.models.verdict_temperature import CALIBRATION
from srcfast.recipes import train_scorer
from srcfast.recipes.train_scorer import Recipe, draw_samples, train_scorer_of
from srcfast.recipes.unfinished import check_recipe

TINY = Recipe(
    families={"world": 6, "clips": 6, "easy_vqa": 6},
    held_out_samples=3,
    tuned=((4, 1),),
    corrupted=2,
    drills=1,
    comparing_epochs=1,
    refining_draws=1,
)


def written(samples: Sequence[Sample], held_out: Sequence[Sample], *_: Any) -> Mapping[str, list[str]]:
    """Write for each sample its true rationale with the gold answer, and with another one."""
    return {
        sample.id: [
            format_response(sample.extra["see"], sample.extra["think"], answer, "tagged")
            for answer in (sample.answer, "no" if sample.answer == "yes" else "yes")
        ]
        for sample in (*samples, *held_out)
    }


def test_an_r_scorer_starts_from_a_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_scorer, "tuned_candidates", written)
    train_scorer_of(replace(TINY, qualities=("complete", "answer")), tmp_path, str(base), str(base))
    decoder, trained = (load_text_model(path).decoder.state_dict() for path in (tmp_path / "decoder", tmp_path))
    assert {name: tuple(tensor.shape) for name, tensor in decoder.items()} == {
        name: tuple(tensor.shape) for name, tensor in trained.items()
    }
    assert load_scorer(tmp_path).verdict_token_ids.numel() >= 2
    record = json.loads((tmp_path / "TRAINING.json").read_text(encoding="utf-8"))
    assert {name.partition(",")[0] for name in record["held_out"]} >= {"world", "clips", "easy_vqa"}
    calibration = json.loads((tmp_path / CALIBRATION).read_text(encoding="utf-8"))
    assert {quality: entry["pairs"] for quality, entry in calibration.items()} == {"complete": 18, "answer": 18}
    assert all(entry["temperature"] > 0 for entry in calibration.values())


def test_another_recipe_s_work_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates take hours: whoever names a directory of another recipe must hear of it first."""
    monkeypatch.setattr(train_scorer, "draw_samples", lambda *given: pytest.fail("samples were drawn"))
    check_recipe(tmp_path, {"recipe": asdict(TINY), "start": "a base"})
    for recipe, start in ((replace(TINY, seed=TINY.seed + 1), "a base"), (TINY, "another base")):
        with pytest.raises(SrcfastError, match="another recipe"):
            train_scorer_of(recipe, tmp_path, start, start)


def test_samples_of_the_families_are_split(tmp_path: Path) -> None:
    samples, held_out = draw_samples(TINY, tmp_path)
    assert {sample.extra["split"] for sample in samples} == {"scorer", "fit"}
    assert {sample.extra["split"] for sample in held_out} == {"validation"}
    assert {sample.extra["dataset"] for sample in samples} == {"world", "clips", "easy_vqa"}
    assert not {image for sample in samples for image in sample.images} & {
        image for sample in held_out for image in sample.images
    }
