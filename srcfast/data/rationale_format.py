"""Format and parse rationale-answer responses.

    tagged  <see> What is seen. </see> <think> What follows. </think> <answer> A </answer>
    plain   What is seen. What follows. Answer: A

The outputs of baselines and of every model go through the same parser; a response that it cannot read counts as unparsed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srcfast.data.sentence_marks import CLOSERS, STOPS, WIDE_FULL_STOP
from srcfast.errors import InputError

Format = Literal["tagged", "plain"]
BARE_ANSWER_WORDS = 5  # a response without tags or "Answer:" is an answer if it has at most so many words
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han. Their words have about three letters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)

_ANY_TAG = re.compile(r"(</?(?:see|think|answer)>)")
_TAGS = (
    ["<see>", "</see>", "<answer>", "</answer>"],
    ["<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>"],
)
# "Answer:" in a dozen languages. Models like to print it bold.
_ANSWER_WORDS = (
    r"\b(?:Answer|Antwort|R\u00e9ponse|Respuesta|Risposta|Resposta|Antwoord|Odpowied\u017a|\u041e\u0442\u0432\u0435\u0442|Cevap)"
    "|\u7b54\u6848|\u7b54\u3048|\u56de\u7b54|\uc815\ub2f5|\ub2f5|\u0627\u0644\u0625\u062c\u0627\u0628\u0629|\u0909\u0924\u094d\u0924\u0930|\u0e04\u0e33\u0e15\u0e2d\u0e1a"
)
_ANSWER_MARK = re.compile(rf"(?:\*\*)?(?:{_ANSWER_WORDS})[ \u00a0]?[:\uff1a](?:\*\*)?", re.IGNORECASE)
_LIST_MARKER = re.compile(r"\(?(?:\d{1,3}|[A-Za-z])[.)]")
_CLOSING = f"[{re.escape(CLOSERS)}]*"
_BOUNDARY = re.compile(rf"(?<=[.!?]){_CLOSING}\s+|(?:(?<=[{STOPS}])|(?<=[^\d]{WIDE_FULL_STOP})){_CLOSING}\s*|\n+")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|Dr|Mr|Mrs|Ms|Prof|St|vs|etc|approx|Fig|No|cf)|\b[A-Z](?:\.[A-Z])*)\.$")
_FINAL = "\u3002\u0964\u06d4"  # full stops of other scripts, behind an answer
_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}


@dataclass(frozen=True)
class ParsedResponse:
    """The sentences and the answer of a response; `answer` is None if the response could not be parsed."""

    perception: tuple[str, ...]
    reasoning: tuple[str, ...]
    answer: str | None

    @property
    def has_rationale(self) -> bool:
        """Whether there is any sentence."""
        return bool(self.perception or self.reasoning)

    @property
    def rationale(self) -> str:
        """All sentences, joined by spaces."""
        return " ".join((*self.perception, *self.reasoning))


UNPARSED = ParsedResponse((), (), None)


def format_response(see: Sequence[str], think: Sequence[str], answer: str, format: Format) -> str:
    """Write a response that `parse_response` reads back.

    Raises:
        InputError: a sentence or the answer is empty or contains a response tag; in plain format, also if there is a second
            "Answer:" or an answer of several lines.
    """
    if format == "plain":
        text = " ".join((*see, *think, f"Answer: {answer}"))
    else:
        text = f"{tagged_rationale(see, think)} <answer> {answer} </answer>"
    sentences = (*see, *think)
    parsed = parse_response(text)
    is_same = parsed.rationale.split() == " ".join(sentences).split() and parsed.answer == answer.strip()
    if not is_same or not all(sentence.strip() for sentence in sentences):
        raise InputError(
            field="rationale",
            expected=f"sentences and an answer that a {format} response can hold: not empty, without tags",
            found=repr(text),
        )
    return text


def bare_answer(answer: str) -> str:
    """Write a response of an answer alone, which `parse_response` reads back: an answer of many words gets a mark."""
    bare = " ".join(answer.split())
    return bare if parse_response(bare) == ParsedResponse((), (), bare) else f"Answer: {bare}"


def tagged_rationale(see: Sequence[str], think: Sequence[str]) -> str:
    """Write a rationale with its tags; without reasoning sentences there is no <think> block."""
    reasoning = ("<think>", *think, "</think>") if think else ()
    return " ".join(("<see>", *see, "</see>", *reasoning))


def untagged_sentences(rationale: str) -> list[str]:
    """Split a rationale into its sentences, without tags."""
    return split_sentences(_ANY_TAG.sub("\n", rationale))


def parse_response(text: str) -> ParsedResponse:
    """Parse a tagged, plain or bare response in time linear in its length; never raises.

    A tagged response has each block at most once, in order, the answer last and nothing after it. A plain one has one
    `Answer:`, in one of a dozen languages, and a single line after it. A bare one is a single line of at most five words.
    """
    pieces = _ANY_TAG.split(text)  # text, tag, text, tag, ..., text
    if len(pieces) > 1:
        texts, tags = pieces[::2], pieces[1::2]
        if tags not in _TAGS or any(outside.strip() for outside in texts[::2]) or not texts[-2].strip():
            return UNPARSED
        think = split_sentences(texts[3]) if len(tags) == 6 else []
        return ParsedResponse(tuple(split_sentences(texts[1])), tuple(think), texts[-2].strip())
    mark = _ANSWER_MARK.search(text)
    if mark:
        answer = text[mark.end() :].strip()
        if not answer or "\n" in answer or _ANSWER_MARK.search(answer):
            return UNPARSED
        return ParsedResponse((), tuple(split_sentences(text[: mark.start()])), answer)
    bare = text.strip()
    if bare and "\n" not in bare and len(bare.split()) + len(_UNSPACED.findall(bare)) // 3 <= BARE_ANSWER_WORDS:
        return ParsedResponse((), (), bare)
    return UNPARSED


def answer_position(text: str) -> int | None:
    """Return where a tagged or plain response's answer begins, its mark included; None where it has no mark."""
    if "<answer>" in text:
        return text.rindex("<answer>")
    marks = list(_ANSWER_MARK.finditer(text))
    return marks[-1].start() if marks else None


