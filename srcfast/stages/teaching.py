"""Teaching: rationales for samples that have none, written by a model behind an endpoint, or here (`local_teaching`).

The model sees pictures and question, never the gold answer, and states rationale and answer. A draw is taken if its answer is the
gold one and stage 1 can train on it; a sample is asked again, at most `draws` times, until one is (rejection sampling as in STaR,
Zelikman et al. 2022, arXiv 2203.14465, without its rationalisation, in which the model is told the answer).
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from PIL import Image

from srcfast.data.answers import is_right
from srcfast.data.images import load_image
from srcfast.data.rationale_format import ParsedResponse, parse_response, tagged_rationale
from srcfast.data.rationale_pairs import TeacherRationale, build_raps
from srcfast.data.records import Sample
from srcfast.data.turns import messages_of
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget
from srcfast.endpoint.client import Answer, Endpoint, Refused
from srcfast.endpoint.many import Body, Outcome, Request, ask_many
from srcfast.errors import InputError
from srcfast.run.progress import StageProgress

INSTRUCTIONS = """\
Answer the question about what is shown. Reply in this form, with nothing before it and nothing after it:
<see> What is seen that the answer depends on, a short sentence for each thing. </see> \
<think> What follows from it, step by step, in short sentences. </think> \
<answer> The answer alone, a word, a number or a short phrase. </answer>
Write in the language of the question."""
PATCH = 28 * 28  # pixels that a model has about one token for
LONGEST_SIDE = 2048  # pixels of a picture that is sent; a larger one is scaled down
LOSSLESS = 512 * 512  # pixels up to which a picture is sent as PNG; larger ones as JPEG of this quality:
QUALITY = 92
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>(?=\s*<see>)", re.DOTALL)  # of a model that thinks before it replies


@dataclass(frozen=True)
class Drawing:
    """How a sample is asked: at most `draws` times, each with another seed."""

    draws: int = 4
    temperature: float = 0.7
    max_tokens: int = 768


@dataclass
class Taught:
    """What came of the samples.

    Attributes:
        entries: by sample id.
        reasons: of each other sample that was asked, why its last draw was not taken.
        draws: how many draws were taken, and how many were not, by reason.
    """

    entries: dict[str, TeacherRationale] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    draws: Counter[str] = field(default_factory=Counter)


def needs_no_teacher(sample: Sample) -> str | None:
    """Return why a sample is not to be asked: it has a rationale, or no answer to compare with; None: it is."""
    if sample.rationale and sample.rationale.strip():
        return "has_rationale"
    return None if sample.answer.strip() else "no_answer"


def teach(
    endpoint: Endpoint,
    samples: Sequence[Sample],
    drawing: Drawing,
    log: AnswerLog,
    budget: Budget,
    concurrency: int,
    progress: StageProgress,
    taught: Taught,
) -> None:
    """Ask for rationales of samples, and put what comes of them into `taught`, also where it ends early.

    Raises:
        LimitReached, EndpointError, Interrupted: see `ask_many`.
    """

    def following(owner: tuple[Sample, int], outcome: Outcome) -> Request[tuple[Sample, int]] | None:
        sample, draw = owner
        taken = take_draw(taught, sample, outcome)
        if not taken and isinstance(outcome, Answer) and draw + 1 < drawing.draws:
            return request_of(sample, draw + 1, drawing)
        progress.advance(1, budget.prompt_tokens + budget.completion_tokens - progress.tokens)
        return None

    asked = (request_of(sample, 0, drawing) for sample in samples)
    ask_many(endpoint, asked, following, log, budget, concurrency)


def take_draw(taught: Taught, sample: Sample, outcome: Outcome) -> bool:
    """Return whether a draw is taken, and put it, or the reason why it isn't, into `taught`."""
    entry, reason = read_draw(sample, outcome)
    taught.draws[reason or "taken"] += 1
    if entry is None:
        taught.reasons[sample.id] = reason
        return False
    taught.entries[sample.id] = entry
    taught.reasons.pop(sample.id, None)
    return True


