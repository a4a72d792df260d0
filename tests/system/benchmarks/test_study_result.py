"""What docs/results.md says of the study is what its result says; the pages' tables are checked with the suite's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srcfast.study.settings import read_study
from srcfast_benchmarks import study_tables

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return json.loads(study_tables.STUDY.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def page() -> str:
    """The section of the study, in one line."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    return " ".join(text[text.index("## The study") : text.index("### An earlier study")].split())


def shown(value: list[float], sign: int = 1) -> tuple[str, str]:
    """As the page writes a difference: `3.4 points of alignment (2.4 to 4.5)`, without the words."""
    low, high = sorted((sign * value[1], sign * value[2]))
    return f"{100 * sign * value[0]:.1f}", f"({100 * low:.1f} to {100 * high:.1f})"


def test_the_result_has_the_arms_and_differences_of_its_settings(summary: dict[str, Any]) -> None:
    study = read_study(ROOT / "benchmarks" / "study" / "main.yaml")
    assert list(summary) == ["arms", "differences", "judges"]
    assert list(summary["arms"]) == list(study.settings.arms)
    assert set(summary["arms"]) == set(study_tables.ARMS) and len(study_tables.ARMS) == 12
    assert list(summary["differences"]) == list(study.settings.differences)
    assert {arm["seeds"] for arm in summary["arms"].values()} == {5}
    sets = [each.label for each in study.configs["src", 0].data.evaluation]
    controls = [each.label for each in study.configs["src", 0].data.evaluation if each.images != "given"]
    for arm in summary["arms"].values():
        assert list(arm["sets"]) == sets and [name for name in sets if study_tables.is_control(name)] == controls


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ("src_improved - rationale", "`src_improved` {} points of alignment {}"),
        ("src_improved - gold_sft", "likeliest right candidates**: {} points of alignment over all sets {}"),
        ("src_improved - judged_sft", "Nor on judged fine-tuning**: {} points {}"),
        ("src - src_independent", "rating one by one**: {} points of alignment {}"),
        ("src - src_unweighted", "Confidence as a weight**: {} {}"),
        ("src - src_answer_pairs", "judged pairs are {} points above right over wrong answers {}"),
        ("src - src_random_pairs", "and {} above random ones {}"),
    ],
)
def test_differences_on_the_page(summary: dict[str, Any], page: str, difference: str, words: str) -> None:
    assert words.format(*shown(summary["differences"][difference]["alignment"])) in page


def test_other_figures_on_the_page(summary: dict[str, Any], page: str) -> None:
    arms, differences = summary["arms"], summary["differences"]
    cost = shown(differences["src - judged_sft"]["alignment"], -1)
    assert f"`src` is {cost[0]} points of alignment below judged fine-tuning {cost[1]}" in page
    assert f"and {shown(differences['src - judged_sft']['accuracy'], -1)[0]} of accuracy" in page
    gained, whole = (differences[f"{arm} - rationale"]["alignment"][0] for arm in ("src_improved", "true_rationales"))
    assert f"of {100 * whole:.1f} that true rationales" in page and f": {100 * gained / whole:.0f} % of the way" in page
    for arm, figure in (("dpo", "alignment"), ("rationale", "alignment"), ("direct_answer", "accuracy")):
        assert f"{100 * arms[arm][figure][0]:.1f}" in page
    right = [f"{100 * arms[arm]['accuracy'][0]:.1f} %" for arm in ("direct_answer", "src_improved", "true_rationales")]
    assert "{} against {} of `src_improved` and {} of true".format(*right) in page
    sets = differences["src_improved - rationale"]["sets"]
    names = ("world-test", "world-new_renderer", "digits-test", "easy-vqa-test")
    scenes, renderer, digits, easy = (f"{100 * sets[name]['alignment'][0]:.1f}" for name in names)
    assert (
        f"drawn scenes ({scenes}, and {renderer} under another renderer), digits ({digits}) and easy-VQA ({easy})"
        in page
    )
    blind = json.loads(study_tables.BLIND.read_text(encoding="utf-8"))["sets"]["world-test"]["accuracy"][0]
    gray = arms["direct_answer"]["sets"]["world-blank-test"]["accuracy"][0]
    assert f"({100 * gray:.1f} % on scenes, where the guess is right on {100 * blind:.1f})" in page


