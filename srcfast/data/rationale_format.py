"""The one format and the one parser of rationale-answer responses.

    tagged  <see> What is seen. </see> <think> What follows. </think> <answer> A </answer>
    plain   What is seen. What follows. Answer: A

Baselines and every model's output go through the same parser; what it cannot read counts as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srcfast.errors import InputError

Format = Literal["tagged", "plain"]
BARE_ANSWER_WORDS = 5  # a response without marks is an answer if it is this short

_TAGGED = re.compile(
    r"\s*<see>(?P<see>[^<]*)</see>\s*(?:<think>(?P<think>[^<]*)</think>\s*)?<answer>(?P<answer>[^<]*)</answer>\s*"
)
_ANSWER_MARK = re.compile(r"\bAnswer:", re.IGNORECASE)
_ANY_TAG = re.compile(r"</?(?:see|think|answer)>")
_BOUNDARY = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|Dr|Mr|Mrs|Ms|Prof|St|vs|etc|approx|Fig|No|cf)|\b[A-Z](?:\.[A-Z])*)\.$")
_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}


@dataclass(frozen=True)
class ParsedResponse:
    """A response taken apart; `answer` is None where it could not be read."""

    perception: tuple[str, ...]
    reasoning: tuple[str, ...]
    answer: str | None

    @property
    def has_rationale(self) -> bool:
        return bool(self.perception or self.reasoning)

    @property
    def rationale(self) -> str:
        """All sentences, joined."""
        return " ".join((*self.perception, *self.reasoning))


UNPARSED = ParsedResponse((), (), None)


def format_response(see: Sequence[str], think: Sequence[str], answer: str, format: Format) -> str:
    """Write a response. Raises InputError where a part would not be read back (tags in a sentence, an empty answer)."""
    for part in (*see, *think, answer):
        if _ANY_TAG.search(part) or not part.strip():
            raise InputError(field="rationale", expected="non-empty sentences without response tags", found=repr(part))
    if format == "plain":
        return " ".join((*see, *think, f"Answer: {answer}"))
    parts = ["<see>", *see, "</see>"]
    if think:
        parts += ["<think>", *think, "</think>"]
    return " ".join((*parts, "<answer>", answer, "</answer>"))


def parse_response(text: str) -> ParsedResponse:
    """Read a tagged, plain or bare response; linear in its length, never raises.

    A tagged response has each block at most once, in order, the answer last and nothing after it. A plain one has one
    `Answer:` and a single line behind it. A bare one is a single line of at most five words.
    """
    if _ANY_TAG.search(text):
        match = _TAGGED.fullmatch(text)
        if match is None or not match["answer"].strip():
            return UNPARSED
        think = split_sentences(match["think"] or "")
        return ParsedResponse(tuple(split_sentences(match["see"])), tuple(think), match["answer"].strip())
    marks = list(_ANSWER_MARK.finditer(text))
    if marks:
        answer = text[marks[0].end() :].strip()
        if len(marks) > 1 or not answer or "\n" in answer:
            return UNPARSED
        return ParsedResponse((), tuple(split_sentences(text[: marks[0].start()])), answer)
    bare = text.strip()
    if bare and "\n" not in bare and len(bare.split()) <= BARE_ANSWER_WORDS:
        return ParsedResponse((), (), bare)
    return UNPARSED


def split_sentences(text: str) -> list[str]:
    """Sentences of a text; decimals ("3.5") and abbreviations ("e.g.", "Dr.") do not end one."""
    sentences: list[str] = []
    start = 0
    for boundary in _BOUNDARY.finditer(text):
        piece = text[start : boundary.start()]
        if "\n" not in boundary.group() and _ABBREVIATION.search(piece[-16:]):
            continue
        if piece.strip():
            sentences.append(piece.strip())
        start = boundary.end()
    if text[start:].strip():
        sentences.append(text[start:].strip())
    return sentences


def normalise_answer(text: str) -> str:
    """Answers are equal if these are: case, final period, articles, number words and "grey" do not matter."""
    words = text.strip().lower().strip(" .!\"'").split()
    words = [_NUMBER_WORDS.get(word, "gray" if word == "grey" else word) for word in words]
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)
