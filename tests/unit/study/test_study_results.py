"""Intervals over seeds and samples, against hand-written resampling, and the form of a study's summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.seeds import fresh_rng
from helpers.small_run import write_study

from srcfast.study import results
from srcfast.study.results import ArmResults, differences_table, interval, interval_of, markdown
from srcfast.study.settings import read_study


def plain_interval(sets: list[np.ndarray], resamples: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """The same interval by drawing indices: seeds once a resample, samples once a set, one after the other."""
    means = []
    for _ in range(resamples):
        seeds = rng.integers(0, sets[0].shape[0], sets[0].shape[0])
        of_sets = []
        for values in sets:
            samples = rng.integers(0, values.shape[1], values.shape[1])
            of_sets.append(np.mean([values[s, n] for s in seeds for n in samples]))
        means.append(np.mean(of_sets))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([values.mean() for values in sets])), float(low), float(high)


def test_an_interval_is_that_of_plain_resampling_of_seeds_and_samples() -> None:
    rng = fresh_rng()
    levels = rng.uniform(0.2, 0.8, size=(4, 1))  # seeds differ, so that leaving them out would narrow the interval
    sets = [(rng.uniform(size=(4, n)) < levels).astype(float) for n in (37, 80)]
    mean, low, high = interval({"a": sets[0], "b": sets[1]}, 4000) or []
    expected = plain_interval(sets, 2000, rng)
    assert mean == pytest.approx(expected[0], abs=1e-12)
    # Quantiles of 2,000 and 4,000 resamples of a mean whose spread is about 0.1: their standard errors are below 0.006.
    assert [low, high] == pytest.approx(expected[1:], abs=0.025)
    over_samples = 4 * np.sqrt(0.25 / (37 + 80)) / np.sqrt(4)
    assert high - low > over_samples / 2


def test_each_set_counts_alike_and_seeds_widen_the_interval() -> None:
    right, wrong = np.ones((3, 10)), np.zeros((3, 90))
    assert interval({"a": right, "b": wrong}, 200) == pytest.approx([0.5, 0.5, 0.5])
    by_seed = np.repeat([[1.0], [0.0]], 50, axis=1)  # one seed has all right, the other none
    assert interval({"a": by_seed}, 500) == pytest.approx([0.5, 0.0, 1.0])
    assert interval({"a": by_seed[:1]}, 500) == pytest.approx([1.0, 1.0, 1.0])
    assert interval({}, 200) is None


def test_an_interval_holds_95_percent() -> None:
    """Of one seed's 400 answers, half of them right: 1.96 standard errors of 0.025; 1.645 of them would hold 90 %."""
    values = np.repeat([[1.0, 0.0]], 200, axis=1)
    mean, low, high = interval({"a": values}, 8000) or []
    assert mean == 0.5
    # A quantile of 8,000 resamples has a standard error of about 0.0007, and proportions of 400 go in steps of 0.0025.
    assert [low, high] == pytest.approx([0.5 - 0.049, 0.5 + 0.049], abs=0.004)


def test_a_figure_of_drawn_samples_may_be_missing_in_some_resamples() -> None:
    """Two samples, of which one has a value: a resample without it (a quarter of all) has no figure and is left out."""
    values, there = np.array([3.0, 0.0]), np.array([1, 0])

    def measure(counts: np.ndarray) -> np.ndarray:
        assert counts.sum(axis=1).tolist() == [2] * len(counts)
        with np.errstate(invalid="ignore"):
            return np.stack([counts @ values / (counts @ there), np.full(len(counts), 1.0)], axis=1)

    mean, low, high = interval_of([(measure, 2)], 2, 400)
    assert (mean, low, high) == (2.0, 1.0, 3.0)  # the seeds' figures are 3 and 1


def test_a_table_has_signed_points_and_a_dash_where_nothing_can_be_verified() -> None:
    figures = {"accuracy": [0.0512, -0.01, 0.11], "alignment": None}
    summary = {"differences": {"a - b": figures | {"sets": {"world-test": figures}}}}
    rows = differences_table(summary)
    assert rows == [
        ["difference", "all sets", "world-test"],
        ["a - b", "+5.1 (-1.0 to +11.0) / -", "+5.1 (-1.0 to +11.0) / -"],
    ]
    assert markdown(rows).splitlines()[1] == "| --- | --- | --- |"
    assert differences_table({"differences": {}}) == []


def test_controls_without_their_images_are_no_part_of_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"format": "world", "split": "test", "limit": 4}
    sets = [seen | {"name": "world"}, seen | {"name": "gray", "images": "blank"}]
    sets += [seen | {"name": "others", "images": "shuffled"}, seen | {"name": "more", "split": "validation"}]
    study = read_study(write_study(tmp_path, {"arm": {"settings": {"data": {"evaluation": sets}}}}))
    right = {"world-test": 0.25, "gray-test": 0.0, "others-test": 0.0, "more-validation": 0.75}
    outcomes = {name: np.array([[1.0] * int(4 * share) + [0.0] * int(4 - 4 * share)]) for name, share in right.items()}
    answers = ArmResults({"accuracy": outcomes, "alignment": {"gray-test": outcomes["gray-test"]}}, 1.0, 1.0, 1.0, 16)
    monkeypatch.setattr(results, "_read_arm", lambda study, arm: answers)
    arm = results.summarise(study)["arms"]["arm"]
    assert arm["accuracy"][0] == 0.5
    assert arm["alignment"] is None  # of controls alone
    assert {name: figures["accuracy"][0] for name, figures in arm["sets"].items()} == right
