"""Make what a judge knows of a sample worse: one detail wrong, half left out, or nothing but the answer.

A judge in real life seldom has complete facts. The functions take any domain's sentences: a detail is a word of a vocabulary
or, where there is none, a number. What the oracle reads, `extra`, stays true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from srcfast.data.corruptions import Vocabulary, swap_one
from srcfast.data.rationale_format import untagged_sentences
from srcfast.data.records import ReferenceQuality, Sample
from srcfast.errors import InputError
from srcfast.world.claims import attributes_of, truth_of

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
    sample: Sample, sentences: Sequence[str], rng: Random, vocabulary: Vocabulary
) -> tuple[str, ...]:
    """Replace one word of the vocabulary in one sentence; without one, a digit of a number."""
    swapped = swap_one(tuple(sentences), rng, vocabulary)
    if swapped is not None:
        return swapped
    numbers = [(index, match) for index, text in enumerate(sentences) for match in _NUMBER.finditer(text)]
    if not numbers:
        raise InputError(
            sample_id=sample.id,
            field="facts" if sample.facts else "rationale",
            expected="a word of the vocabulary, or a number, that a noisy reference can have wrong",
            found=" ".join(sentences),
            fix="name the domain's words: scorer_training.vocabulary=FILE.yaml, or choose another quality",
        )
    index, match = rng.choice(numbers)
    at, text = match.start(), sentences[index]  # the first digit: the error is seen
    digit = rng.choice([other for other in "123456789" if other != text[at]])
    return (*sentences[:index], text[:at] + digit + text[at + 1 :], *sentences[index + 1 :])
