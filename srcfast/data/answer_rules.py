"""Decide whether answers are right as benchmarks do, and compute the figures that these report.

exact     equal to the gold answer, both normalised (`srcfast.data.answers`)
choice    multiple choice: the right option's letter, or its text (MMStar, MMBench, ...)
relaxed   numbers within 5 % of the gold one; else exact (ChartQA: Masry et al. 2022)
yes_no    an answer with the word yes or no, but not both (POPE: Li et al. 2023; HallusionBench: Guan et al. 2024)
anls      average normalised Levenshtein similarity, below one half 0 (DocVQA: Mathew et al. 2021)
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from srcfast.data.answers import gold_answers, is_right
from srcfast.data.rationale_format import normalise_answer
from srcfast.data.records import Sample

Rule = Literal["exact", "choice", "relaxed", "yes_no", "anls"]
RULES: tuple[Rule, ...] = get_args(Rule)
TEXTS: dict[str, str] = {
    "exact": "answers equal to the gold one, but for case, articles, final periods and number words",
    "choice": "multiple choice: the right option's letter or text",
    "relaxed": "relaxed accuracy: numbers within 5 % of the gold one, other answers exact",
    "yes_no": "yes or no: an answer with one of the two words; yes is positive",
    "anls": "accuracy: equal to a gold answer; ANLS: normalised Levenshtein similarity to the nearest one, 0 below 0.5",
}
TOLERANCE = 0.05  # of `relaxed`
LEAST_SIMILARITY = 0.5  # of ANLS
_WORDS = re.compile(r"[^\W\d_]+")
_IDS = re.compile(r"_(\d+)_(\d+)_(\d+)$")  # set, figure and question at the end of HallusionBench's indexes


def rule_text(entry: Mapping[str, Any]) -> str:
    """Return which answers are right in an evaluation of `summary.json`; empty where it is equal ones, or not stated."""
    rule = entry.get("rule", "exact")
    return "" if rule == "exact" else TEXTS.get(rule, "")


def rule_of(samples: Sequence[Sample]) -> Rule:
    """Return the rule that samples call for: choice if all have options, yes_no if all answers are yes or no, else exact."""
    if samples and all(has_options(sample) for sample in samples):
        return "choice"
    if samples and all(normalise_answer(sample.answer) in ("yes", "no") for sample in samples):
        return "yes_no"
    return "exact"


def has_options(sample: Sample) -> bool:
    """Return whether a sample has lettered options, one of which is right."""
    options = sample.extra.get("options")
    return isinstance(options, Mapping) and bool(options)


def is_right_by(rule: Rule, sample: Sample, answer: str | None) -> bool:
    """Return whether an answer is right by a rule; None, of a response that did not parse, is wrong."""
    if answer is None:
        return False
    if rule == "yes_no":
        return yes_or_no(answer) == normalise_answer(sample.answer)
    if rule == "relaxed":
        sample = replace(sample, extra={"tolerance": TOLERANCE} | sample.extra)
    return is_right(sample, answer)


def yes_or_no(answer: str) -> str | None:
    """Return "yes" or "no" if that word alone of the two is in an answer, else None."""
    words = {word.lower() for word in _WORDS.findall(answer)} & {"yes", "no"}
    return next(iter(words)) if len(words) == 1 else None


def similarity(answer: str, gold: str) -> float:
    """Return the normalised Levenshtein similarity of two answers, in lower case with single spaces; 0 below one half."""
    first, second = (" ".join(text.lower().split()) for text in (answer, gold))
    longest = max(len(first), len(second))
    share = 1.0 if not longest else 1.0 - edit_distance(first, second) / longest
    return share if share >= LEAST_SIMILARITY else 0.0


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance of two texts."""
    distances = list(range(len(second) + 1))
    for row, one in enumerate(first, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(second, start=1):
            diagonal, distances[column] = (
                distances[column],
                min(distances[column] + 1, distances[column - 1] + 1, diagonal + (one != other)),
            )
    return distances[-1]


@dataclass
class RuleScores:
    """The figures that a rule reports beside accuracy, counted prediction by prediction."""

    rule: Rule
    _counts: Counter[str] = field(default_factory=Counter)
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _groups: dict[tuple[str, ...], bool] = field(
        default_factory=dict
    )  # whether all answers of a figure or question are right

    def add(self, sample: Sample, answer: str | None, right: bool) -> None:
        """Count one prediction."""
        self._counts["n"] += 1
        if self.rule == "choice":
            self._sums["chance"] += 1 / len(sample.extra["options"]) if has_options(sample) else 0.0
        elif self.rule == "anls":
            golds = gold_answers(sample)
            self._sums["anls"] += 0.0 if answer is None else max(similarity(answer, gold) for gold in golds)
        elif self.rule == "yes_no":
            said, gold = (None if answer is None else yes_or_no(answer)), normalise_answer(sample.answer)
            self._counts[f"{said} for {gold}"] += 1
            if ids := _IDS.search(sample.id):
                category, (of, figure, question) = str(sample.extra.get("l2-category", "")), ids.groups()
                for group in (("figure", category, of, figure), ("question", category, of, question)):
                    self._groups[group] = self._groups.get(group, True) and right

    def scores(self) -> dict[str, float]:
        """Return the figures by name: chance; or anls; or precision, recall, f1 and the share of yes, with fAcc and qAcc."""
        n = self._counts["n"]
        if self.rule in ("choice", "anls"):
            return {name: total / n for name, total in self._sums.items()}
        if self.rule != "yes_no":
            return {}
        hits, false_alarms = self._counts["yes for yes"], self._counts["yes for no"]
        positives = sum(self._counts[f"{said} for yes"] for said in ("yes", "no", None))
        precision, recall = _share(hits, hits + false_alarms), _share(hits, positives)
        scores = {
            "precision": precision,
            "recall": recall,
            "f1": _share(2 * precision * recall, precision + recall),
            "share_of_yes": (hits + false_alarms) / n,
            "neither_yes_nor_no": sum(self._counts[f"None for {gold}"] for gold in ("yes", "no")) / n,
        }
        for kind, name in (("figure", "fAcc"), ("question", "qAcc")):
            if groups := [right for group, right in self._groups.items() if group[0] == kind]:
                scores[name] = sum(groups) / len(groups)
        return scores


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