def read_draw(sample: Sample, outcome: Outcome) -> tuple[TeacherRationale | None, str]:
    """Return a draw's rationale and answer, or None and why it is not taken.

    Reasons: "refused" (by the endpoint), "unanswered" (all attempts failed), "unreadable_image", "cut_off" (by the limit of
    tokens), "unreadable" (no rationale and answer), "no_rationale" (the answer alone), "wrong_answer", and those of `build_raps`.
    """
    if not isinstance(outcome, Answer):
        kinds = {Refused: "refused", InputError: "unreadable_image"}
        return None, kinds.get(type(outcome), "unanswered")
    parsed = parse_response(_THOUGHTS.sub("", outcome.text).strip())
    if parsed.answer is None:
        return None, "cut_off" if outcome.truncated else "unreadable"
    if not parsed.has_rationale:
        return None, "no_rationale"
    if not is_right(sample, parsed.answer):
        return None, "wrong_answer"
    entry = TeacherRationale(rationale_text(parsed), parsed.answer)
    _, dropped = build_raps([sample], teacher={sample.id: entry})
    return (None, next(iter(dropped))) if dropped else (entry, "")


def rationale_text(parsed: ParsedResponse) -> str:
    """Write a parsed rationale as a teacher's file has it: with tags if it says what was seen, else its sentences alone."""
    return tagged_rationale(parsed.perception, parsed.reasoning) if parsed.perception else parsed.rationale


def instructed(sample: Sample) -> Sample:
    """Return a sample whose question is followed by the instructions: chat templates of several families know no system text."""
    return replace(sample, question=f"{sample.question}\n\n{INSTRUCTIONS}")


def request_of(sample: Sample, draw: int, drawing: Drawing) -> Request[tuple[Sample, int]]:
    """Return the request for a draw."""
    return Request((sample, draw), partial(build_body, sample, draw, drawing))


def build_body(sample: Sample, draw: int, drawing: Drawing) -> Body:
    """Build the chat request for a draw: turns, question and instructions, pictures where they stand.

    Raises:
        InputError: a picture can't be read.
    """
    sample = instructed(sample)
    pictures = [load_image(sample.image_root, name) for name in sample.images]
    sampling: dict[str, Any] = {"temperature": drawing.temperature, "seed": draw}
    messages = messages_of(sample.turns, sample.question, len(pictures))

    def body() -> dict[str, Any]:
        return {"messages": _with_pictures(messages, list(map(_data_url, pictures))), **sampling}

    hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
    content = {"messages": _with_pictures(messages, hashes), **sampling, "max_tokens": drawing.max_tokens}
    characters = len(sample.question) + sum(len(turn.text) for turn in sample.turns)
    pixels = sum(min(picture.width * picture.height, LONGEST_SIDE**2) for picture in pictures)
    return Body(body, content, characters / 3 + pixels / PATCH + 1, drawing.max_tokens)


def _with_pictures(messages: Sequence[dict[str, Any]], urls: Sequence[str]) -> list[dict[str, Any]]:
    """Return messages as an endpoint takes them: each picture by its URL, texts without pictures as texts alone."""
    following = iter(urls)

    def part_of(part: dict[str, str]) -> dict[str, Any]:
        return part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(following)}}

    with_pictures = []
    for message in messages:
        parts = [part_of(part) for part in message["content"]]
        is_text = len(parts) == 1 and parts[0]["type"] == "text"
        with_pictures.append({"role": message["role"], "content": parts[0]["text"] if is_text else parts})
    return with_pictures


def _data_url(picture: Image.Image) -> str:
    """Return a picture as a data URL: small ones without loss, photographs as JPEG."""
    if max(picture.size) > LONGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    media, options = ("png", {}) if picture.width * picture.height <= LOSSLESS else ("jpeg", {"quality": QUALITY})
    buffer = io.BytesIO()
    picture.save(buffer, media, **options)
    return f"data:image/{media};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def rows_in_order(samples: Sequence[Sample], taught: Taught) -> Iterator[dict[str, str]]:
    """Yield the lines of a teacher's file, in the order of the samples."""
    for sample in samples:
        if (entry := taught.entries.get(sample.id)) is not None:
            yield {"id": sample.id, "rationale": entry.rationale, "answer": entry.answer or ""}
