"""Corrupt true rationales by the three faults that SRC names, to make the R-Scorer's training data.

The functions need only sentences and a vocabulary of interchangeable words, so they serve any domain:

- counterfactual: a perception sentence states what the image does not show (a swapped attribute, an invented object);
- insufficient: a perception sentence is omitted, or the whole reasoning;
- unreasonable: the conclusion does not follow from the perception (a swapped count or relation, another answer).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from random import Random

from srcfast.errors import InputError

KINDS = ("counterfactual", "insufficient", "unreasonable")

Vocabulary = Mapping[str, Sequence[str]]
Parts = tuple[tuple[str, ...], tuple[str, ...], str]  # perception sentences, reasoning sentences, answer


def corrupt(
    see: Sequence[str], think: Sequence[str], answer: str, kind: str, rng: Random, vocabulary: Vocabulary
) -> Parts:
    """Put one fault of a kind into a true rationale-answer pair.

    Args:
        see: perception sentences; if there are none (plain format), faults of perception are put into the reasoning.
        think: reasoning sentences.
        answer: the true answer.
        kind: "counterfactual", "insufficient" or "unreasonable".
        rng: selects one of the corruptions of the kind, and the words.
        vocabulary: class name -> words (or phrases) that can replace each other.

    Returns:
        (see, think, answer), at least one of the three changed.

    Raises:
        InputError: the kind is unknown, or no fault of that kind can be made in these sentences.
    """
    corruptions = _CORRUPTIONS.get(kind)
    if corruptions is None:
        raise InputError(field="kind", expected=f"one of {', '.join(KINDS)}", found=repr(kind))
    truth: Parts = (tuple(see), tuple(think), answer)
    words = _Words.of(vocabulary)
    for corruption in rng.sample(corruptions, len(corruptions)):
        corrupted = corruption(*truth, rng, words)
        if corrupted is not None and corrupted != truth:
            return corrupted
    raise InputError(
        field="rationale",
        expected=f"sentences in which a fault of kind {kind!r} can be made",
        found=" ".join((*see, *think, answer)),
        fix="name the domain's interchangeable words in the vocabulary, or choose another kind",
    )


def swap_word(sentence: str, rng: Random, vocabulary: Vocabulary) -> str | None:
    """Replace one word of a sentence by another of its class; None: the sentence has no word that can be replaced."""
    words = _Words.of(vocabulary)
    matches = words.find(sentence)
    return words.swap(sentence, rng.choice(matches), rng)[0] if matches else None


def swap_one(sentences: tuple[str, ...], rng: Random, vocabulary: Vocabulary) -> tuple[str, ...] | None:
    """Replace one word of one sentence, so that the new sentence is none of the others; None: no word can be replaced."""
    swapped = _swap_one(sentences, rng, _Words.of(vocabulary))
    return None if swapped is None else swapped[0]


class _Words:
    """A compiled vocabulary: a pattern that matches its words, and the alternatives of each word."""

    def __init__(self, classes: tuple[tuple[str, ...], ...]) -> None:
        self.alternatives: dict[str, tuple[str, ...]] = {}
        for members in classes:
            for word in members:
                others = tuple(other for other in members if other.lower() != word.lower())
                self.alternatives[word.lower()] = self.alternatives.get(word.lower(), ()) + others
        longest_first = sorted(self.alternatives, key=lambda word: (-len(word), word))
        pattern = "|".join(re.escape(word) for word in longest_first) or r"(?!)"
        self.pattern = re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE)

    @staticmethod
    def of(vocabulary: Vocabulary) -> _Words:
        """Compile a vocabulary, whose words are found in upper and lower case; compiled ones are cached."""
        return _compile(tuple(map(tuple, vocabulary.values())))

    def find(self, sentence: str) -> list[re.Match[str]]:
        """Return the matches of words that have an alternative."""
        return [match for match in self.pattern.finditer(sentence) if self.alternatives[match[0].lower()]]

    def swap(self, sentence: str, match: re.Match[str], rng: Random) -> tuple[str, str, str]:
        """Replace a match, by a word in lower case where it is; return the new sentence, and both words in lower case."""
        return self.replace(sentence, match, rng.choice(self.alternatives[match[0].lower()]))

    def replace(self, sentence: str, match: re.Match[str], new: str) -> tuple[str, str, str]:
        """Replace a match by `new`; return as `swap` does."""
        old = match[0].lower()
        shown = new[:1].upper() + new[1:] if match[0][:1].isupper() else new.lower()
        return sentence[: match.start()] + shown + sentence[match.end() :], old, new.lower()


@lru_cache(maxsize=16)
def _compile(classes: tuple[tuple[str, ...], ...]) -> _Words:
    return _Words(classes)


def _replace_word(sentence: str, old: str, new: str) -> str:
    return re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", new, sentence)


def _swap_one(sentences: tuple[str, ...], rng: Random, words: _Words) -> tuple[tuple[str, ...], str, str] | None:
    """Replace one word of one sentence, so that the new sentence is none of the others.

    Returns:
        (sentences, old word, new word); None: no word can be replaced.
    """
    matches = [(index, match) for index, sentence in enumerate(sentences) for match in words.find(sentence)]
    rng.shuffle(matches)
    for index, match, alternative in _draw_alternatives(matches, rng, words):
        swapped, old, new = words.replace(sentences[index], match, alternative)
        if swapped not in sentences:
            return (*sentences[:index], swapped, *sentences[index + 1 :]), old, new
    return None


def _draw_alternatives(
    matches: list[tuple[int, re.Match[str]]], rng: Random, words: _Words
) -> Iterator[tuple[int, re.Match[str], str]]:
    """Yield each match with one alternative, then with all: sentences that name most words of a class leave few new ones."""
    for index, match in matches:
        yield index, match, rng.choice(words.alternatives[match[0].lower()])
    for index, match in matches:
        alternatives = words.alternatives[match[0].lower()]
        yield from ((index, match, each) for each in rng.sample(alternatives, len(alternatives)))


def _misperceive(see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words) -> Parts | None:
    """Replace one perceived attribute; the conclusion stays, and no longer follows from the perception."""
    swapped = _swap_one(see or think, rng, words)
    if swapped is None:
        return None
    return (swapped[0], think, answer) if see else (see, swapped[0], answer)


def _misperceive_throughout(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """Replace one perceived attribute, and the same word in reasoning and answer, as a model's errors propagate."""
    swapped = _swap_one(see, rng, words)
    if swapped is None:
        return None
    perception, old, new = swapped
    return (
        perception,
        tuple(_replace_word(sentence, old, new) for sentence in think),
        _replace_word(answer, old, new),
    )


