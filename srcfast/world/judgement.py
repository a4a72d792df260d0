"""The result that every oracle returns for a response, from its verdicts on the sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srcfast.data.rationale_format import ParsedResponse, normalise_answer

MOST_LETTERS = 160  # of a claim
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


@dataclass(frozen=True)
class Verdict:
    """The verdict on one sentence; the defaults are those of a sentence that is no claim."""

    kind: str = "unknown"  # or perception, reasoning
    truth: str = "unverifiable"  # or true, false
    follows: bool = True  # from what the response claims to see


def claim_text(sentence: str) -> str | None:
    """Return a sentence as the grammars of claims have it: lower case, single spaces, no full stop. None: it can be no claim."""
    text = " ".join(sentence.split()).lower().removesuffix(".")
    return text if len(text) <= MOST_LETTERS and text.isascii() else None


def sentences_of(response: ParsedResponse) -> tuple[str, ...]:
    """Return a response's sentences of perception, then those of reasoning."""
    return (*response.perception, *response.reasoning)


def judge(
    response: ParsedResponse,
    verdicts: Sequence[Verdict],
    leads_right: Callable[[], bool],
    answer_right: bool,
    leads_to_answer: bool,
) -> Verification:
    """Build the result of a response.

    Args:
        verdicts: one on each sentence of perception, then of reasoning.
        leads_right: whether claims of which none is false suffice for the right answer.
        answer_right: whether the stated answer is right.
        leads_to_answer: whether the claims, if there are some, give the stated answer.
    """
    unknown = [verdict.kind == "unknown" for verdict in verdicts]
    split = len(response.perception)
    perceived = [verdict.truth for verdict in verdicts if verdict.kind == "perception"]
    has_claims = not all(unknown)
    sound = has_claims and not any(unknown) and all(verdict.truth != "false" for verdict in verdicts)
    rationale_right = sound and leads_right()
    leads_to_answer = has_claims and leads_to_answer
    return Verification(
        claims=tuple([(text, v.kind, v.truth) for text, v in zip(sentences_of(response), verdicts, strict=True)]),
        perception_right=bool(perceived) and "false" not in perceived and not any(unknown[:split]),
        reasoning_right=has_claims and all(verdict.follows for verdict in verdicts) and not any(unknown[split:]),
        rationale_right=rationale_right,
        answer_right=answer_right,
        leads_to_answer=leads_to_answer,
        aligned=rationale_right and answer_right and leads_to_answer,
        case=CASES[(0 if rationale_right else 1) if answer_right else (2 if rationale_right else 3)],
    )


def judge_exactly(
    response: ParsedResponse,
    verdicts: Sequence[Verdict],
    derived: str | None,
    gold: str,
    suffices: Callable[[], bool],
) -> Verification:
    """Build the result of a response whose answer has to be that of the question, normalised.

    Args:
        verdicts: as for `judge`.
        derived: the answer to which the response's claims lead; None if they leave it open.
        gold: the right answer.
        suffices: whether claims that lead to the right answer leave nothing open that would change it.
    """
    gold = normalise_answer(gold)
    answer = None if response.answer is None else normalise_answer(response.answer)
    derived = None if derived is None else normalise_answer(derived)
    return judge(
        response,
        verdicts,
        leads_right=lambda: derived == gold and suffices(),
        answer_right=answer == gold,
        leads_to_answer=answer is not None and derived == answer,
    )
