"""Check that stored reference log-probabilities are those of the policy that training starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from srcfast.data.records import LOGPROB_ROUNDING, SPAN_FIELDS, Preference
from srcfast.errors import InputError, SrcfastError
from srcfast.models.protocols import VisionLanguageModel
from srcfast.stages.credit import credited_spans
from srcfast.stages.drift import Drift, drift, drift_of, rounding_bound
from srcfast.stages.logprobs import reference_logprobs, stated_reference
from srcfast.stages.pair_trees import preference_trees
from srcfast.training.items import Features


def check_references(
    model: VisionLanguageModel, preferences: Sequence[Preference], token_budget: int, features: Features | None = None
) -> None:
    """Compute the log-probabilities of these pairs again and compare them with the stored ones; each rank does all of it.

    Raises:
        SrcfastError: a stored one is another model's; the pair is named.
        InputError: one is above 0.
    """
    for preference in preferences:
        _check_reference_sign(preference)
    computed = reference_logprobs(model, preferences, reference_hash="", token_budget=token_budget, features=features)
    drifts, words = [], []
    for stored, exact in zip(preferences, computed, strict=True):
        for (field, value), length in zip(stated_reference(stored).items(), _lengths(model, stored), strict=False):
            expected = getattr(exact, field)
            drifts.append(drift(value, expected, length))
            words.append((f"sample {stored.sample_id}: ", f"{field} is stored as {value:.6g} and is {expected:.6g}"))
    result = drift_of(drifts, model.decoder.head_weight.dtype)
    if result is not None and not result.is_rounding:
        raise not_the_reference(result, *words[int(np.argmax(drifts))])


def _lengths(model: VisionLanguageModel, pair: Preference) -> list[int]:
    """Count the tokens of the chosen and of the rejected response, and those of both that are credited."""
    lengths = [len(model.encode_response(text)) for text in (pair.chosen, pair.rejected)]
    if pair.credit is None:  # no tree has to be encoded for it
        return lengths
    spans = credited_spans(model, pair, *preference_trees(model, [pair])) or ()
    return [*lengths, *(end - start for start, end in spans)]


def not_the_reference(result: Drift, sample: str, worst: str) -> SrcfastError:
    """Return the error; `sample` and `worst` name the response that differs most."""
    return SrcfastError(
        f"{sample}before the first update the policy must equal its reference, but {worst}. Over {result.responses} responses "
        f"their log-probabilities differ by {result.root_mean_square:.2e} nats a root token, the worst by {result.greatest:.2e} "
        f"(rounding makes at most {rounding_bound(result.dtype, result.responses):.1e}, of one response "
        f"{rounding_bound(result.dtype, 1):.1e}). Fix: compute the reference again with this base and adapter: leave "
        "reference_chosen_logprob and reference_rejected_logprob out; in a calibration: another run, with "
        "dpo.reuse_generation_logprobs=false"
    )


def check_reference_hash(preference: Preference, expected_hash: str) -> None:
    """Raise InputError where a pair's reference is missing, is another model's, or is above 0."""
    stored_hash = preference.extra.get("reference_hash")
    missing = [field for field, value in stated_reference(preference).items() if value is None]
    if preference.credit is not None and missing == list(SPAN_FIELDS[1:]):
        raise InputError(
            sample_id=preference.sample_id,
            field=missing[0],
            expected=f"the reference's log-probability of what credit {preference.credit} names",
            found="none: the pair was made with another dpo.credit",
            fix="set dpo.credit back, or take another name or output directory",
        )
    if missing:
        stored_hash = None
    if stored_hash != expected_hash:
        raise InputError(
            sample_id=preference.sample_id,
            field="reference_hash",
            expected=f"reference log-probabilities of {expected_hash}",
            found="none" if stored_hash is None else f"those of {stored_hash}",
            fix="compute the reference again with the base and adapter that training starts from",
        )
    _check_reference_sign(preference)


def _check_reference_sign(preference: Preference) -> None:
    """Raise InputError where a stored log-probability is above 0 by more than rounding, or not a number."""
    for field, value in stated_reference(preference).items():
        if not value <= LOGPROB_ROUNDING:  # so written, the test fails for NaN as well
            raise InputError(
                sample_id=preference.sample_id,
                field=field,
                expected="a log-probability, at most 0",
                found=value,
                fix="compute the reference again: leave these fields out",
            )
