"""The study of judges: figures by hand from rows by hand, and a small study that is stopped and goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from srcfast.data.rationale_format import format_response
from srcfast.recipes.families import FAMILIES
from srcfast.recipes.train_scorer import is_faulty, raps_of
from srcfast.stages.scorer_training import Variant, scorer_examples
from srcfast.world.claims import VOCABULARY
from srcfast.world.samples import world_samples
from srcfast_benchmarks import judge_study as study

ROOT = Path(__file__).parents[3]
QUALITIES = ("complete", "noisy", "partial", "answer")


def row(mode: str, seed: int, pairs: list[Any], choices: list[Any], **more: Any) -> dict[str, Any]:
    named = {"kind": "judges", "size": "S", "seed": seed, "quality": "noisy", "mode": mode}
    calibration = {"temperature": 2.0 + seed, "ece_before": 0.2, "ece_after": 0.1, "verdicts_right": 0.5}
    return named | {"pairs": pairs, "choices": choices, "calibration": calibration} | more


def rows() -> list[dict[str, Any]]:
    one = [[[0.9, 0.8], [0.4, 0.1]], [[0.6, 0.3]]]  # of two samples: 2 of 3 pairs are right
    two = [[[0.2, 0.5]], [[0.7, 0.9], [0.5, 0.0]]]  # 1 of 3: an even match is no agreement
    choices = [[True, 0.9], [False, 0.2], [True, 0.1]]
    return [
        row("pairwise", 0, one, choices),
        row("independent", 0, [[[0.9, 0.8], [0.6, 0.2]], [[0.4, 0.2]]], choices),
        row("pairwise", 1, two, choices),
        row("independent", 1, [[[0.2, 0.5]], [[0.7, 0.4], [0.1, 0.8]]], choices),
        row("pairwise", 0, one, choices, kind="before"),
        row("pairwise", 1, one, choices, kind="before"),
    ]


def test_figures_by_hand() -> None:
    result = study.summarise(rows())
    mean, low, high = result["judges"]["S"]["noisy"]["pairwise"]
    assert mean == pytest.approx((2 / 3 + 1 / 3) / 2) and 0.0 <= low < mean < high <= 1.0
    assert result["judges"]["S"]["noisy"]["independent"][0] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert result["before"]["S"]["noisy"]["pairwise"][0] == pytest.approx(2 / 3)
    # By sample: 1 - 2 of 2 and 1 - 0 of 1; 0 of 1 and 1 - 1 of 2.
    assert result["differences"]["S"]["noisy"][0] == pytest.approx(0.0)
    curve = {entry["coverage"]: entry for entry in result["coverage"]["S"]["noisy"]["pairwise"]}
    assert curve[1.0] == {"coverage": 1.0, "pairs": pytest.approx(0.5), "choices": pytest.approx(2 / 3)}
    # The most confident third of three pairs: 0.9 of seed 0, right, and 0.7 of seed 1, right.
    assert curve[0.3]["pairs"] == 1.0 and curve[0.3]["choices"] == 1.0
    # Two of three: 0.9 and 0.6 are right; 0.7 is, and 0.2 is not.
    assert curve[0.7]["pairs"] == pytest.approx((1.0 + 0.5) / 2) and curve[0.7]["choices"] == pytest.approx(0.5)
    assert result["calibration"]["S"]["noisy"] == {
        "temperature": 2.5,
        "ece_before": pytest.approx(0.2),
        "ece_after": pytest.approx(0.1),
        "verdicts_right": 0.5,
        "mean_confidence": pytest.approx((1.2 / 3 + 1.4 / 3) / 2),
    }
    assert "| S | noisy | 66.7 [" in study.table(result) and "| 0.200, 0.100 |" in study.table(result)


def test_intervals_grow_with_what_differs_between_seeds_and_between_samples() -> None:
    same = (np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    assert study.interval([same, same]) == [0.5, 0.5, 0.5]
    low, high = (np.zeros(50), np.ones(50)), (np.ones(50), np.ones(50))
    assert study.interval([low, high]) == [0.5, 0.0, 1.0]  # two seeds: in a quarter of the resamples both are the one
    coin = (np.array([1.0, 0.0] * 200), np.ones(400))
    mean, below, above = study.interval([coin])
    assert mean == 0.5 and above - below == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.15)  # 2,000 resamples


def test_outcomes_are_of_aligned_against_other_candidates() -> None:
    variants = {"a": [Variant("x", 0), Variant("y", 1), Variant("z", 0)], "b": [Variant("x", 1), Variant("y", 1)]}
    win = [[0.5, 0.8, 0.6], [0.2, 0.5, 0.1], [0.4, 0.9, 0.5]]
    scored = [
        {
            "sample_id": "a",
            "win_probability": win,
            "confidence": (np.array(win) / 2).tolist(),
            "scores": [0.7, 0.2, 0.8],
        },
        {"sample_id": "b", "win_probability": win, "confidence": win, "scores": [0.1, 0.9]},
    ]
    assert study.outcomes(scored, variants) == {
        "pairs": [[[0.8, 0.4], [0.9, 0.45]]],
        "choices": [[True, 0.45], [False, 0.2]],
    }
    with pytest.raises(typer.BadParameter, match="aligned"):
        study.outcomes(scored[1:], variants)


@pytest.mark.parametrize("word", ["samples", "samples=x", "colour=3", "samples=1.5"])
def test_settings_that_are_none_are_refused(word: str) -> None:
    with pytest.raises(typer.BadParameter, match="NAME=NUMBER"):
        study.parse_settings([word])
    with pytest.raises(typer.BadParameter, match="each size once"):
        study.parse_judges(["2M=embedded", "2M=other"])
    with pytest.raises(typer.BadParameter, match="SIZE=CHECKPOINT"):
        study.parse_judges(["embedded"])


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def data(settings: Any, seed: int, folder: Path, base: str) -> Any:
        """True rationales and their corruptions stand for a model's candidates."""
        parts = [
            world_samples(split, count, seed, image_dir=tmp_path / "images")
            for split, count in (("scorer", 8), ("validation", 4), ("test", 6))
        ]
        samples = [sample for part in parts for sample in part]
        made = scorer_examples(raps_of(samples), random.Random(seed), VOCABULARY, variants=3, is_faulty=is_faulty)
        variants = {example.key: list(example.variants) for example in made}
        return study.Data(*parts, {sample.id: variants.get(sample.id, []) for sample in samples})

    monkeypatch.setattr(study, "draw_data", data)
    trained: list[Any] = []
    train = study.train_items
    monkeypatch.setattr(study, "train_items", lambda *words: (trained.append(words), train(*words)))
    work, output = tmp_path / "work", tmp_path / "result.json"
    run = {"seeds": 1, "work": work, "output": output, "threads": 1, "judge": None, "base": "embedded"}
    study.main(["draws=1", "candidates=3"], **run)
    result, files = json.loads(output.read_text()), sorted((work / "rows").iterdir())
    assert len(files) == 2 * 4 * 2 and len(trained) == 1
    assert list(result["judges"]["2M"]) == list(result["before"]["2M"]) == list(QUALITIES)
    for of_modes in result["judges"]["2M"].values():
        for mean, low, high in (of_modes["pairwise"], of_modes["independent"]):
            assert 0.0 <= low <= mean <= high <= 1.0
    calibration = json.loads((work / "seed-0" / "2M" / "calibration.json").read_text())
    assert sorted(calibration) == sorted(QUALITIES)
    assert result["calibration"]["2M"]["noisy"]["temperature"] == pytest.approx(calibration["noisy"]["temperature"])

    times = [file.stat().st_mtime_ns for file in files]
    files[3].unlink()
    study.main(["draws=1", "candidates=3"], **run)
    again = json.loads(output.read_text())
    assert len(trained) == 1 and again["judges"] == result["judges"] and again["coverage"] == result["coverage"]
    of_one = files[3].name.rpartition("-")[0]  # both modes of its quality are computed again
    kept = [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)]
    assert kept == [not file.name.startswith(of_one) for file in files]
    with pytest.raises(typer.BadParameter, match="--work"):
        study.main(["draws=2", "candidates=3"], **run)
    with pytest.raises(typer.BadParameter, match="--work"):
        study.main(["draws=1", "candidates=3"], **run | {"base": "another"})


