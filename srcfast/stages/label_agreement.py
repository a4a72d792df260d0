"""Read what people answered on a page of pairs, and measure how far they agree with each other and with the R-Scorer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import read_jsonl
from srcfast.data.records import Fields, Sample
from srcfast.data.verdicts import VERDICTS, mean_shares, pair_key, pair_row, read_pair
from srcfast.errors import InputError
from srcfast.stages.judged_pairs import same_side

Answers = dict[str, dict[str, str]]  # by pair, by person: one of VERDICTS


@dataclass(frozen=True)
class ShownPair:
    """A pair as the page shows it; `chosen` and `scorer` as of `RunPair`."""

    sample: Sample
    candidates: tuple[str, str]
    chosen: str
    scorer: float | None


def read_shown(path: Path) -> dict[str, ShownPair]:
    """Read the pairs beside a page, by key. Raises InputError where the file is none, or has been changed."""
    shown = {}
    for line, row in read_jsonl(path):
        fields = Fields(row, path, line)
        key = fields.text("pair")
        sample, candidates = read_pair(fields)
        chosen, scorer = fields.text("chosen"), fields.optional_number("scorer")
        if key != pair_key(pair_row(sample, *candidates)):
            fix = "restore the file, or write the page anew"
            raise fields.error("pair", "the hash of this pair", key, fix)
        if scorer is not None and not 0.0 <= scorer <= 1.0:
            raise fields.error("scorer", "a share of a win, from 0 to 1", scorer)
        shown[key] = ShownPair(sample, candidates, chosen, scorer)
    if not shown:
        raise InputError(file=path, expected="the pairs of a page", found="none")
    return shown


def read_labels(paths: Sequence[Path], shown: Mapping[str, ShownPair]) -> Answers:
    """Read files of answers {pair, verdict, by}.

    Raises:
        InputError: a line is no answer, or to a pair that is not shown; a person answers a pair in two ways; no file has one.
    """
    answers: Answers = {}
    for path in paths:
        for line, row in read_jsonl(path):
            fields = Fields(row, path, line)
            key, by = fields.text("pair"), fields.text("by").strip()
            verdict = fields.take("verdict", f"one of {', '.join(VERDICTS)}", lambda value: value in VERDICTS)
            if key not in shown:
                raise fields.error("pair", "a pair of the page", key, "name the pairs of the page that was judged")
            if answers.setdefault(key, {}).setdefault(by, verdict) != verdict:
                fix = "remove one of the two lines"
                raise fields.error("verdict", f"one answer of {by} to this pair", verdict, fix)
    if not answers:
        raise InputError(file=paths[0], expected="answers {pair, verdict, by}", found="none")
    return answers


def verdict_rows(shown: Mapping[str, ShownPair], answers: Answers) -> Iterator[dict[str, Any]]:
    """Yield a record of verdicts for each pair that was answered, in the page's order; shares are those of the people."""
    for key, pair in shown.items():
        if key in answers:
            shares = mean_shares([_one_hot(verdict) for verdict in answers[key].values()])
            row = pair_row(pair.sample, *pair.candidates)
            yield {**row, "verdict": list(shares), "judges": sorted(answers[key]), "chosen": pair.chosen}


def agreement(shown: Mapping[str, ShownPair], answers: Answers) -> dict[str, Any]:
    """Measure how far the answers agree.

    Returns:
        pairs, that were answered; answers, by person; first_share: of the answers that are no tie, how many are for the
        candidate shown first, 1/2 where its position does not matter; people: for each two people the pairs that both judged,
        the share of equal verdicts, and Cohen's kappa (1960), None where chance alone gives all; scorer: by how pairs were
        chosen, the pairs that the R-Scorer has compared and whose answers are for one side, and the share of them in which the
        R-Scorer is on the same side (of 1/2 it is on neither).
    """
    verdicts = [verdict for of_pair in answers.values() for verdict in of_pair.values()]
    decided = [verdict for verdict in verdicts if verdict != "tie"]
    people = sorted({by for of_pair in answers.values() for by in of_pair})
    return {
        "pairs": len(answers),
        "answers": dict(Counter(by for of_pair in answers.values() for by in of_pair)),
        "first_share": decided.count("first") / len(decided) if decided else None,
        "people": [{"between": [a, b], **_between(answers, a, b)} for a, b in combinations(people, 2)],
        "scorer": {
            chosen: same_side(
                (pair.scorer, _lead(answers[key].values()))
                for key, pair in shown.items()
                if key in answers and pair.chosen == chosen
            )
            for chosen in ("unsure", "random")
        },
    }


def _one_hot(verdict: str) -> tuple[float, float, float]:
    return float(verdict == "first"), float(verdict == "tie"), float(verdict == "second")


def _between(answers: Answers, a: str, b: str) -> dict[str, Any]:
    """Compare two people over the pairs that both judged."""
    both = [(of_pair[a], of_pair[b]) for of_pair in answers.values() if a in of_pair and b in of_pair]
    if not both:
        return {"pairs": 0, "equal": None, "kappa": None}
    equal = sum(x == y for x, y in both) / len(both)
    of_a, of_b = Counter(x for x, _ in both), Counter(y for _, y in both)
    by_chance = sum(of_a[verdict] * of_b[verdict] for verdict in VERDICTS) / len(both) ** 2
    return {
        "pairs": len(both),
        "equal": equal,
        "kappa": (equal - by_chance) / (1 - by_chance) if by_chance < 1 else None,
    }


def _lead(verdicts: Iterable[str]) -> int:
    """Return by how many answers the first candidate leads."""
    counts = Counter(verdicts)
    return counts["first"] - counts["second"]
