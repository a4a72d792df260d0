"""The reference's log-probabilities from generation: a candidate comes with its own, under the very policy that is the reference.

They are taken over after a recheck: of a random part of the pairs they are computed exactly, and unless all of these agree
within what rounding may do, those of all pairs are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from srcfast.config.settings import Config
from srcfast.data.forest import Forest
from srcfast.data.in_order import InOrder
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.run.lock import exclusive_lock
from srcfast.run.progress import track
from srcfast.stages.dpo import check_references
from srcfast.stages.drift import drift, drift_of, rounding_bound
from srcfast.stages.logprobs import logprob_chunks, reference_logprobs, references_in_chunks
from srcfast.stages.policy import Policy
from srcfast.stages.stage_run import StageRun
from srcfast.training.loop import Features

RECHECKED = 16  # pairs at least
RECHECKED_SHARE = 0.05
REFERENCES_LOOKED_AT = 32  # of those that a file states without saying whose they are


@dataclass(frozen=True)
class ReferenceReuse:
    """What came of it.

    Attributes:
        pairs: all of them.
        eligible: pairs of which both responses are candidates' very tokens, after the same prompt.
        rechecked: of these, computed exactly.
        reused: of these, taken over.
        disagreement: of the rechecked, the root of the mean square of what `stages/drift.py` measures, nats a root token;
            None without any.
        tolerance: the greatest at which the others are taken over; None without any.
        worst: the greatest of a single response, which is bounded, too; None without any.
    """

    pairs: int
    eligible: int
    rechecked: int
    reused: int
    disagreement: float | None
    tolerance: float | None
    worst: float | None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def reuse_candidate_logprobs(
    model: Any,
    preferences: Sequence[Preference],
    samples: Mapping[str, Sample],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    *,
    reference_hash: str,
    token_budget: int,
    features: Features | None = None,
    on_forest: Callable[[Forest], None] | None = None,
    seed: int = 0,
    logprobs: Callable[..., list[Preference]] = reference_logprobs,
) -> tuple[list[Preference], ReferenceReuse]:
    """`reference_logprobs`, but for pairs whose log-probabilities generation has found already.

    Args:
        model: base with the adapter as it is before the round; it has written the candidates.
        preferences: pairs; `extra` names their candidates (`chosen_id`, `rejected_id`).
        samples: sample id -> the sample that the candidates answer.
        candidates: sample id -> candidates, whose `logprob` is the model's own over `token_ids`; asked once for each run of
            pairs of one sample.
        seed: of the part that is rechecked.
        logprobs: computes those that are not taken over.
    """
    known: list[tuple[float, float] | None] = []
    for sample_id, pairs in groupby(preferences, key=lambda pair: pair.sample_id):
        own = {candidate.id: candidate for candidate in candidates.get(sample_id) or ()}
        known += [_known(model, pair, samples.get(sample_id), own) for pair in pairs]
    eligible = [index for index, values in enumerate(known) if values is not None]
    count = min(len(eligible), max(RECHECKED, round(RECHECKED_SHARE * len(eligible))))
    rechecked = Random(f"references/{seed}").sample(eligible, count)
    done = list(preferences)

    def compute(indices: Sequence[int]) -> None:
        exact = logprobs(
            model,
            [preferences[index] for index in indices],
            reference_hash=reference_hash,
            token_budget=token_budget,
            features=features,
            on_forest=on_forest,
        )
        for index, pair in zip(indices, exact, strict=True):
            done[index] = pair

    # Those to recheck in one go with those that have to be computed anyhow.
    computed = sorted({*range(len(preferences))} - {*eligible} | {*rechecked})
    if computed:
        compute(computed)
    found = drift_of(
        [one for index in rechecked for one in _drifts(model, done[index], known[index])],
        model.decoder.head_weight.dtype,
    )
    left = sorted({*eligible} - {*rechecked})
    agreed = found is not None and found.is_rounding
    if left and not agreed:
        compute(left)
    elif left:
        for index in left:
            values = known[index]
            assert values is not None
            extra = {**preferences[index].extra, "reference_hash": reference_hash}
            chosen, rejected = values
            done[index] = replace(
                preferences[index], reference_chosen_logprob=chosen, reference_rejected_logprob=rejected, extra=extra
            )
    reused = len(left) if agreed else 0
    report = ReferenceReuse(
        pairs=len(preferences),
        eligible=len(eligible),
        rechecked=count,
        reused=reused,
        disagreement=None if found is None else found.root_mean_square,
        tolerance=None if found is None else rounding_bound(found.dtype, found.responses),
        worst=None if found is None else found.greatest,
    )
    return done, report


def stage_references(
    stage: StageRun,
    policy: Policy,
    preferences: Sequence[Preference],
    samples: Mapping[str, Sample],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    seed: int,
) -> tuple[list[Preference], ReferenceReuse]:
    """Give a stage's pairs the policy's log-probabilities: those of its candidates, where there are any."""
    return reuse_candidate_logprobs(
        policy.model,
        preferences,
        samples,
        candidates,
        reference_hash=policy.hash(),
        token_budget=stage.config.dpo.token_budget,
        features=policy.features,
        on_forest=lambda forest: stage.progress.advance(0, tokens=forest.num_tokens),
        seed=seed,
        logprobs=references_in_chunks(stage.chunks(policy=policy.hash)),
    )


def _known(
    model: Any, pair: Preference, sample: Sample | None, own: Mapping[str, Candidate]
) -> tuple[float, float] | None:
    """The chosen and the rejected candidate's log-probabilities, if they are those of the pair's responses."""
    if sample is None or (pair.prompt, tuple(pair.images)) != (sample.question, tuple(sample.images)):
        return None
    found = []
    for name, text in (("chosen_id", pair.chosen), ("rejected_id", pair.rejected)):
        candidate = own.get(pair.extra.get(name, ""))
        if candidate is None or candidate.token_ids != tuple(model.encode_response(text).tolist()):
            return None
        found.append(candidate.logprob)
    return found[0], found[1]


def _drifts(model: Any, pair: Preference, known: tuple[float, float] | None) -> list[float]:
    """Of the chosen and of the rejected response."""
    chosen, rejected = pair.reference_chosen_logprob, pair.reference_rejected_logprob
    assert known is not None and chosen is not None and rejected is not None
    lengths = [len(model.encode_response(text)) for text in (pair.chosen, pair.rejected)]
    return [drift(own, exact, size) for own, exact, size in zip(known, (chosen, rejected), lengths, strict=True)]


def with_references(
    config: Config, policy: Policy, pairs: Sequence[Preference], output: Path
) -> tuple[list[Preference], int]:
    """Give the pairs that have none the policy's log-probabilities; returns all, and how many were computed.

    A reference that a file states without a hash is believed, but for some that are compared now, and those of the first step.
    They are stored below `output` until the adapter is written: beside the training's checkpoints, and removed with these.
    """
    name = policy.hash()
    stated = [pair for pair in pairs if "reference_hash" not in pair.extra and _has_reference(pair)]
    compared = random.Random(f"references/{config.seed}").sample(stated, min(REFERENCES_LOOKED_AT, len(stated)))
    check_references(policy.model, compared, config.dpo.token_budget, policy.features)
    done = [replace(pair, extra={"reference_hash": name} | pair.extra) for pair in pairs]
    missing = [index for index, pair in enumerate(done) if not _has_reference(pair)]
    if missing:
        wanted = [done[index] for index in missing]
        directory = output / "checkpoint" / "references"
        with exclusive_lock(output), track("reference", len(missing), "pairs", config.quiet) as progress:
            logprobs = references_in_chunks(logprob_chunks(config, policy, wanted, directory, progress))
            computed = logprobs(
                policy.model,
                wanted,
                reference_hash=name,
                token_budget=config.dpo.token_budget,
                features=policy.features,
                on_forest=lambda forest: progress.advance(len(forest.trees), tokens=forest.num_tokens),
            )
        for index, pair in zip(missing, computed, strict=True):
            done[index] = pair
    return done, len(missing)


def _has_reference(pair: Preference) -> bool:
    return pair.reference_chosen_logprob is not None and pair.reference_rejected_logprob is not None