def test_a_judge_is_measured_as_it_comes_on_test_samples_of_all_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, Any] = {}

    def candidates(tuned: Any, test: Any, recipe: Any, number: int, folder: Path, base: str) -> dict[str, list[str]]:
        """A true rationale and a wrong answer to it stand for a model's candidates."""
        written.update(tuned=tuned, test=test, base=base, tuned_samples=recipe.tuned[number][0])
        return {
            sample.id: [
                format_response(sample.extra["see"], sample.extra["think"], answer, "tagged")
                for answer in (sample.answer, "no" if sample.answer == "yes" else "yes")
            ]
            for sample in test
        }

    monkeypatch.setattr(study, "tuned_candidates", candidates)
    monkeypatch.setattr(study, "train_judge", lambda *words: pytest.fail("an R-Scorer was trained"))
    work, output = tmp_path / "work", tmp_path / "result.json"
    words = ["families=2", "epochs=0", "tuned=10"]
    study.main(words, judge=None, seeds=1, work=work, output=output, threads=1, base="somewhere")
    result = json.loads(output.read_text())
    assert list(result["judges"]["2M"]) == list(QUALITIES) and result["base"] == "somewhere"
    splits = {name: {sample.extra["split"] for sample in written[name]} for name in ("tuned", "test")}
    assert splits == {"tuned": {"train", "fit"}, "test": {"test"}}
    assert {sample.extra["dataset"] for sample in written["test"]} == set(FAMILIES)
    assert written["tuned_samples"] == len(written["tuned"]) == 10 and written["base"] == "somewhere"
