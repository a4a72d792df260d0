"""Make further preference pairs from the judged ones, without another response of the model or another verdict.

An object left out (`curation.left_out_negatives`): the chosen response is preferred to itself without one of the sentences of
its perception. What is left may be right, sentence by sentence, and overlooks something: with `dpo.credit: sentence` what is
rejected is that the next sentence comes too early.

The same answer (`curation.rationale_pairs`): the chosen answer is preferred after the chosen rationale to after the rejected one,
and the preference is credited to the answer alone, given the rationale. After RC-DPO (arXiv 2605.27906), as its abstract has it.

A derived pair has the confidence of the judged pair that it is made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from srcfast.config.settings import CurationConfig
from srcfast.data.rationale_format import leave_out_each, normalise_answer, parse_response, with_answer_of
from srcfast.data.records import Preference

# Of the judged pair, what a derived one has as well: its rejected response is no candidate, and has no score.
INHERITED = ("chosen_id", "chosen_right", "chosen_score", "judge_confidence")


def derived_pairs(pairs: Sequence[Preference], settings: CurationConfig, seed: int) -> Iterator[tuple[str, Preference]]:
    """Yield the pairs derived from a sample's judged ones, each behind the name of its count in the funnel.

    seed: with the sample's id it decides which sentences are left out.
    """
    seen: set[str] = set()
    for pair in pairs:
        if settings.left_out_negatives and pair.chosen not in seen:
            seen.add(pair.chosen)
            shortened = leave_out_each(pair.chosen)
            rng = Random(f"left out/{seed}/{pair.sample_id}/{len(seen)}")
            for text in rng.sample(shortened, min(settings.left_out_negatives, len(shortened))):
                yield "left_out_negatives", _derived(pair, text, "left_out")
        if settings.rationale_pairs and _answer(pair.chosen) != _answer(pair.rejected):
            same_answer = with_answer_of(pair.rejected, pair.chosen)
            if same_answer is not None and same_answer != pair.chosen:
                yield "rationale_pairs", replace(_derived(pair, same_answer, "rationale"), credit="answer")


def _derived(pair: Preference, rejected: str, kind: str) -> Preference:
    """Return the pair with this rejected response, whose answer is the chosen one's."""
    extra = {name: pair.extra[name] for name in INHERITED if name in pair.extra}
    return replace(pair, rejected=rejected, extra={**extra, "rejected_right": extra["chosen_right"], "derived": kind})


def _answer(text: str) -> str:
    return normalise_answer(parse_response(text).answer or "")
