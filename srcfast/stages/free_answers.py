"""Free answers, scored by a judge behind an OpenAI-compatible endpoint in the form of LLaVA-Bench (Liu et al. 2023, 2304.08485).

The judge reads what is known of the picture, the question, the reference's answer and the model's, and gives each from 1 to 10.
It is asked twice, with the two answers in both orders, and their scores are averaged, so that a preference for the first or the
second answer cancels out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srcfast.config.settings import Config
from srcfast.data.answer_rules import JudgeScores
from srcfast.data.jsonl import json_hash
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.data.vlmeval import QUESTION_KEY
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget, Limit
from srcfast.endpoint.client import Answer, Endpoint, Unanswered, without_thoughts
from srcfast.endpoint.many import Body, Outcome, Request, ask_many
from srcfast.errors import ConfigError, SrcfastError

SYSTEM = "You judge the quality of answers, precisely and without bias."
PROMPT = """\
{context}[Question]
{question}

[Assistant 1]
{first}
[End of Assistant 1]

[Assistant 2]
{second}
[End of Assistant 2]

[System]
Two AI assistants have answered the question above, which a user asks about a picture. Under Context stand sentences that \
describe the picture, where there are some. Rate the helpfulness, relevance, accuracy and level of detail of each answer by a \
score from 1 to 10; the better an answer, the higher its score. The order of the answers must not matter.
Write two numbers alone in the first line of your reply, the score of Assistant 1 and that of Assistant 2, with a space between. \
Explain the scores in the lines below."""
SAMPLING = {"temperature": 0.0, "seed": 0}
_SCORES = re.compile(r"(\d{1,2}(?:\.\d{1,4})?)(?: |, ?)(\d{1,2}(?:\.\d{1,4})?)", re.ASCII)

Judgements = dict[str, JudgeScores | str]  # sample id -> its scores, or why the judge gave none


def prompt_hash() -> str:
    """Return the SHA-256 of all that a judge is asked beside the answers."""
    return json_hash([SYSTEM, PROMPT, SAMPLING])


def judge_endpoint(config: Config) -> Endpoint:
    """Return the judge that the settings name.

    Raises:
        ConfigError: they name none, or an address that is none.
    """
    settings = config.evaluation
    for name in ("judge_endpoint", "judge_model"):
        if getattr(settings, name) is None:
            expected = "a judge, since an evaluation set has the rule judge"
            raise ConfigError(f"evaluation.{name}: expected {expected}, found none. Fix: name it, or another rule")
    url, model = str(settings.judge_endpoint), str(settings.judge_model)
    return Endpoint.from_environment(url, model, Endpoint.timeout, option="evaluation.judge_endpoint")


def free_answer(text: str) -> str | None:
    """Return the answer that a response states, or, where it has no rationale and answer, all of it; None: it is empty."""
    return parse_response(text).answer or text.strip() or None


def judge_answers(config: Config, answered: Iterable[tuple[Sample, str | None]], asked: Path) -> Judgements:
    """Have answers scored; what was asked before, by the log in the directory `asked`, is not asked again.

    Raises:
        LimitReached, EndpointError, Interrupted: see `ask_many`.
        SrcfastError: the judge left requests unanswered.
    """
    settings = config.evaluation
    outcomes: dict[str, dict[bool, Outcome]] = {}

    def following(owner: tuple[str, bool], outcome: Outcome) -> None:
        sample, is_swapped = owner
        outcomes.setdefault(sample, {})[is_swapped] = outcome

    requests = (
        Request((sample.id, is_swapped), partial(_body, sample, answer or "", is_swapped, settings.judge_max_tokens))
        for sample, answer in answered
        for is_swapped in (False, True)
    )
    limits = [Limit("tokens", settings.judge_token_limit)] if settings.judge_token_limit else []
    log = AnswerLog(asked / "answers.jsonl")
    try:
        budget = Budget(limits, log.prompt_tokens, log.completion_tokens)
        ask_many(judge_endpoint(config), requests, following, log, budget, settings.judge_concurrency)
    finally:
        log.close()
    unanswered = sum(isinstance(one, Unanswered) for both in outcomes.values() for one in both.values())
    if unanswered:
        raise SrcfastError(
            f"{asked}: the judge left {unanswered} requests unanswered. Fix: the same command asks them again"
        )
    return {sample: read_judgement(both[False], both[True]) for sample, both in outcomes.items()}


def _body(sample: Sample, answer: str, is_swapped: bool, max_tokens: int) -> Body:
    """Build the request for a sample's scores, the reference's answer first, or swapped."""
    answers = (answer, sample.answer) if is_swapped else (sample.answer, answer)
    caption = sample.extra.get("caption")
    lines = [caption] if isinstance(caption, str) else caption if isinstance(caption, list) else []
    context = "\n".join(line for line in lines if isinstance(line, str)).strip()
    question = str(sample.extra.get(QUESTION_KEY, sample.question))
    context = f"[Context]\n{context}\n\n" if context else ""
    text = PROMPT.format(context=context, question=question, first=answers[0], second=answers[1])
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    content: dict[str, Any] = {"messages": messages, **SAMPLING}
    return Body(lambda: content, content | {"max_tokens": max_tokens}, len(text) / 3 + 1, max_tokens)


def read_judgement(outcome: Outcome, swapped: Outcome) -> JudgeScores | str:
    """Return a sample's scores, means over both orders; or why there are none: "refused", or "unreadable" in either order."""
    pairs: list[Sequence[float]] = []
    for one in (outcome, swapped):
        if not isinstance(one, Answer):
            return "refused"
        scores = parse_scores(one.text)
        if scores is None:
            return "unreadable"
        pairs.append(scores)
    (reference, prediction), (prediction_first, reference_second) = pairs
    return JudgeScores((reference + reference_second) / 2, (prediction + prediction_first) / 2)


def parse_scores(reply: str) -> tuple[float, float] | None:
    """Read the two numbers of a reply's first line, each from 1 to 10, and nothing else there; None: they are not there."""
    first_line = without_thoughts(reply).strip().partition("\n")[0].strip()
    match = _SCORES.fullmatch(first_line)
    scores = (float(match[1]), float(match[2])) if match else None
    return scores if scores is not None and all(1 <= score <= 10 for score in scores) else None