def test_what_the_page_calls_a_gain_leaves_0_out_and_what_it_calls_none_does_not(summary: dict[str, Any]) -> None:
    differences = summary["differences"]

    def sign(difference: str, figure: str = "alignment", of: str | None = None) -> int:
        entry = differences[difference] if of is None else differences[difference]["sets"][of]
        _, low, high = entry[figure]
        return (low > 0) - (high < 0)

    with_pictures = [
        name for name in differences["src_improved - rationale"]["sets"] if not study_tables.is_control(name)
    ]
    gains = {"world-test", "world-new_renderer", "digits-test", "easy-vqa-test"}
    assert {name for name in with_pictures if sign("src_improved - rationale", of=name)} == gains
    assert sign("src_improved - rationale") == sign("src_improved - gold_sft") == 1
    assert not any(sign("src_improved - gold_sft", of=name) for name in with_pictures)
    assert sign("src_improved - gold_sft", "accuracy") == sign("src_improved - judged_sft") == 0
    assert sign("src - judged_sft") == sign("src - judged_sft", "accuracy") == -1
    assert (
        sign("src - src_independent") == sign("src - src_independent", "accuracy") == sign("src - src_unweighted") == 0
    )
    assert sign("src - src_answer_pairs") == sign("src - src_random_pairs") == 1


def test_what_answers_alone_are_better_at(summary: dict[str, Any]) -> None:
    def right(arm: str, name: str) -> float:
        return float(summary["arms"][arm]["sets"][name]["accuracy"][0])

    for name in ("charts-test", "world-new_questions"):
        assert right("direct_answer", name) > right("src_improved", name) + 0.05
    assert right("direct_answer", "digits-test") < right("src_improved", "digits-test") - 0.05
    best = max(
        (arm for arm in summary["arms"] if arm != "true_rationales"),
        key=lambda arm: summary["arms"][arm]["alignment"][0],
    )
    assert best == "src_improved"


def test_the_r_scorer_s_figures_on_the_page(summary: dict[str, Any], page: str) -> None:
    result = json.loads((study_tables.STUDY.parent / "judges.json").read_text(encoding="utf-8"))
    assert summary["judges"] == result["judges"] and result["seeds"] == 3 and result["settings"]["families"] == 80
    [(size, qualities)] = result["judges"].items()
    assert list(qualities) == ["complete", "noisy", "partial", "answer"]

    def listed(mode: str) -> str:
        first, second, third, last = (f"{100 * modes[mode][0]:.1f}" for modes in qualities.values())
        return f"{first}, {second}, {third} and {last}"

    assert f"in {listed('pairwise')} % of pairs" in page and f"rated one by one in {listed('independent')}" in page
    assert all(low < 0 < high for _, low, high in result["differences"][size].values())
    curves = {quality: modes["pairwise"] for quality, modes in result["coverage"][size].items()}
    whole = [next(e for e in curve if e["coverage"] == 1.0)["choices"] for curve in curves.values()]
    half = [next(e for e in curve if e["coverage"] == 0.5) for curve in curves.values()]
    assert f"for {100 * min(whole):.0f} to {100 * max(whole):.0f} % of the samples" in page
    choices = [entry["choices"] for entry in half]
    assert f"for {100 * min(choices):.0f} to {100 * max(choices):.0f} % of the half" in page
    assert all(0.99 <= entry["pairs"] < 1 for entry in half) and "surer half of the pairs 99 % are right" in page
    errors = result["calibration"][size].values()
    after, before = ([of[f"ece_{when}"] for of in errors] for when in ("after", "before"))
    assert f"{min(after):.3f} to {max(after):.3f} with its temperatures" in page
    assert f"{min(before):.3f} to {max(before):.3f} without" in page
