"""The study's figures are means over seeds and samples, its gains are paired, and the README shows what its file says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration_study", ROOT / "benchmarks" / "calibration_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_predictions(run: Path, model: str, right: dict[str, list[int]]) -> None:
    (run / "predictions" / model).mkdir(parents=True)
    for name, own in right.items():
        rows = [json.dumps({"id": str(k), "right": bool(one), "aligned": bool(one)}) for k, one in enumerate(own)]
        (run / "predictions" / model / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_figures_are_means_over_seeds_and_all_sets_count_by_sample(study: ModuleType, tmp_path: Path) -> None:
    runs = [tmp_path / "0", tmp_path / "1"]
    write_predictions(runs[0], "base", {"world-test": [1, 0, 0, 0], "easy-test": [1, 1]})
    write_predictions(runs[1], "base", {"world-test": [1, 1, 0, 0], "easy-test": [0, 1]})
    world = study.pooled("base", ("world", "test"), runs)
    assert (world["accuracy"], world["n"], world["accuracy_by_seed"]) == (0.375, 4, [0.25, 0.5])
    everything = study.pooled("base", study.ALL, runs)
    assert everything["n"] == 6 and everything["accuracy"] == pytest.approx(6 / 12)


def test_gains_are_paired_by_sample(study: ModuleType, tmp_path: Path) -> None:
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


def test_headroom_is_pooled_by_sample(study: ModuleType) -> None:
    def entry(n: int, first: float, best: float, following: float) -> dict[str, float]:
        shared = {"iteration": 1, "n_candidates": 3.0, "pass_at_n": 0.9, "scorer_oracle_agreement": 0.8}
        return shared | {"n": n, "pass_at_1": first, "best_of_n": best, "next_pass_at_1": following}

    (pool,) = study.pooled_headroom([[entry(100, 0.5, 0.7, 0.6)], [entry(300, 0.1, 0.5, 0.2)]])
    assert pool["n"] == 400 and pool["pass_at_1"] == pytest.approx(0.2) and pool["best_of_n"] == pytest.approx(0.55)
    assert pool["recovered"] == pytest.approx((0.3 - 0.2) / (0.55 - 0.2))


def test_the_readme_shows_the_committed_result_s_tables(study: ModuleType) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert study.table(result) in readme
    assert study.gains_table(result) in readme
    assert study.headroom_table(result) in readme
