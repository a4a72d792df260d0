"""Choose the tokens of a preference pair that its preference is credited to: whole responses, or a span of each.

    response   all tokens (`Preference.credit` None)
    sentence   the first sentence in which the two part: from the first token that differs to the end of that sentence
    answer     what follows the rationale: the same answer is then preferred after the better rationale

Delta is the same formula with sums over these tokens. What both responses begin with cancels in it, so a span begins where
they part at the earliest. The likelihood that `sft_weight` weighs is the whole chosen response's in any case.

A sentence ends where generation ends it (`srcfast.generation.sentences`), so a candidate's spans are what the search wrote.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from srcfast.data.forest import Forest, Tree
from srcfast.data.rationale_format import answer_position
from srcfast.data.records import Preference
from srcfast.errors import InputError
from srcfast.generation.sentences import SentenceEnds
from srcfast.models.protocols import VisionLanguageModel

Spans = tuple[tuple[int, int], tuple[int, int]]  # [start, end) in the chosen and in the rejected end of a pair's tree


def credited(preferences: Sequence[Preference], credit: str) -> list[Preference]:
    """Return the pairs with the setting `dpo.credit`; those of the answer alone stay so.

    A pair whose credit changes loses the reference of its spans, which belongs to the former ones.
    """
    wanted = None if credit == "response" else credit
    return [
        pair
        if pair.credit in (wanted, "answer")
        else replace(pair, credit=wanted, reference_chosen_span_logprob=None, reference_rejected_span_logprob=None)
        for pair in preferences
    ]


def credited_spans(model: VisionLanguageModel, pair: Preference, tree: Tree) -> Spans | None:
    """Return the spans of a pair's tree that its credit names; None for whole responses.

    Raises:
        InputError: the answer is credited, and a response has none.
    """
    if pair.credit is None:
        return None
    chosen, rejected = (segment.tokens.tolist() for segment in tree.segments[-2:])
    shared = tree.segments[1].tokens.tolist() if len(tree.segments) == 4 else []
    ends = []
    for name, end in (("chosen", chosen), ("rejected", rejected)):
        tokens = shared + end
        if pair.credit == "sentence":
            sentence_ends = SentenceEnds.of(model.tokenizer, len(model.decoder.head_weight)).cut(tokens)
            span = (len(shared), next(position for position in sentence_ends if position > len(shared)))
        else:
            span = (max(len(shared), _answer_start(model, pair, name, tokens)), len(tokens))
        ends.append((span[0] - len(shared), span[1] - len(shared)))
    return ends[0], ends[1]


def _answer_start(model: VisionLanguageModel, pair: Preference, name: str, tokens: Sequence[int]) -> int:
    """Return the number of tokens before the one in which the mark of the answer begins."""
    position = answer_position(model.tokenizer.decode(list(tokens)))
    if position is None:
        raise InputError(
            sample_id=pair.sample_id,
            field=name,
            expected="a response with an answer, to which the pair's credit is given",
            found=getattr(pair, name),
            fix="leave `credit` out of this pair",
        )
    return bisect_right(
        range(len(tokens)), position, key=lambda count: len(model.tokenizer.decode(list(tokens[: count + 1])))
    )


def credited_tokens(forest: Forest, spans: Sequence[Spans | None]) -> np.ndarray | None:
    """Return the indices, among a forest's response tokens as `pair_rows` has them, of those that are credited, [C] int64.

    None where all are. A tree without spans is credited whole.
    """
    if not any(spans):
        return None
    parts, first = [], 0
    for tree, of_tree in zip(forest.trees, spans, strict=True):
        sizes = [segment.tokens.size for segment in tree.segments[1:]]
        if of_tree is None:
            parts.append(np.arange(first, first + sum(sizes)))
        else:
            ends = (first + sum(sizes[:-2]), first + sum(sizes[:-1]))  # where the chosen and the rejected end begin
            parts += [np.arange(at + start, at + end) for at, (start, end) in zip(ends, of_tree, strict=True)]
        first += sum(sizes)
    return np.concatenate(parts)
