"""Ask a language model behind an endpoint which of two candidates is better, in both orders.

It reads what an R-Scorer does, question and reference without pictures, and answers with one character. Where the server gives
the log-probabilities of the answer's first token, the verdict is shares; else what the answer says.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from srcfast.data.records import ReferenceQuality, Sample
from srcfast.data.verdicts import Shares, mean_shares, pair_row, reversed_shares
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget
from srcfast.endpoint.client import Answer, Endpoint, Refused, without_thoughts
from srcfast.endpoint.many import Body, Outcome, Request, ask_many
from srcfast.models.judge_prompt import PROMPTS
from srcfast.run.progress import StageProgress
from srcfast.stages.judged_pairs import RunPair, same_side
from srcfast.stages.scoring import sample_reference

PROMPT = PROMPTS["instructions"]
# Digits: a tokenizer that is not known here has a token for each.
SPELLING = next(spelling for spelling in PROMPT.spellings["choice"] if spelling.words == ("1", "0", "2"))
ALTERNATIVES = 5  # of the first token that are asked for
LEAST_SHARE = 0.5  # of the first token that the verdicts have together, for it to be one
_WORDS = re.compile(r"(?<![\d.])[012](?![\d.]*\d)")
Slot = tuple[int, int]  # a pair's index, and 0 for its order or 1 for the other


@dataclass
class Verdicts:
    """What an endpoint has said.

    Attributes:
        shares: of each pair in each order, for the candidate that stands first in that order.
        reasons: why others have none: "refused", "unanswered", "cut_off", "unreadable".
        sources: how many verdicts are of log-probabilities, and how many of texts.
    """

    shares: dict[Slot, Shares] = field(default_factory=dict)
    reasons: dict[Slot, str] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)


def ask_verdicts(
    endpoint: Endpoint,
    pairs: Sequence[RunPair],
    max_tokens: int,
    log: AnswerLog,
    budget: Budget,
    concurrency: int,
    progress: StageProgress,
    verdicts: Verdicts,
    quality: ReferenceQuality = "complete",
) -> None:
    """Ask for verdicts on pairs in both orders, and put what comes of them into `verdicts`, also where it ends early.

    Requests ask for log-probabilities. One that is refused is sent again without them; where that is answered, no later one
    asks for them.

    Args:
        max_tokens: of an answer.
        quality: what the prompt states of the references.

    Raises:
        LimitReached, EndpointError, Interrupted: see `ask_many`.
    """
    with_logprobs = True
    without: set[Slot] = set()  # requests without log-probabilities

    def following(slot: Slot, outcome: Outcome) -> Request[Slot] | None:
        nonlocal with_logprobs
        if isinstance(outcome, Refused) and slot not in without:
            without.add(slot)
            return request(slot)
        if isinstance(outcome, Answer) and slot in without:
            with_logprobs = False
        take_verdict(verdicts, slot, outcome)
        progress.advance(1, budget.prompt_tokens + budget.completion_tokens - progress.tokens)
        return None

    def request(slot: Slot) -> Request[Slot]:
        pair = pairs[slot[0]]
        texts = (pair.first, pair.second) if slot[1] == 0 else (pair.second, pair.first)
        if not with_logprobs:
            without.add(slot)
        return Request(slot, partial(build_body, pair.sample, *texts, max_tokens, slot not in without, quality))

    slots = [(index, order) for index in range(len(pairs)) for order in (0, 1)]
    ask_many(endpoint, iter([request(slots[0])]), following, log, budget, 1)
    ask_many(endpoint, (request(slot) for slot in slots[1:]), following, log, budget, concurrency)


def build_body(
    sample: Sample,
    first: str,
    second: str,
    max_tokens: int,
    with_logprobs: bool,
    quality: ReferenceQuality = "complete",
) -> Body:
    """Build the chat request that asks which of two candidates is better."""
    text = PROMPT.instruction + sample_reference(sample, quality) + PROMPT.first.format(text=first)
    text += PROMPT.second.format(text=second, replies=SPELLING.replies)
    request: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "temperature": 0.0}
    # What a server answers to either form counts: another one may give log-probabilities, or refuse them.
    content = {**request, "max_tokens": max_tokens}
    if with_logprobs:
        request |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
    return Body(lambda: request, content, len(text) / 3 + 1, max_tokens)


def take_verdict(verdicts: Verdicts, slot: Slot, outcome: Outcome) -> None:
    """Put a verdict, or the reason why there is none, into `verdicts`."""
    if not isinstance(outcome, Answer):
        verdicts.reasons[slot] = "refused" if isinstance(outcome, Refused) else "unanswered"
        return
    shares, source = read_verdict(outcome)
    if shares is None:
        verdicts.reasons[slot] = "cut_off" if outcome.truncated else "unreadable"
        return
    verdicts.shares[slot] = shares
    verdicts.sources[source] += 1
    verdicts.reasons.pop(slot, None)


def read_verdict(answer: Answer) -> tuple[Shares | None, str]:
    """Return an answer's shares of first, tie and second, and whether they are of "logprobs" or "text"; None: it has none.

    Of alternatives of the first token those count that are a verdict but for white space; their probabilities are divided by
    their sum. A text counts whose thoughts are followed by one verdict alone, be it with words around it.
    """
    if answer.first_token is not None:
        sums = dict.fromkeys(SPELLING.words, 0.0)
        for token, logprob in answer.first_token.items():
            if (word := token.strip()) in sums:
                sums[word] += math.exp(logprob)
        total = sum(sums.values())
        if total >= LEAST_SHARE:
            first, tie, second = (sums[word] / total for word in SPELLING.words)
            return (first, tie, second), "logprobs"
    said = set(_WORDS.findall(without_thoughts(answer.text)))
    if len(said) != 1:
        return None, "text"
    first, tie, second = (float(word in said) for word in SPELLING.words)
    return (first, tie, second), "text"


def verdict_rows(pairs: Sequence[RunPair], verdicts: Verdicts, model: str) -> Iterator[dict[str, Any]]:
    """Yield a record for each pair that was judged in both orders; its verdict is their mean, and both stand in `by_order`."""
    for index, pair in enumerate(pairs):
        there, back = (verdicts.shares.get((index, order)) for order in (0, 1))
        if there is not None and back is not None:
            row = pair_row(pair.sample, pair.first, pair.second)
            shares = mean_shares([there, reversed_shares(back)])
            yield {
                **row,
                "verdict": list(shares),
                "by_order": [list(there), list(back)],
                "judges": [model],
                "chosen": pair.chosen,
            }


def verdict_report(pairs: Sequence[RunPair], verdicts: Verdicts) -> dict[str, Any]:
    """Report what came of the pairs.

    Returns:
        pairs; judged, in both orders; dropped: the others that were asked, by reason; sources of verdicts; order_flip_rate: share
        of judged pairs whose verdicts name the same position in both orders; order_shift: mean of p - 1/2 over both orders of the
        judged pairs, p the share of a win of the candidate shown first; scorer: by how pairs were chosen, those that the R-Scorer
        has compared and that are won by one side, and the share in which the R-Scorer is on the same side.
    """
    both = [
        (pair, verdicts.shares[index, 0], verdicts.shares[index, 1])
        for index, pair in enumerate(pairs)
        if (index, 0) in verdicts.shares and (index, 1) in verdicts.shares
    ]
    leads = [(_lead(there), _lead(back)) for _, there, back in both]
    of_pairs = list(zip(both, leads, strict=True))
    dropped: dict[int, str] = {}
    for (index, _), reason in sorted(verdicts.reasons.items()):
        dropped.setdefault(index, reason)
    return {
        "pairs": len(pairs),
        "judged": len(both),
        "dropped": dict(Counter(dropped.values())),
        "sources": dict(verdicts.sources),
        "order_flip_rate": sum(a * b > 0 for a, b in leads) / len(leads) if leads else None,
        "order_shift": sum(a + b for a, b in leads) / (4 * len(leads)) if leads else None,
        "scorer": {
            chosen: same_side((pair.scorer, a - b) for (pair, _, _), (a, b) in of_pairs if pair.chosen == chosen)
            for chosen in ("unsure", "random")
        },
    }


def _lead(shares: Shares) -> float:
    """Return the share of the first less that of the second: 2 p - 1."""
    return shares[0] - shares[2]
