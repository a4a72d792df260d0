"""What docs/results.md says of candidates, rounds and references is what their study's result says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from srcfast.study.settings import read_study

ROOT = Path(__file__).parents[3]
SECTION = (
    (ROOT / "docs" / "results.md")
    .read_text(encoding="utf-8")
    .split("### Candidates, rounds and references\n")[1]
    .split("\n### ")[0]
)
LINE = " ".join(SECTION.split())


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / "study" / "variations" / "summary.json"
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def share(value: list[float]) -> str:
    mean, low, high = (f"{100 * number:.1f}" for number in value)
    return f"{mean} ({low} to {high})"


def test_the_result_is_that_of_its_settings(summary: dict[str, Any]) -> None:
    study = read_study(ROOT / "benchmarks" / "study" / "variations.yaml")
    assert set(summary["arms"]) == set(study.settings.arms)
    assert list(summary["differences"]) == list(study.settings.differences)
    assert {arm["seeds"] for arm in summary["arms"].values()} == {2} and "**two seeds**" in SECTION


def test_the_table_has_each_arm_as_it_came_out(summary: dict[str, Any]) -> None:
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\| [a-z]+_?\w* \|.*$", SECTION, re.MULTILINE)][1:]
    assert {row[0] for row in rows} == set(summary["arms"]) and len(rows) == len(summary["arms"])
    for name, _, *figures in rows:
        arm = summary["arms"][name]
        shares = [share(arm[figure]) for figure in ("accuracy", "alignment")]
        assert figures == [*shares, str(arm["updates"]), f"{arm['tokens'] / 1e6:.1f}"], name


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ("candidates_16 - candidates_3", "16 minus 3 is {} points of alignment {}"),
        ("candidates_16 - candidates_8", "16 minus 8 is {} {}"),
        ("rounds_2 - candidates_16", "{} points for the second {}"),
        ("rounds_3 - rounds_2", "{} for the third {}"),
        ("reference_complete - reference_complete_independent", "individual rating**: {} {} with complete"),
        ("reference_noisy - reference_noisy_independent", "{} {} with noisy ones"),
        ("candidates_16 - independent", "{} {} with half of the objects"),
        ("reference_answer - reference_answer_independent", "{} {} with the answer alone"),
        ("reference_complete - candidates_16", "half of the objects: {} {}"),
    ],
)
def test_a_difference_is_as_the_page_says_and_can_be_0(summary: dict[str, Any], difference: str, words: str) -> None:
    value = summary["differences"][difference]["alignment"]
    mean, interval = share(value).split(" ", 1)
    assert words.format(mean, interval) in LINE
    assert value[1] < 0 < value[2]


def test_gains_and_costs_on_the_page(summary: dict[str, Any]) -> None:
    arms = summary["arms"]
    one_round = [arm for name, arm in arms.items() if name != "rationale" and not name.startswith("rounds")]
    gains = [100 * (arm["alignment"][0] - arms["rationale"]["alignment"][0]) for arm in one_round]
    assert f"one round are {min(gains):.1f} to {max(gains):.1f} points above rationale tuning" in LINE
    assert max(arms, key=lambda name: arms[name]["alignment"][0]) == "rounds_3"
    ratio = arms["rounds_3"]["tokens"] / arms["candidates_16"]["tokens"]
    assert f"{ratio:.1f} times the tokens of one" in LINE
    assert 0.45 < arms["candidates_3"]["tokens"] / arms["candidates_16"]["tokens"] < 0.55
