"""The three faults of rationales that SRC names, made on purpose in true ones: the R-Scorer's training data.

Everything here works on sentences and on a vocabulary of interchangeable words, so it serves any domain:

- counterfactual: something is said to be seen that is not there (a swapped attribute, an invented object);
- insufficient: a perception sentence is left out, or the reasoning as a whole;
- unreasonable: what was seen does not give what is concluded (a swapped count or relation, another answer).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from random import Random

from srcfast.errors import InputError

KINDS = ("counterfactual", "insufficient", "unreasonable")

Vocabulary = Mapping[str, Sequence[str]]
Parts = tuple[tuple[str, ...], tuple[str, ...], str]  # perception sentences, reasoning sentences, answer


def corrupt(
    see: Sequence[str], think: Sequence[str], answer: str, kind: str, rng: Random, vocabulary: Vocabulary
) -> Parts:
    """Give a true rationale-answer pair one fault of the kind named.

    Args:
        see: perception sentences; where there are none (plain format), the reasoning stands for them.
        think: reasoning sentences.
        answer: the true answer.
        kind: "counterfactual", "insufficient" or "unreasonable".
        rng: decides among the ways in which the fault can be made.
        vocabulary: class name -> words (or phrases) of which one may stand where another stood.

    Returns:
        (see, think, answer), at least one of the three changed.

    Raises:
        InputError: the kind is unknown, or no fault of that kind can be made in these sentences.
    """
    ways = _WAYS.get(kind)
    if ways is None:
        raise InputError(field="kind", expected=f"one of {', '.join(KINDS)}", found=repr(kind))
    truth: Parts = (tuple(see), tuple(think), answer)
    words = _Words.of(vocabulary)
    for way in rng.sample(ways, len(ways)):
        corrupted = way(*truth, rng, words)
        if corrupted is not None and corrupted != truth:
            return corrupted
    raise InputError(
        field="rationale",
        expected=f"sentences in which a fault of kind {kind!r} can be made",
        found=" ".join((*see, *think, answer)),
        fix="name the domain's interchangeable words in the vocabulary, or choose another kind",
    )


def swap_word(sentence: str, rng: Random, vocabulary: Vocabulary) -> str | None:
    """The sentence with one word replaced by another of its class; None where it has none that could be."""
    words = _Words.of(vocabulary)
    places = words.find(sentence)
    return words.swap(sentence, rng.choice(places), rng)[0] if places else None


class _Words:
    """A vocabulary compiled once: a pattern that finds its words, and the alternatives of each."""

    def __init__(self, classes: tuple[tuple[str, ...], ...]) -> None:
        self.alternatives: dict[str, tuple[str, ...]] = {}
        for members in classes:
            for word in members:
                others = tuple(other for other in members if other != word)
                self.alternatives[word] = self.alternatives.get(word, ()) + others
        longest_first = sorted(self.alternatives, key=lambda word: (-len(word), word))
        pattern = "|".join(re.escape(word) for word in longest_first) or r"(?!)"
        self.pattern = re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE)

    @staticmethod
    def of(vocabulary: Vocabulary) -> _Words:
        return _compile(tuple(tuple(word.lower() for word in words) for words in vocabulary.values()))

    def find(self, sentence: str) -> list[re.Match[str]]:
        """The places in a sentence where another word of the same class could stand."""
        return [match for match in self.pattern.finditer(sentence) if self.alternatives[match[0].lower()]]

    def swap(self, sentence: str, match: re.Match[str], rng: Random) -> tuple[str, str, str]:
        """The sentence with the match replaced, the word that went, and the word that came."""
        old = match[0].lower()
        new = rng.choice(self.alternatives[old])
        written = new[:1].upper() + new[1:] if match[0][:1].isupper() else new
        return sentence[: match.start()] + written + sentence[match.end() :], old, new


@lru_cache(maxsize=16)
def _compile(classes: tuple[tuple[str, ...], ...]) -> _Words:
    return _Words(classes)


def _replace_word(sentence: str, old: str, new: str) -> str:
    return re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", new, sentence)


def _swap_one(sentences: tuple[str, ...], rng: Random, words: _Words) -> tuple[tuple[str, ...], str, str] | None:
    """One word of one sentence swapped, so that no sentence is said twice that was not before."""
    places = [(index, match) for index, sentence in enumerate(sentences) for match in words.find(sentence)]
    rng.shuffle(places)
    for index, match in places:
        swapped, old, new = words.swap(sentences[index], match, rng)
        if swapped not in sentences:
            return (*sentences[:index], swapped, *sentences[index + 1 :]), old, new
    return None


def _misperceive(see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words) -> Parts | None:
    """An attribute is seen wrongly; the rest stays, so the conclusion no longer rests on what is seen."""
    swapped = _swap_one(see or think, rng, words)
    if swapped is None:
        return None
    return (swapped[0], think, answer) if see else (see, swapped[0], answer)


def _misperceive_throughout(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """An attribute is seen wrongly, and reasoning and answer carry the error on, as a model's errors do."""
    swapped = _swap_one(see, rng, words)
    if swapped is None:
        return None
    seen, old, new = swapped
    return (
        seen,
        tuple(_replace_word(sentence, old, new) for sentence in think),
        _replace_word(answer, old, new),
    )


def _invent_object(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """A perception sentence again, every attribute of it swapped: an object that nobody mentioned."""
    sources = [sentence for sentence in see if len(words.find(sentence)) >= 2]
    if not sources:
        return None
    invented = rng.choice(sources)
    for match in reversed(words.find(invented)):  # from the end, so that earlier matches keep their places
        invented = words.swap(invented, match, rng)[0]
    if invented in see:
        return None
    place = rng.randint(0, len(see))
    return (*see[:place], invented, *see[place:]), think, answer


def _omit_perception(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """A perception sentence left out, one that the conclusion speaks of where there is such a one."""
    if len(see) < 2:
        return None
    used = {match[0].lower() for sentence in (*think, answer) for match in words.find(sentence)}
    needed = [i for i, s in enumerate(see) if any(match[0].lower() in used for match in words.find(s))]
    gone = rng.choice(needed or range(len(see)))
    return see[:gone] + see[gone + 1 :], think, answer


def _omit_reasoning(
    see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words
) -> Parts | None:
    """What is seen and the answer, without the steps between; in plain text one step is left out."""
    if see and think:
        return see, (), answer
    if len(think) >= 2:
        gone = rng.randrange(len(think))
        return see, think[:gone] + think[gone + 1 :], answer
    return None


def _misreason(see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words) -> Parts | None:
    """A count, relation or other word of the reasoning swapped; the answer stays and no longer follows."""
    swapped = _swap_one(think, rng, words)
    return None if swapped is None else (see, swapped[0], answer)


def _misanswer(see: tuple[str, ...], think: tuple[str, ...], answer: str, rng: Random, words: _Words) -> Parts | None:
    """The rationale is true, and another answer is given than the one that it leads to."""
    swapped = _swap_one((answer,), rng, words)
    return None if swapped is None else (see, think, swapped[0][0])


_Way = Callable[[tuple[str, ...], tuple[str, ...], str, Random, _Words], Parts | None]
_WAYS: dict[str, tuple[_Way, ...]] = {
    "counterfactual": (_misperceive, _misperceive_throughout, _invent_object),
    "insufficient": (_omit_perception, _omit_reasoning),
    "unreasonable": (_misreason, _misanswer),
}
