"""The figures of a page, of a run whose numbers are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srcfast.report import sections
from srcfast.report.run_files import RunFiles


def run_of(metrics: list[dict[str, Any]] | None = None, **summary: Any) -> RunFiles:
    return RunFiles(Path("run"), summary=summary, metrics=metrics or [], gallery=[], config={}, environment={})


def steps(stage: str, losses: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"stage": stage, "step": step, "loss": loss, **more} for step, loss in enumerate(losses)]


@pytest.mark.parametrize(("count", "tail"), [(1, 1), (9, 1), (20, 2), (39, 3)])
def test_a_training_s_means_are_over_its_last_tenth(count: int, tail: int) -> None:
    losses = [float(number**2) for number in range(count)]
    rates = [0.5, 2.0, 0.25, *[0.125] * count][:count]
    rows = [row | {"learning_rate": rate} for row, rate in zip(steps("dpo", losses), rates, strict=True)]
    (stage,) = sections.training(run_of(rows))
    assert (stage.name, stage.steps, stage.peak_learning_rate) == ("dpo", count, max(rates))
    assert stage.means == {"loss": pytest.approx(sum(losses[count - tail :]) / tail)}


def test_each_training_has_its_own_means_of_what_it_measured() -> None:
    rows = steps("rationale", [4.0, 2.0]) + steps("iteration-1/dpo", [1.0, 0.5], margin=3.0, reward_accuracy=None)
    stages = sections.training(run_of(rows))
    assert [(stage.name, stage.means) for stage in stages] == [
        ("rationale", {"loss": 2.0}),
        ("iteration-1/dpo", {"loss": 0.5, "margin": 3.0}),
    ]


def evaluation(model: str, accuracy: float, **by_ability: tuple[int, float]) -> dict[str, Any]:
    groups = {name: {"n": n, "accuracy": value, "alignment": None} for name, (n, value) in by_ability.items()}
    return {"model": model, "dataset": "d", "split": "s", "accuracy": accuracy, "alignment": None, "by_ability": groups}


def test_a_table_of_abilities_has_the_samples_once_and_a_column_a_model() -> None:
    rows = [
        evaluation("base", 0.25, count=(30, 0.1), color=(10, 0.7)),
        evaluation("iteration-1", 0.5, count=(30, 0.4), color=(10, 0.8)),
    ]
    (table,) = sections.abilities(run_of(evaluations=rows))
    assert (table.dataset, table.split, table.models) == ("d", "s", ["base", "iteration-1"])
    assert table.measures == ["accuracy, %"]  # nothing is aligned where nothing was verified
    assert table.rows == [("color", 10, [0.7, 0.8]), ("count", 30, [0.1, 0.4])]


def test_a_table_of_categories_has_chance_once_and_each_model_s_figures() -> None:
    def of(n: int, accuracy: float, **scores: float) -> dict[str, Any]:
        return {"n": n, "accuracy": accuracy, "accuracy_ci95": [0.0, 1.0], "scores": scores}

    base = evaluation("base", 0.25, math=(4, 0.5), logic=(6, 0.1))
    base["by_category"] = {"category": {"logic": of(6, 0.1, chance=0.25), "math": of(4, 0.5, chance=0.5, circular=0.2)}}
    last = evaluation("iteration-1", 0.5) | {"by_category": {"category": {"math": of(4, 0.75, chance=0.5)}}}
    (table,) = sections.categories(run_of(evaluations=[base, last]))
    assert (table.column, table.models, table.scores, table.has_chance) == (
        "category",
        ["base", "iteration-1"],
        ["circular"],
        True,
    )
    assert [(value, n, chance) for value, n, chance, _ in table.rows] == [("logic", 6, 0.25), ("math", 4, 0.5)]
    assert [entry.get("accuracy") for *_, entries in table.rows for entry in entries] == [0.1, None, 0.5, 0.75]
    assert sections.abilities(run_of(evaluations=[base, last])) == []  # they are the categories
    assert sections.categories(run_of(evaluations=[evaluation("base", 0.1)])) == []


def test_a_headline_goes_from_the_first_model_to_the_last_and_counts_the_pairs_of_all_rounds() -> None:
    rows = [evaluation("base", 0.25), evaluation("rationale", 0.375), evaluation("iteration-2", 0.5)]
    funnel = {
        "iteration-1": {"pairs_proposed": 40, "kept": 30},
        "iteration-2": {"pairs_proposed": 20, "kept": 5},
    }
    headline = sections.headline(run_of(evaluations=rows, funnel=funnel))
    assert headline is not None
    assert (headline.first, headline.last, headline.pairs) == ("base", "iteration-2", 35)
    assert headline.measures == [("answers right", 0.25, 0.5)]


def test_bars_are_shares_of_the_longest_in_their_order() -> None:
    counts = {
        "samples": 80,
        "with_pair": 20,
        "pairs_proposed": 1600,
        "kept": 400,
        "dropped": {"margin": 3, "length": 0},
    }
    (funnel,) = sections.funnels(run_of(funnel={"iteration-1": counts}))
    assert [(bar.percent, bar.text) for bar in funnel.samples] == [(100.0, "80"), (25.0, "20")]
    assert [(bar.percent, bar.text) for bar in funnel.pairs] == [(100.0, "1,600"), (25.0, "400")]
    assert funnel.dropped == {"margin": 3}
    stages = [
        {"name": "rationale", "seconds": 30.0, "tokens_per_second": 1234.0},
        {"name": "candidates", "seconds": 120.0},
    ]
    timings = sections.timings(run_of(stages=stages))
    assert [(bar.label, bar.percent, bar.text) for bar in timings] == [
        ("rationale", 25.0, "30.0 s, 1,234 tokens/s"),
        ("candidates", 100.0, "0:02:00"),
    ]


def test_rates_have_a_column_a_round_and_each_its_unit() -> None:
    funnel = {
        "iteration-1": {"tie_rate": 0.125, "mean_confidence": 0.5, "length_correlation": 0.25},
        "iteration-2": {"tie_rate": 0.0, "length_correlation": -0.5},
    }
    shares = {"iteration-2": {"same_best": 0.75}}
    assert sections.rates(run_of(funnel=funnel, adaptive=shares)) == [
        ("ties", ["12.5 %", "0.0 %"]),
        ("mean confidence of comparisons", ["0.50", "–"]),
        ("correlation of score and length", ["+0.25", "-0.50"]),
        ("audited samples with the best candidate that all comparisons give", ["– %", "75.0 %"]),
    ]