def leave_out_each(text: str) -> list[str]:
    """Return a tagged response without the first, the second, ... sentence of its perception; else as it is.

    Empty where it has no two such sentences. One that occurs twice is not left out: the other still says it.
    """
    pieces = _ANY_TAG.split(text)
    sentences = parse_response(text).perception
    if len(sentences) < 2:
        return []
    seen, starts, end = pieces[2], [], 0
    for sentence in sentences:
        starts.append(seen.index(sentence, end))
        end = starts[-1] + len(sentence)
    # The last one goes with the space before it, the others with that behind them.
    cuts = [*zip(starts, starts[1:], strict=False), (starts[-2] + len(sentences[-2]), end)]
    return [
        "".join((*pieces[:2], seen[:start] + seen[stop:], *pieces[3:]))
        for sentence, (start, stop) in zip(sentences, cuts, strict=True)
        if sentences.count(sentence) == 1
    ]


def with_answer_of(text: str, other: str) -> str | None:
    """Return a response with another's answer behind its rationale; None where the two are not of one format."""
    at, at_other = answer_position(text), answer_position(other)
    if at is None or at_other is None or ("<answer>" in text) != ("<answer>" in other):
        return None
    joined = text[:at] + other[at_other:]
    return joined if parse_response(joined).answer == parse_response(other).answer else None


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, in any script; decimals ("3.5"), abbreviations ("e.g.") and list markers ("2.") end none."""
    sentences: list[str] = []
    start = 0
    for boundary in _BOUNDARY.finditer(text):
        end = boundary.start()
        if "\n" not in boundary.group():
            if _ABBREVIATION.search(text[max(start, end - 8) : end]):
                continue
            if end - start < 8 and _LIST_MARKER.fullmatch(text[start:end].strip()):
                continue
        # A closing quotation mark or bracket belongs to the sentence.
        closed = end + len(boundary.group().rstrip())
        if text[start:closed].strip():
            sentences.append(text[start:closed].strip())
        start = boundary.end()
    if text[start:].strip():
        sentences.append(text[start:].strip())
    return sentences


def normalise_answer(text: str) -> str:
    """Normalise an answer for comparison.

    Case, width of letters and digits, final period, articles, number words, "grey" and bold print do not count.
    """
    words = unicodedata.normalize("NFKC", text).strip().lower().strip(f" .!*\"'{_FINAL}").split()
    words = [_NUMBER_WORDS.get(word, "gray" if word == "grey" else word) for word in words]
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)