def _invent_object(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """Insert a copy of a perception sentence with all its attributes replaced: an object that does not exist."""
    sources = [sentence for sentence in see if len(words.find(sentence)) >= 2]
    if not sources:
        return None
    invented = rng.choice(sources)
    for match in reversed(words.find(invented)):  # from the end, so that the positions of earlier matches stay valid
        invented = words.swap(invented, match, rng)[0]
    if invented in see:
        return None
    position = rng.randint(0, len(see))
    return (*see[:position], invented, *see[position:]), think, answer


def _omit_perception(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """Omit a perception sentence, if possible one that shares a word with reasoning or answer."""
    if len(see) < 2:
        return None
    used = {match[0].lower() for sentence in (*think, answer) for match in words.find(sentence)}
    needed = [i for i, s in enumerate(see) if any(match[0].lower() in used for match in words.find(s))]
    omitted = rng.choice(needed or range(len(see)))
    return see[:omitted] + see[omitted + 1 :], think, answer


def _omit_reasoning(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """Omit the reasoning; in plain format, where perception is not marked, omit one sentence."""
    if see and think:
        return see, (), answer
    if len(think) >= 2:
        omitted = rng.randrange(len(think))
        return see, think[:omitted] + think[omitted + 1 :], answer
    return None


def _misreason(see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words) -> Parts | None:
    """Replace a count, relation or other word of the reasoning; the answer stays, and no longer follows."""
    swapped = _swap_one(think, rng, words)
    return None if swapped is None else (see, swapped[0], answer)


def _misanswer(see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words) -> Parts | None:
    """Replace the answer; the rationale stays true and supports another one."""
    swapped = _swap_one((answer,), rng, words)
    return None if swapped is None else (see, think, swapped[0][0])


_Corruption = Callable[[tuple[str, ...], tuple[str, ...], str, Random, _Words], Parts | None]
_CORRUPTIONS: dict[str, tuple[_Corruption, ...]] = {
    "counterfactual": (_misperceive, _misperceive_throughout, _invent_object),
    "insufficient": (_omit_perception, _omit_reasoning),
    "unreasonable": (_misreason, _misanswer),
}
