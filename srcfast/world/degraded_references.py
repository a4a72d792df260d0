"""Make what a judge knows of a sample worse: one detail wrong, half left out, or nothing but the answer.

A judge in real life seldom has complete facts. The functions take any domain's sentences: a detail is a word of a vocabulary
or, where there is none, a number. What the oracle reads, `extra`, stays true.
"""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from srcfast.data.corruptions import Vocabulary, swap_one
from srcfast.data.rationale_format import ParsedResponse, untagged_sentences
from srcfast.data.records import ReferenceQuality, Sample
from srcfast.errors import InputError
from srcfast.world.claims import attributes_of, truth_of
from srcfast.world.verification import verify_sample

DRAWS = 20  # at most, until a detail is wrong indeed
_NUMBER = re.compile(r"\d+")


def degrade_reference(
    sample: Sample, quality: ReferenceQuality, seed: int, vocabulary: Vocabulary | None = None
) -> Sample:
    """Return the sample with a reference of a quality; seed and sample id decide the draw, whatever the other samples are.

    The reference is the facts, or without facts the rationale, which then loses its tags. A sample with neither has the
    answer alone in every quality.

    Args:
        sample: with a complete reference.
        quality: "complete" changes nothing; "noisy" replaces one word by another of its class, or one number; "partial"
            leaves out half of the sentences, of an odd number the middle one by lot; "answer" leaves out all.
        seed: of the draw.
        vocabulary: class name -> words (or phrases) that can replace each other; None: those of the sample's data family.

    Raises:
        InputError: a noisy reference is asked for, and there is neither a word to replace nor a number.
    """
    if quality == "complete":
        return sample
    sentences = sample.facts or tuple(untagged_sentences(sample.rationale or ""))
    rng = Random(f"reference/{quality}/{seed}/{sample.id}")
    if quality == "answer" or not sentences:
        sentences = ()
    elif quality == "partial":
        stays = len(sentences) - (len(sentences) + rng.getrandbits(1)) // 2
        sentences = tuple(sentences[index] for index in sorted(rng.sample(range(len(sentences)), stays)))
    else:
        words = attributes_of(truth_of(sample)) if vocabulary is None else vocabulary
        sentences = _with_wrong_detail(sample, sentences, rng, words)
    if sample.facts:
        return replace(sample, facts=sentences, rationale=None)
    return replace(sample, rationale=" ".join(sentences) or None)


def _with_wrong_detail(
    sample: Sample, sentences: tuple[str, ...], rng: Random, vocabulary: Vocabulary
) -> tuple[str, ...]:
    """Replace one word of the vocabulary, or without one a digit, in one sentence; false by the oracle where there is one."""
    noisy = sentences
    for _ in range(DRAWS):
        drawn = swap_one(sentences, rng, vocabulary) or _with_wrong_number(sentences, rng)
        if drawn is None:
            raise InputError(
                sample_id=sample.id,
                field="facts" if sample.facts else "rationale",
                expected="a word of the vocabulary, or a number, that a noisy reference can have wrong",
                found=" ".join(sentences),
                fix="name the domain's words: scorer_training.vocabulary=FILE.yaml, or choose another quality",
            )
        noisy = drawn
        [wrong] = (after for before, after in zip(sentences, noisy, strict=True) if after != before)
        verification = verify_sample(sample, ParsedResponse((wrong,), (), sample.answer))
        # A swapped word may happen to be true, as in "There is no red circle.".
        if verification is None or any(verdict == "false" for _, _, verdict in verification.claims):
            break
    return noisy


def _with_wrong_number(sentences: tuple[str, ...], rng: Random) -> tuple[str, ...] | None:
    """Replace the first digit of one number, so that the error can be seen; None without a number."""
    numbers = [(index, match) for index, text in enumerate(sentences) for match in _NUMBER.finditer(text)]
    if not numbers:
        return None
    index, match = rng.choice(numbers)
    at, text = match.start(), sentences[index]
    digit = rng.choice([other for other in "123456789" if other != text[at]])
    return (*sentences[:index], text[:at] + digit + text[at + 1 :], *sentences[index + 1 :])
