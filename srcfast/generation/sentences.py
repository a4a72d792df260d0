"""Find where a sentence ends in text that is still being written."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np

from srcfast.data.sentence_marks import CLOSERS, STOPS, WIDE_FULL_STOP

_CLOSERS = f"[{re.escape(CLOSERS)}]*"
# A full stop after a digit may be a decimal point, and after a short word an abbreviation: the next character tells.
_ENDED = re.compile(
    rf"(?:[!?\u2026{STOPS}]{_CLOSERS}|(?<![\d.])\.{_CLOSERS}|(?<!\d){WIDE_FULL_STOP}{_CLOSERS}"
    rf"|\d\.(?:{_CLOSERS[:-1]}+)|\.\.\.{_CLOSERS}|\n)\s*$"
)
_ABBREVIATED = re.compile(
    r"(?:\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|etc|approx|Fig|No|cf)|\b[A-Za-z](?:\.[A-Za-z])*)\.\s*$"  # the letters of e.g., U.S.
)
_AFTER_NUMBER = re.compile(r"(?:\d|(?<![\w.])[a-z])\.(?:\s+|\s*<)\S*$")  # or a lone letter: "It is b. Then"

TERMINATORS = f".!?\u2026\n{STOPS}{WIDE_FULL_STOP}"


def sentence_ended(text: str) -> bool:
    """Return whether the text written so far closes a sentence.

    "It is 3." is still open, for "5" may follow; "It is 3. The" is closed. Abbreviations ("e.g.", "Dr.", "U.S.") do not
    close a sentence.
    """
    if _AFTER_NUMBER.search(text):
        return True
    return _ENDED.search(text) is not None and _ABBREVIATED.search(text) is None


def needs_next(text: str) -> bool:
    """Return whether the next character decides if a sentence has ended: after a digit and a full stop."""
    return text.rstrip().endswith(".") and not sentence_ended(text)


class SentenceEnds:
    """Sentence ends in sequences of tokens; `may_end` [V] bool are the tokens after which a text has to be checked."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.may_end = np.zeros(vocabulary, dtype=bool)
        for token in range(min(vocabulary, len(tokenizer))):
            text = tokenizer.decode([token])
            # A part of a character's bytes may be the last one of a full stop.
            self.may_end[token] = "\ufffd" in text or any(mark in text for mark in TERMINATORS)

    @staticmethod
    @lru_cache(maxsize=4)
    def of(tokenizer: Any, vocabulary: int) -> SentenceEnds:
        """Return the tokenizer's, built once."""
        return SentenceEnds(tokenizer, vocabulary)

    def cut(self, token_ids: list[int]) -> list[int]:
        """Return where the sentences of a response end, ascending, the last with the response; as decoding ends its rows."""
        ends, start, waits = [], 0, False
        for position, token in enumerate(token_ids, start=1):
            ended = False
            if self.may_end[token] or waits:
                ended, waits = self.look(token_ids[start:position])
            if ended or position == len(token_ids):
                ends.append(position)
                start = position
        return ends

    def look(self, token_ids: list[int]) -> tuple[bool, bool]:
        """Return whether the text of these tokens closes a sentence, and whether only the next token decides."""
        text = self.tokenizer.decode(token_ids)
        return sentence_ended(text), needs_next(text)
