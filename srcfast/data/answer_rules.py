"""Decide whether answers are right as benchmarks do, and compute the figures that these report.

exact     equal to the gold answer, both normalised (`srcfast.data.answers`)
choice    multiple choice: the right option's letter, or its text (MMStar, MMBench, ...)
relaxed   numbers within 5 % of a gold one; else exact (ChartQA: Masry et al. 2022)
yes_no    an answer with the word yes or no, but not both (POPE: Li et al. 2023; HallusionBench: Guan et al. 2024)
anls      average normalised Levenshtein similarity, below one half 0 (DocVQA: Mathew et al. 2021)
judge     a free answer that a judge scores at least as high as the reference's (LLaVA-Bench: Liu et al. 2023)

Where the evaluators of VLMEvalKit and lmms-eval decide otherwise is written in docs/data.md.
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
from srcfast.data.vlmeval import QUESTION_KEY, REFERENCE_KEY

Rule = Literal["exact", "choice", "relaxed", "yes_no", "anls", "judge"]
RULES: tuple[Rule, ...] = get_args(Rule)
TEXTS: dict[str, str] = {
    "exact": "answers equal to the gold one, but for case, articles, final periods and number words",
    "choice": "multiple choice: the right option's letter or text; chance: a guess among the options",
    "relaxed": "relaxed accuracy: numbers within 5 % of a gold one, without % and currency signs, other answers exact; "
    "pix2struct: by the reference code, in which 5% is 0.05 and a number with commas a text",
    "yes_no": "yes or no: an answer with one of the two words; yes is positive",
    "judge": "free answers: accuracy: scored at least as high as the reference's answer; relative: the answers' scores divided "
    "by those of the references, from 1 to 10, means over both orders of the two; unscored: without scores of the judge",
    "anls": "accuracy: equal to a gold answer; ANLS: normalised Levenshtein similarity to the nearest one, 0 below 0.5",
}
TOLERANCE = 0.05  # of `relaxed`
LEAST_SIMILARITY = 0.5  # of ANLS
_WORDS = re.compile(r"[^\W\d_]+")
_IDS = re.compile(r"_(\d+)_(\d+)_(\d+)$")  # set, figure and question at the end of HallusionBench's indexes
CATEGORY_COLUMNS = ("split", "category", "l2-category", "l2_category")  # of VLMEvalKit's tables
_ROTATION = 10**6  # MMBench: the indexes of a question with its options rotated differ by multiples of this


def rule_text(entry: Mapping[str, Any]) -> str:
    """Return which answers are right in an evaluation of `summary.json`; empty where it is equal ones, or not stated."""
    rule, judge = entry.get("rule", "exact"), entry.get("judge")
    text = "" if rule == "exact" else TEXTS.get(rule, "")
    return f"{text}; judge {judge['model']}, prompt {judge['prompt_sha256'][:12]}" if judge else text


def rule_of(samples: Sequence[Sample]) -> Rule:
    """Return the rule that samples call for.

    choice if all have options, yes_no if all answers are yes or no, judge if all are of LLaVA-Bench's table, else exact.
    """
    if samples and all(has_options(sample) for sample in samples):
        return "choice"
    if samples and all(normalise_answer(sample.answer) in ("yes", "no") for sample in samples):
        return "yes_no"
    if samples and all(REFERENCE_KEY in sample.extra for sample in samples):
        return "judge"
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


def categories_of(rule: Rule, sample: Sample) -> list[tuple[str, str]]:
    """Return (column, value) of a sample's categories. By `yes_no` it may be in several: POPE's "popular,random"."""
    cells = [(column, sample.extra.get(column)) for column in CATEGORY_COLUMNS]
    values = [(column, cell) for column, cell in cells if isinstance(cell, str) and cell.strip()]
    if rule != "yes_no":
        return values
    return [
        (column, name) for column, cell in values for name in dict.fromkeys(map(str.strip, cell.split(","))) if name
    ]


def right_by_pix2struct(answer: str, gold: str) -> bool:
    """Return whether an answer is right by the code that VLMEvalKit and lmms-eval score ChartQA with.

    Source: relaxed_correctness in pix2struct/metrics.py.
    """
    number, target = _as_float(answer.strip()), _as_float(gold)
    if number is None or not target:
        return answer.strip().lower() == gold.lower()
    return abs(number - target) / abs(target) <= TOLERANCE


def _as_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


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


@dataclass(frozen=True)
class JudgeScores:
    """What a judge gave the reference's answer and the model's, from 1 to 10."""

    reference: float
    prediction: float


@dataclass
class RuleScores:
    """The figures that a rule reports beside accuracy, counted prediction by prediction.

    Of figures, questions and rotations one truth value each is stored, of answers that a judge scored their scores.
    """

    rule: Rule
    judged: list[JudgeScores] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _groups: dict[tuple[str, ...], bool] = field(default_factory=dict)  # whether all answers of a group are right

    def add(
        self, sample: Sample, answer: str | None, right: bool, times: int = 1, judged: JudgeScores | None = None
    ) -> None:
        """Count one prediction, `times` over: VLMEvalKit counts POPE's questions once for each of their categories.

        Args:
            judged: by the rule `judge`, None where the judge gave no scores.
        """
        self._counts["n"] += times
        if judged is not None:
            self.judged.append(judged)
        if self.rule == "choice":
            self._sums["chance"] += 1 / len(sample.extra["options"]) if has_options(sample) else 0.0
            if (rotated := _rotated(sample)) is not None:
                self._counts["rotated"] += 1
                self._count_group(("circular", *rotated), right)
        elif self.rule == "relaxed":
            golds = gold_answers(sample)
            self._sums["pix2struct"] += answer is not None and any(right_by_pix2struct(answer, gold) for gold in golds)
        elif self.rule == "anls":
            golds = gold_answers(sample)
            self._sums["anls"] += 0.0 if answer is None else max(similarity(answer, gold) for gold in golds)
        elif self.rule == "yes_no":
            said, gold = (None if answer is None else yes_or_no(answer)), normalise_answer(sample.answer)
            self._counts[f"{said} for {gold}"] += times
            self._counts["repeated"] += times - 1
            self._counts["right"] += times * right
            if ids := _IDS.search(sample.id):
                category, (of, figure, question) = _second_category(sample), ids.groups()
                self._count_group(("fAcc", category, of, figure), right)
                self._count_group(("qAcc", category, of, question), right)

    def _count_group(self, group: tuple[str, ...], right: bool) -> None:
        self._groups[group] = self._groups.get(group, True) and right

    def _shares_of_groups(self, *names: str) -> dict[str, float]:
        """Return for each name the share of its groups of which all answers are right, where it has groups."""
        of_names = {name: [right for group, right in self._groups.items() if group[0] == name] for name in names}
        return {name: sum(groups) / len(groups) for name, groups in of_names.items() if groups}

    def scores(self) -> dict[str, float]:
        """Return the figures by name.

        chance, and of rotated questions circular; or pix2struct; or anls; or precision, recall, f1 and the share of yes, with
        fAcc and qAcc, and with the accuracy over categories where samples are in several; or relative, prediction and reference,
        of which the last two are shares of 10, and the share of unscored answers.
        """
        n = self._counts["n"]
        if self.rule == "judge":
            unscored = {"unscored": 1 - len(self.judged) / n}
            return relative_scores(self.judged) | unscored if self.judged else unscored
        if self.rule != "yes_no":
            # Without a question that occurs twice these are no rotations.
            circular = self._shares_of_groups("circular") if self._counts["rotated"] > len(self._groups) else {}
            return {name: total / n for name, total in self._sums.items()} | circular
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
        if self._counts["repeated"]:
            scores["accuracy_over_categories"] = self._counts["right"] / n
        return scores | self._shares_of_groups("fAcc", "qAcc")


def relative_scores(judged: Sequence[JudgeScores]) -> dict[str, float]:
    """Return LLaVA-Bench's figures: scores of answers by those of references, and the means of both, divided by 10."""
    prediction, reference = sum(one.prediction for one in judged), sum(one.reference for one in judged)
    return {
        "relative": prediction / reference,
        "prediction": prediction / len(judged) / 10,
        "reference": reference / len(judged) / 10,
    }


def _second_category(sample: Sample) -> str:
    return str(sample.extra.get("l2-category", sample.extra.get("l2_category", "")))


def _rotated(sample: Sample) -> tuple[str, str] | None:
    """Return what the rotations of a table's question have in common, question and index; None: it is of no such table."""
    question, index = sample.extra.get(QUESTION_KEY), str(sample.extra.get("g_index", sample.id))
    if question is None or not index.isascii() or not index.isdecimal():
        return None
    return str(question), str(int(index[-18:]) % _ROTATION)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
