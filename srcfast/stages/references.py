"""Give preference pairs the reference's log-probabilities: from generation where that has computed them, else from the model.

The policy that wrote a round's candidates is the round's reference, and each candidate has its log-probability under that
policy. These numbers are reused after a recheck: those of a random subset of the pairs are computed exactly, and unless they
agree within what rounding may do (`stages/drift.py`), those of all pairs are computed.
"""

from __future__ import annotations

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
from srcfast.models.protocols import VisionLanguageModel
from srcfast.run.lock import exclusive_lock
from srcfast.run.progress import track
from srcfast.stages.credit import credited
from srcfast.stages.drift import drift, drift_of, rounding_bound
from srcfast.stages.logprobs import (
    logprob_chunks,
    reference_logprobs,
    references_in_chunks,
    stated_reference,
    with_reference,
)
from srcfast.stages.policy import Policy
from srcfast.stages.reference_checks import check_references
from srcfast.stages.stage_run import StageRun
from srcfast.training.items import Features

RECHECKED = 16  # pairs that are rechecked at least
RECHECKED_SHARE = 0.05  # of the eligible pairs that is rechecked, if these are more
MAX_STATED_CHECKS = 32  # of the references that a file states without saying whose they are, so many are computed again


@dataclass(frozen=True)
class ReferenceReuse:
    """How many pairs reuse generation's log-probabilities, and how well these agree with exact ones.

    Attributes:
        pairs: all of them.
        eligible: pairs whose two responses are token for token their candidates, after the same prompt, and credited whole.
        rechecked: of these, computed exactly.
        reused: of these, those with generation's log-probabilities.
        disagreement: root mean square of the rechecked responses' z, nats a root token (`stages/drift.py`); None without any.
        tolerance: the greatest disagreement at which the others are reused; None without any.
        worst: the greatest |z| of a single response, which is bounded, too; None without any.
    """

    pairs: int
    eligible: int
    rechecked: int
    reused: int
    disagreement: float | None
    tolerance: float | None
    worst: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return asdict(self)


