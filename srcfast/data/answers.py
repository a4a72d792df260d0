"""Decide whether an answer is right: equal to the gold answer or, where the sample has a tolerance, a number near it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction

from srcfast.data.rationale_format import normalise_answer
from srcfast.data.records import Sample

_LETTER = re.compile(r"\(?(?P<letter>[A-Za-z])(?P<mark>[).:,]*)(?P<rest>(?:\s.*)?)", re.DOTALL)
# A capital that stands alone: no article or pronoun ("A car"), abbreviation ("U.S."), or unit ("20 \u00b0C").
_ALONE = r"(?<![\w'\u2019\u00b0.-])(?:[B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'\u2019-]|\.\w)"
_LETTER_ALONE = re.compile(_ALONE)
_BEFORE_LETTER = "answer|option|choice|choose|select|pick|is"
_LETTER_IN_SENTENCE = re.compile(rf"(?:\(|\b(?i:{_BEFORE_LETTER})\b[\s:*\"']*){_ALONE}")
_NOT_LETTER = re.compile(rf"(?i:\bnot|n['\u2019]t)\s+(?:\(|(?i:option)\s+)?{_ALONE}")
_LETTERS_ALONE = re.compile(r"(?:(?:or|and|[,/&;])?\s*\(?[A-Z]\)?[.,:;)\s]*)+")  # "or B.", "B, C"
_MARKED = re.compile(r"\(([A-Z])\)|(?<![\w'\u2019.-])([A-Z])[.):]\s+\w")
_NUMBER = re.compile(
    r"([+-]?)[$\u20ac\u00a3\u00a5]? ?((?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})?(?:\.[0-9]{1,15})?) ?[%$\u20ac\u00a3\u00a5]?"
)


def is_right(sample: Sample, answer: str | None) -> bool:
    """Return whether an answer is the sample's, both normalised; None, of a response that did not parse, is wrong.

    With `tolerance` in the sample's `extra`, a share of the gold number, every number within it is right as well. 0.05 is
    ChartQA's relaxed accuracy (Masry et al., 2022), but for "%" and currency signs, which do not count: the question names the
    unit. With lettered `options` in `extra` an answer is also right that names the right one (`chosen_option`); with `answers`, a
    list, if it is one of them.
    """
    if answer is None:
        return False
    if normalise_answer(answer) in map(normalise_answer, gold_answers(sample)):
        return True
    options = sample.extra.get("options")
    if isinstance(options, Mapping) and (gold_letter := chosen_option(options, sample.answer)) is not None:
        return chosen_option(options, answer) == gold_letter
    tolerance = sample.extra.get("tolerance")
    if (
        not isinstance(tolerance, int | float) or not 0 < tolerance < 1
    ):  # in other formats than `jsonl` it may mean anything
        return False
    number, golds = as_number(answer), map(as_number, gold_answers(sample))
    return number is not None and any(gold is not None and is_near(number, gold, tolerance) for gold in golds)


def gold_answers(sample: Sample) -> list[str]:
    """Return a sample's gold answers: its answer, then others of `answers` in its `extra`."""
    others = sample.extra.get("answers")
    others = others if isinstance(others, list) else []
    return [sample.answer, *(other for other in others if isinstance(other, str))]


def chosen_option(options: Mapping[str, str], answer: str) -> str | None:
    """Return the letter of the option that an answer names; None: none, or several.

    It names one by its letter ("B", "b.", "(B)"), its letter and a text ("B. blue"), its text, or its letter in a sentence ("The
    answer is B.").
    """
    text = answer.strip(" *\"'")
    normal = normalise_answer(text)
    said = [letter for letter, option in options.items() if normalise_answer(option) == normal]
    if text[:1].islower() and len(said) == 1:
        return said[0]  # "a" is an option's text rather than its letter, where both can be meant
    if (match := _LETTER.fullmatch(text)) and (letter := match["letter"].upper()) in options:
        rest = match["rest"].strip()
        # "A red car" is no letter with a text, unless option A says "red car".
        if not rest or normalise_answer(rest) == normalise_answer(options[letter]):
            return letter
        if match["mark"]:
            return None if _names_another(options, letter, rest) else letter
    if said:
        return said[0] if len(said) == 1 else None
    letters = set() if _NOT_LETTER.search(text) else _letters_alone(options, text)
    return letters.pop() if len(letters) == 1 and _LETTER_IN_SENTENCE.search(text) else None


def _names_another(options: Mapping[str, str], letter: str, rest: str) -> bool:
    """Return whether what follows a marked letter names another option: "or B.", "B", "red, (B) blue"."""
    others = options.keys() - {letter}
    if _LETTERS_ALONE.fullmatch(rest):
        return bool({*_LETTER_ALONE.findall(rest)} & others)
    return any(other in others for pair in _MARKED.findall(rest) for other in pair)


def _letters_alone(options: Mapping[str, str], text: str) -> set[str]:
    """Return the options' letters that stand alone in a text."""
    return {*_LETTER_ALONE.findall(text)} & options.keys()


def is_near(number: Fraction, gold: Fraction, tolerance: float) -> bool:
    """Return whether a number deviates from the gold one by at most a share `tolerance` of it."""
    return abs(number - gold) <= Fraction(str(tolerance)) * abs(gold)


def as_number(text: str) -> Fraction | None:
    """Read a decimal number ("34.", "-1,200", "12%", "$5", wide digits), exactly; None: the text is no such number."""
    text = unicodedata.normalize("NFKC", text).strip(" *!\"'").removesuffix(".")
    match = _NUMBER.fullmatch(text)
    return Fraction(match[1] + match[2].replace(",", "")) if match and match[2] else None
