"""The study's figures are means over seeds and samples, its gains are paired, and the pages show what its file says."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srcfast.config.load import load_config
from srcfast.world.easy_vqa import read_easy_vqa
from srcfast_benchmarks import calibration_study as study

ROOT = Path(__file__).parents[3]
STAGES = ("base", "rationale", "iteration-1", "iteration-2", "iteration-3")


def write_predictions(run: Path, model: str, right: dict[str, list[int]]) -> None:
    (run / "predictions" / model).mkdir(parents=True)
    for name, own in right.items():
        rows = [json.dumps({"id": str(k), "right": bool(one), "aligned": bool(one)}) for k, one in enumerate(own)]
        (run / "predictions" / model / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_figures_are_means_over_seeds_and_all_sets_count_by_sample(tmp_path: Path) -> None:
    runs = [tmp_path / "0", tmp_path / "1"]
    write_predictions(runs[0], "base", {"world-test": [1, 0, 0, 0], "easy-test": [1, 1]})
    write_predictions(runs[1], "base", {"world-test": [1, 1, 0, 0], "easy-test": [0, 1]})
    world = study.pooled("base", ("world", "test"), runs)
    assert (world["accuracy"], world["n"], world["accuracy_by_seed"]) == (0.375, 4, [0.25, 0.5])
    everything = study.pooled("base", study.ALL, runs)
    assert everything["n"] == 6 and everything["accuracy"] == pytest.approx(6 / 12)


def test_gains_are_paired_by_sample(tmp_path: Path) -> None:
    runs, controls = [tmp_path / "run"], [tmp_path / "control"]
    right = np.random.default_rng(0).integers(0, 2, 500)
    better = right.copy()
    better[np.flatnonzero(right == 0)[:50]] = 1
    for run, model, values in ((runs[0], "rationale", right), (runs[0], "iteration-1", better)):
        write_predictions(run, model, {"world-test": values.tolist()})
    write_predictions(controls[0], "rationale", {"world-test": better.tolist()})
    found = study.gain("rationale", "iteration-1", ("world", "test"), runs, controls)
    low, high = found["accuracy_ci95"]
    assert found["accuracy"] == pytest.approx(0.1)
    assert 0.05 < low < 0.1 < high < 0.15  # unpaired samples of this size would give 0.1 +- 0.06
    assert study.gain("control", "iteration-1", ("world", "test"), runs, controls)["accuracy"] == 0.0


def test_headroom_is_pooled_by_sample() -> None:
    def entry(n: int, first: float, best: float, following: float) -> dict[str, float]:
        shared = {"iteration": 1, "n_candidates": 3.0, "pass_at_n": 0.9, "scorer_oracle_agreement": 0.8}
        return shared | {"n": n, "pass_at_1": first, "best_of_n": best, "next_pass_at_1": following}

    (pool,) = study.pooled_headroom([[entry(100, 0.5, 0.7, 0.6)], [entry(300, 0.1, 0.5, 0.2)]])
    assert pool["n"] == 400 and pool["pass_at_1"] == pytest.approx(0.2) and pool["best_of_n"] == pytest.approx(0.55)
    assert pool["recovered"] == pytest.approx((0.3 - 0.2) / (0.55 - 0.2))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_pages_show_the_committed_result_s_tables(result: dict[str, Any], page: str) -> None:
    assert study.table(result) in page
    assert study.gains_table(result) in page
    assert study.headroom_table(result) in page
    assert study.short_table(result) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_s_sentences_are_what_the_result_says(result: dict[str, Any], page: str) -> None:
    def gained(after: str, dataset: str, split: str) -> list[str]:
        pairs = zip(STAGES, STAGES[1:], strict=False)
        before = next(first for first, second in pairs if second == after)
        wanted = (before, after, dataset, split)
        entry = next(g for g in result["gains"] if (g["from"], g["to"], g["dataset"], g["split"]) == wanted)
        return [f"{100 * entry[figure]:.1f}" for figure in ("accuracy", "alignment")]

    words = " ".join(page.split())
    first, *rounds = (gained(stage, "all", "held out") for stage in STAGES[1:])
    assert (
        f"rationale fine-tuning {first[0]} points of accuracy and {first[1]} of alignment; "
        + "; ".join(
            f"round {number} {accuracy} and {alignment}" for number, (accuracy, alignment) in enumerate(rounds, 1)
        )
        in words
    )
    one, two, three = (gained(f"iteration-{number}", "world", "test") for number in (1, 2, 3))
    assert f"only round 1 gains** ({one[0]} points of accuracy, {one[1]} of alignment)" in words
    assert f"{two[0]} and {three[0]} points of accuracy, {two[1]} and {three[1]} of alignment" in words
    [kept] = {entry["n"] for entry in result["headroom"]}
    assert f"on {kept // result['seeds']} held-out samples" in words and f"each under {result['seeds']} seeds" in words


def test_all_sets_together_gain_at_each_stage_and_the_world_only_in_round_1(result: dict[str, Any]) -> None:
    above = {
        (g["to"], g["dataset"], g["split"]): min(g["accuracy_ci95"][0], g["alignment_ci95"][0]) > 0.0
        for g in result["gains"]
        if (g["from"], g["to"]) in zip(STAGES, STAGES[1:], strict=False)
    }
    assert all(above[stage, "all", "held out"] for stage in STAGES[1:])
    assert [above[stage, "world", "test"] for stage in STAGES[1:]] == [False, True, False, False]
    assert [above[stage, "world", "generalisation"] for stage in STAGES[1:]] == [False, True, False, False]
    assert all(above[stage, "easy-vqa", "test"] for stage in STAGES[1:])


def test_the_updates_on_the_page_are_those_of_the_settings_and_the_kept_pairs(
    result: dict[str, Any], page: str
) -> None:
    config = load_config(ROOT / "benchmarks" / "calibration_study.yaml", [])
    rationale, dpo = config.rationale, config.dpo
    per_epoch = math.ceil(rationale.samples / rationale.micro_batch_size)
    first = rationale.epochs * per_epoch
    control = (rationale.epochs + config.iterations * dpo.epochs) * per_epoch
    rounds = [
        sum(dpo.epochs * math.ceil((r["kept"] + rationale.samples) / dpo.micro_batch_size) for r in seed.values())
        for seed in result["funnel"]
    ]
    low, high = min(rounds), max(rounds)
    words = " ".join(page.split())
    assert f"It makes {control} updates, where a calibrated model makes {first + low} to {first + high}" in words
    assert f"({first} in stage 1, {low} to {high} in the rounds)" in words


def test_the_blind_guess_on_the_page_is_easy_vqa_s(page: str) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in read_easy_vqa("train"):
        answers[sample.extra["kind"]][sample.answer] += 1
    guess = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}
    test = read_easy_vqa("test")
    right = sum(guess[sample.extra["kind"]] == sample.answer for sample in test)
    words = " ".join(page.split())
    assert len(guess) == 3
    assert f"right on {100 * right / len(test):.1f} % of easy-VQA's {len(test):,} test questions" in words