def reuse_candidate_logprobs(
    model: VisionLanguageModel,
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
    """Give the pairs their reference: generation's log-probabilities where they are known and pass the recheck.

    Args:
        model: base with the adapter as it is before the round; it has written the candidates.
        preferences: pairs; `extra` names their candidates (`chosen_id`, `rejected_id`).
        samples: sample id -> the sample that the candidates answer.
        candidates: sample id -> candidates, whose `logprob` is the model's over `token_ids`; read once for each run of
            pairs of one sample.
        reference_hash, token_budget, features, on_forest: see `reference_logprobs`.
        seed: of the subset that is rechecked.
        logprobs: computes what is not reused.

    Returns:
        The pairs in their order, and a report.
    """
    known: list[tuple[float, float] | None] = []
    for sample_id, pairs in groupby(preferences, key=lambda pair: pair.sample_id):
        by_id = {candidate.id: candidate for candidate in candidates.get(sample_id) or ()}
        known += [_generated_logprobs(model, pair, samples.get(sample_id), by_id) for pair in pairs]
    eligible = {index: values for index, values in enumerate(known) if values is not None}
    num_rechecked = min(len(eligible), max(RECHECKED, round(RECHECKED_SHARE * len(eligible))))
    rechecked = Random(f"references/{seed}").sample(list(eligible), num_rechecked)
    results = list(preferences)

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
            results[index] = pair

    # One pass for the pairs to recheck and for those that have to be computed in any case.
    if computed := sorted({*range(len(preferences))} - {*eligible} | {*rechecked}):
        compute(computed)
    drifts = [z for index in rechecked for z in _drifts(model, results[index], eligible[index])]
    result = drift_of(drifts, model.decoder.head_weight.dtype)
    agree = result is not None and result.is_rounding
    remaining = sorted({*eligible} - {*rechecked})
    if remaining and not agree:
        compute(remaining)
    elif remaining:
        for index in remaining:
            results[index] = with_reference(preferences[index], eligible[index], reference_hash)
    report = ReferenceReuse(
        pairs=len(preferences),
        eligible=len(eligible),
        rechecked=num_rechecked,
        reused=len(remaining) if agree else 0,
        disagreement=None if result is None else result.root_mean_square,
        tolerance=None if result is None else rounding_bound(result.dtype, result.responses),
        worst=None if result is None else result.greatest,
    )
    return results, report


def stage_references(
    stage: StageRun,
    policy: Policy,
    preferences: Sequence[Preference],
    samples: Mapping[str, Sample],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    seed: int,
) -> tuple[list[Preference], ReferenceReuse]:
    """Give a round's pairs the policy's log-probabilities as their reference, chunk by chunk where they are computed."""
    return reuse_candidate_logprobs(
        policy.model,
        credited(preferences, stage.config.dpo.credit),
        samples,
        candidates,
        reference_hash=policy.hash(),
        token_budget=stage.config.dpo.token_budget,
        features=policy.features,
        on_forest=lambda forest: stage.progress.advance(0, tokens=forest.num_tokens),
        seed=seed,
        logprobs=references_in_chunks(stage.chunks(policy=policy.hash)),
    )


def _generated_logprobs(
    model: VisionLanguageModel, pair: Preference, sample: Sample | None, candidates: Mapping[str, Candidate]
) -> tuple[float, float] | None:
    """Return the chosen and the rejected candidate's log-probabilities, in nats; None where they are not the pair's.

    They are the pair's if the candidates answer the same prompt and are, token for token, the responses as training encodes
    them: decoding to text and back may give other tokens. Of a part of a response generation has none.
    """
    if pair.credit is not None:
        return None
    if sample is None or (pair.prompt, tuple(pair.images), pair.turns) != (
        sample.question,
        tuple(sample.images),
        sample.turns,
    ):
        return None
    logprobs = []
    for name, text in (("chosen_id", pair.chosen), ("rejected_id", pair.rejected)):
        candidate = candidates.get(pair.extra.get(name, ""))
        if candidate is None or candidate.token_ids != tuple(model.encode_response(text).tolist()):
            return None
        logprobs.append(candidate.logprob)
    return logprobs[0], logprobs[1]


def _drifts(model: VisionLanguageModel, pair: Preference, generated: tuple[float, float]) -> list[float]:
    """Return |z| of the chosen and of the rejected response: generation's log-probability against the pair's exact one."""
    exact = (pair.reference_chosen_logprob, pair.reference_rejected_logprob)
    drifts = []
    for text, value, expected in zip((pair.chosen, pair.rejected), generated, exact, strict=True):
        assert expected is not None
        drifts.append(drift(value, expected, len(model.encode_response(text))))
    return drifts


def with_references(
    config: Config, policy: Policy, pairs: Sequence[Preference], output: Path
) -> tuple[list[Preference], int]:
    """Give the pairs that have none the policy's log-probabilities; return all, and how many were computed.

    A reference that a file states without a hash is trusted after two checks: a random subset is computed again here, and the
    first step of training compares those of its batch. What is computed is stored below `output`, beside the training's
    checkpoints, and removed with these once the adapter is written.

    Raises:
        SrcfastError: a stated reference is another model's.
        InputError: one is above 0.
    """
    policy_hash = policy.hash()
    pairs = credited(pairs, config.dpo.credit)
    stated = [pair for pair in pairs if "reference_hash" not in pair.extra and _has_reference(pair)]
    compared = Random(f"references/{config.seed}").sample(stated, min(MAX_STATED_CHECKS, len(stated)))
    check_references(policy.model, compared, config.dpo.token_budget, policy.features)
    results = [replace(pair, extra={"reference_hash": policy_hash} | pair.extra) for pair in pairs]
    missing = [index for index, pair in enumerate(results) if not _has_reference(pair)]
    if missing:
        incomplete = [results[index] for index in missing]
        directory = output / "checkpoint" / "references"
        with exclusive_lock(output), track("reference", len(missing), "pairs", config.quiet) as progress:
            logprobs = references_in_chunks(logprob_chunks(config, policy, incomplete, directory, progress))
            computed = logprobs(
                policy.model,
                incomplete,
                reference_hash=policy_hash,
                token_budget=config.dpo.token_budget,
                features=policy.features,
                on_forest=lambda forest: progress.advance(len(forest.trees), tokens=forest.num_tokens),
            )
        for index, pair in zip(missing, computed, strict=True):
            results[index] = pair
    return results, len(missing)


def _has_reference(pair: Preference) -> bool:
    """Return whether all log-probabilities are there."""
    return None not in stated_reference(pair).values()
