"""Train the R-Scorer on a judge's verdicts on real candidates, beside corruptions: examples, what is held out, the mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from srcfast.config.settings import Config
from srcfast.data.corruptions import Vocabulary
from srcfast.data.records import Sample
from srcfast.data.verdicts import JudgedPair, Shares, mean_shares, reversed_shares
from srcfast.errors import InputError
from srcfast.stages.scorer_training import ScorerExample, Variant, draw_quality, in_each_quality, with_quality
from srcfast.stages.scoring import sample_reference


def verdict_examples(judged: Sequence[JudgedPair]) -> list[ScorerExample]:
    """Build one example for each sample: its judged candidates, each judged pair in both orders.

    The shares of a pair that was judged more than once are averaged. In the other order they are turned round: no position is
    taught to be the better one.
    """
    by_sample: dict[str, list[JudgedPair]] = {}
    for pair in judged:
        by_sample.setdefault(pair.sample.id, []).append(pair)
    examples = []
    for key, group in by_sample.items():
        texts = list(dict.fromkeys(text for pair in group for text in pair.candidates))
        given: dict[tuple[int, int], list[Shares]] = {}
        for pair in group:
            first, second = map(texts.index, pair.candidates)
            given.setdefault((first, second), []).append(pair.verdict)
            given.setdefault((second, first), []).append(reversed_shares(pair.verdict))
        pairs = tuple(sorted(given))
        variants = tuple(Variant(text, 0) for text in texts)
        verdicts = tuple(mean_shares(given[pair]) for pair in pairs)
        examples.append(ScorerExample(key, sample_reference(group[0].sample), variants, pairs, verdicts))
    return examples


def with_verdicts(
    config: Config,
    judged: Sequence[JudgedPair],
    train: Sequence[ScorerExample],
    held_out: Mapping[str, Sequence[ScorerExample]],
    words: Vocabulary | None,
) -> tuple[list[ScorerExample], dict[str, list[ScorerExample]]]:
    """Mix examples of verdicts into those of corruptions, but for verdicts that are held out.

    A share of the samples, at least one, is held out, first those whose corruptions are; corruptions of the others are not
    trained on. References have the qualities of `split_examples`.

    Returns:
        The examples to train on, and the verdicts held out, in each quality.

    Raises:
        InputError: no verdict would be left to train on.
    """
    settings, rng = config.scorer_training, Random(f"verdicts/{config.seed}")
    examples = verdict_examples(judged)
    rng.shuffle(examples)
    tested = {example.key for of_quality in held_out.values() for example in of_quality}
    examples.sort(key=lambda example: example.key not in tested)  # stable
    num_tested = sum(example.key in tested for example in examples)
    cut = max(1, round(settings.held_out * len(examples)), num_tested)  # number held out
    apart, learned = examples[:cut], examples[cut:]
    if not learned:
        raise InputError(
            file=settings.verdicts,
            expected="verdicts on samples that are not held out, and on some that are",
            found=f"{len(examples)} samples with verdicts, of which {cut} are held out",
            fix="add verdicts on other samples",
        )
    samples: dict[str, Sample] = {pair.sample.id: pair.sample for pair in judged}
    learned = [
        with_quality(
            example,
            samples[example.key],
            draw_quality(settings.qualities, f"{config.seed}/{example.key}"),
            config.seed,
            words,
        )
        for example in learned
    ]
    left_out = {example.key for example in apart}
    corrupted = [example for example in train if example.key not in left_out]
    mixed = mix(corrupted, learned, settings.verdict_share, rng)
    return mixed, in_each_quality(apart, samples, settings.qualities, config.seed, words)


def mix(
    corrupted: Sequence[ScorerExample], judged: Sequence[ScorerExample], share: float | None, rng: Random
) -> list[ScorerExample]:
    """Return examples of both kinds of which `share` are judged, as many as there are; None: all."""
    if share is None:
        return [*corrupted, *judged]
    if share == 1.0:
        return list(judged)
    wanted = round(len(judged) * (1.0 - share) / share)
    if wanted <= len(corrupted):
        return [*rng.sample(corrupted, wanted), *judged]
    return [*corrupted, *rng.sample(judged, round(len(corrupted) * share / (1.0 - share)))]
