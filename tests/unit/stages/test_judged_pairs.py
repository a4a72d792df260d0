"""Which pairs of a run are judged by people or other models, and how far people's answers agree."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.judged_run import score_row, write_judged_run

from srcfast.data.jsonl import write_shards
from srcfast.data.records import Candidate, Sample
from srcfast.data.verdicts import pair_key, pair_row
from srcfast.errors import InputError
from srcfast.stages.judged_pairs import Judged, choose_pairs, judged_of, read_judged
from srcfast.stages.label_agreement import ShownPair, agreement, read_labels, verdict_rows


def judged(name: str, texts: list[str], confidence: list[float] | None = None, win: float = 0.75) -> Judged:
    candidates = [Candidate(f"{name}#{i}", name, text, "", "", -1.0) for i, text in enumerate(texts)]
    row = None if confidence is None else score_row(name, len(texts), confidence, win)
    return judged_of(Sample(name, (), "Q?", "red"), candidates, row)


def names(pairs: list[Any]) -> set[tuple[str, frozenset[str]]]:
    return {(pair.sample.id, frozenset((pair.first, pair.second))) for pair in pairs}


def test_half_are_those_of_which_the_scorer_is_least_sure_one_a_sample() -> None:
    groups = [
        judged("a", ["x", "y", "z"], [0.9, 0.2, 0.3]),
        judged("b", ["x", "y", "z"], [0.0, 0.5, 0.6]),  # (x, y) was not compared
        judged("c", ["x", "y", "z"], [0.1, 0.15, 0.8]),
    ]
    unsure = [pair for pair in choose_pairs(groups, 4, seed=0) if pair.chosen == "unsure"]
    assert names(unsure) == {("c", frozenset("xy")), ("a", frozenset("xz"))}
    everything = choose_pairs(groups, 100, seed=0)
    assert len(everything) == len(names(everything)) == 9
    assert Counter(pair.chosen for pair in everything) == {"unsure": 3, "random": 6}
    of_b = {frozenset((pair.first, pair.second)): pair.scorer for pair in everything if pair.sample.id == "b"}
    assert of_b[frozenset("xy")] is None and of_b[frozenset("xz")] in (0.75, 0.25)
    for pair in everything:
        if pair.scorer is not None:  # the earlier letter wins by 0.75
            assert pair.scorer == (0.75 if pair.first < pair.second else 0.25)


def test_without_scores_all_are_at_random_and_the_position_tells_nothing() -> None:
    groups = [judged(str(n), ["x", "y", "z", "w"]) for n in range(50)]
    pairs = choose_pairs(groups, 300, seed=1)
    assert len(pairs) == 300 and {pair.chosen for pair in pairs} == {"random"}
    assert 110 < sum(pair.first < pair.second for pair in pairs) < 190
    few = [choose_pairs(groups, 20, seed=seed) for seed in (1, 1, 2)]
    assert few[0] == few[1] and names(few[0]) != names(few[2])
    drawn = Counter(name for seed in range(60) for name, _ in names(choose_pairs(groups, 50, seed=seed)))
    assert set(drawn) == {str(n) for n in range(50)} and max(drawn.values()) < 3 * min(drawn.values())
    assert choose_pairs([judged("one", ["x"]), judged("same", ["x", "x"])], 5, seed=0) == []


def test_texts_count_once_and_take_the_scores_of_their_first_candidate() -> None:
    each = judged("a", ["x", "x", "y"], [0.0, 0.4, 0.7])
    assert each.texts == ["x", "y"] and each.confidence is not None
    assert each.confidence.tolist() == [[0.0, 0.4], [0.4, 0.0]]
    row = score_row("a", 2, [0.5]) | {"candidate_ids": ["a#1", "a#0"]}
    candidates = [Candidate(f"a#{i}", "a", text, "", "", -1.0) for i, text in enumerate("xy")]
    with pytest.raises(InputError, match="scores of these candidates"):
        judged_of(Sample("a", (), "Q?", "red"), candidates, row)


def test_a_run_is_read_with_complete_references_and_its_scores(tmp_path: Path) -> None:
    run = write_judged_run(tmp_path, 3, scores={"s1": [0.5, 0.6, 0.7]})
    groups = read_judged(run)
    assert [each.sample.id for each in groups] == ["s0", "s1", "s2"]
    assert [each.win is None for each in groups] == [True, False, True]
    assert groups[1].sample.facts == ("It is orange.",) and groups[1].sample.image_root == tmp_path
    (tmp_path / "data.jsonl").write_text((tmp_path / "data.jsonl").read_text().replace('"s2"', '"t2"'))
    with pytest.raises(InputError, match="sample 's2'.*a sample of the run's data"):
        read_judged(run)
    with pytest.raises(InputError, match="a run's directory"):
        read_judged(tmp_path)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(InputError, match="a run's directory"):
        read_judged(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_run_without_candidates_is_refused(tmp_path: Path) -> None:
    run = write_judged_run(tmp_path, 1)
    (run / "iteration-1" / "candidates" / "COMPLETE").unlink()
    with pytest.raises(InputError, match="candidates of a round"):
        read_judged(run)
    write_shards(run / "iteration-1" / "candidates", [])
    assert read_judged(run) == []


def shown(count: int, scorer: list[float | None], chosen: list[str]) -> dict[str, ShownPair]:
    pairs = {}
    for n in range(count):
        sample = Sample(f"s{n}", (), "Q?", "red")
        key = pair_key(pair_row(sample, "x", "y"))
        pairs[key] = ShownPair(sample, ("x", "y"), chosen[n], scorer[n])
    return pairs


def test_agreement_of_people_and_with_the_scorer() -> None:
    pairs = shown(6, [0.9, 0.9, 0.1, None, 0.5, 0.6], ["unsure"] * 3 + ["random"] * 3)
    of_anna = ["first", "first", "second", "first", "second", "tie"]
    of_ben = ["first", "second", "second", "tie", "second", None]
    answers = {key: {"anna": a} | ({"ben": b} if b else {}) for key, a, b in zip(pairs, of_anna, of_ben, strict=True)}
    report = agreement(pairs, answers)
    assert report["pairs"] == 6 and report["answers"] == {"anna": 6, "ben": 5}
    assert report["first_share"] == pytest.approx(4 / 9)  # of nine that are no tie
    # 5 pairs, 3 equal. anna: 3 first, 2 second; ben: 1 first, 3 second, 1 tie. By chance (3 * 1 + 2 * 3) / 25 = 0.36.
    assert report["people"] == [
        {"between": ["anna", "ben"], "pairs": 5, "equal": 0.6, "kappa": pytest.approx((0.6 - 0.36) / 0.64)}
    ]
    # Pair 1 has one answer each way, 3 no score, 5 a tie; of 4 the R-Scorer is on neither side.
    assert report["scorer"] == {"unsure": {"pairs": 2, "same_side": 1.0}, "random": {"pairs": 1, "same_side": 0.0}}
    rows = list(verdict_rows(pairs, answers))
    assert [row["verdict"] for row in rows[:2]] == [[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    assert rows[3]["verdict"] == [0.5, 0.5, 0.0] and rows[5]["judges"] == ["anna"]


def test_people_who_say_the_same_of_all_have_no_kappa() -> None:
    pairs = shown(2, [None, None], ["random"] * 2)
    report = agreement(pairs, {key: {"a": "tie", "b": "tie"} for key in pairs})
    assert report["people"][0] == {"between": ["a", "b"], "pairs": 2, "equal": 1.0, "kappa": None}
    assert report["first_share"] is None


@pytest.mark.parametrize(
    ("second", "word"),
    [
        ({"verdict": "left"}, "field 'verdict': expected one of first, tie, second"),
        ({"pair": "f00"}, "field 'pair': expected a pair of the page"),
        ({"by": " "}, "field 'by'"),
        ({"verdict": "second"}, "field 'verdict': expected one answer of anna"),
    ],
    ids=str,
)
def test_answers_that_are_none_are_refused_by_line(second: dict[str, str], word: str, tmp_path: Path) -> None:
    pairs = shown(1, [None], ["random"])
    row = {"pair": next(iter(pairs)), "verdict": "first", "by": "anna"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, row | second)))
    with pytest.raises(InputError, match=f"line 2, {word}"):
        read_labels([tmp_path / "a.jsonl"], pairs)
