"""The result that every oracle returns for a response."""

from __future__ import annotations

from dataclasses import dataclass

CASES = ("both_right", "right_answer_wrong_rationale", "right_rationale_wrong_answer", "both_wrong")


@dataclass(frozen=True)
class Verification:
    """The oracle's result for one response."""

    claims: tuple[tuple[str, str, str], ...]  # sentence, kind (or unknown), true | false | unverifiable
    perception_right: bool  # there are perception claims, and none is false
    reasoning_right: bool  # there are claims, and all conclusions follow from the perception claims
    rationale_right: bool  # no sentence is false or unparsed, and together they suffice for the gold answer
    answer_right: bool
    leads_to_answer: bool  # the claims give the stated answer
    aligned: bool  # a right rationale that leads to a right answer
    case: str  # one of CASES


def case_of(answer_right: bool, rationale_right: bool) -> str:
    """Return the case of CASES."""
    return CASES[(0 if rationale_right else 1) if answer_right else (2 if rationale_right else 3)]
