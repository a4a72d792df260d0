"""Pairs that are derived from judged ones: an object left out, and the same answer after the worse rationale."""

from __future__ import annotations

from typing import Any

from test_curation import LOOSE, candidate, row, run

from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Preference

THINK = "</see> <think> So it is. </think>"
RED = f"<see> A cup. A red ball. A dog. {THINK} <answer> red </answer>"
BLUE = f"<see> A cup. A blue ball. {THINK} <answer> blue </answer>"
ALSO_RED = f"<see> A red ball. {THINK} <answer> Red. </answer>"


def curated(texts: list[str], scores: list[float], **settings: Any) -> tuple[list[Preference], dict[str, Any]]:
    own = [candidate(number, parse_response(text).answer, text) for number, text in enumerate(texts)]
    return run(own, [row(own, scores, 0.6)], LOOSE.replace(**settings))


def test_by_default_nothing_is_derived() -> None:
    pairs, funnel = curated([RED, BLUE], [0.9, 0.1])
    assert [pair.rejected for pair in pairs] == [BLUE] and "left_out_negatives" not in funnel


def test_the_chosen_is_preferred_to_itself_without_a_sentence_of_its_perception() -> None:
    shortened = {
        f"<see> A red ball. A dog. {THINK} <answer> red </answer>",
        f"<see> A cup. A dog. {THINK} <answer> red </answer>",
        f"<see> A cup. A red ball. {THINK} <answer> red </answer>",
    }
    drawn = set()
    for wanted in (1, 2, 3, 9):
        pairs, funnel = curated([RED, BLUE], [0.9, 0.1], left_out_negatives=wanted)
        (judged, *derived) = pairs
        assert judged.rejected == BLUE and funnel["kept"] == 1
        assert len(derived) == funnel["left_out_negatives"] == min(3, wanted)
        assert {pair.rejected for pair in derived} <= shortened and len({pair.rejected for pair in derived}) == len(
            derived
        )
        assert {(pair.chosen, pair.confidence, pair.credit) for pair in derived} == {(RED, 0.6, None)}
        assert derived[0].extra == {
            "chosen_id": "s/0",
            "chosen_right": True,
            "chosen_score": 0.9,
            "judge_confidence": 0.6,
            "rejected_right": True,
            "derived": "left_out",
        }
        drawn |= {pair.rejected for pair in derived}
    assert drawn == shortened
    assert curated([RED, BLUE], [0.9, 0.1], left_out_negatives=2) == curated(
        [RED, BLUE], [0.9, 0.1], left_out_negatives=2
    )


def test_a_chosen_response_of_several_pairs_is_shortened_once_and_one_sentence_never() -> None:
    texts = [RED, BLUE, ALSO_RED]
    pairs, funnel = curated(texts, [0.9, 0.1, 0.2], left_out_negatives=1, pairs_per_sample=2)
    assert (funnel["kept"], funnel["left_out_negatives"], len(pairs)) == (2, 1, 3)
    pairs, funnel = curated([ALSO_RED, BLUE], [0.9, 0.1], left_out_negatives=5)
    assert (funnel["kept"], funnel["left_out_negatives"], len(pairs)) == (1, 0, 1)


def test_the_same_answer_is_preferred_after_the_better_rationale() -> None:
    pairs, funnel = curated([RED, BLUE], [0.9, 0.1], rationale_pairs=True)
    judged, derived = pairs
    assert (judged.credit, derived.credit) == (None, "answer")
    assert (derived.chosen, derived.confidence) == (RED, 0.6)
    assert derived.rejected == f"<see> A cup. A blue ball. {THINK} <answer> red </answer>"
    assert derived.extra["derived"] == "rationale" and funnel["rationale_pairs"] == 1
    assert funnel["pair_correctness"]["right_over_wrong"] == 1.0  # of judged pairs


def test_one_answer_in_two_spellings_makes_no_rationale_pair() -> None:
    pairs, funnel = curated([RED, ALSO_RED], [0.9, 0.1], rationale_pairs=True)
    assert len(pairs) == funnel["kept"] == 1 and funnel["rationale_pairs"] == 0


def test_a_derived_pair_that_has_no_room_is_counted_as_dropped() -> None:
    from test_curation import sample

    from srcfast.stages.curation import curate

    own: list[Candidate] = [candidate(0, "red", RED), candidate(1, "blue", BLUE)]
    settings = LOOSE.replace(left_out_negatives=1, rationale_pairs=True)
    pairs, funnel = curate(
        [sample()], {"s": own}, [row(own, [0.9, 0.1], 0.6)], settings, 0, lambda pair: "derived" not in pair.extra
    )
    assert len(pairs) == funnel["kept"] == 1 and funnel["dropped"]["does_not_fit"] == 2
    assert funnel["left_out_negatives"] == funnel["rationale_pairs"] == 0
