"""Stage 4's training: confidence-weighted DPO over shared-prefix trees, and log-probabilities of responses.

The tree of a pair is prompt -> {chosen, rejected}; what the two responses have in common at their beginning
is a segment of its own between them, run once. With c the confidence, and log pi the sum over a response's
tokens, the end token included,

    Delta_k = beta [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))]
    L = sum_k c_k [ loss(Delta_k) + sft_weight (-log pi(y+_k) / |y+_k|) ] / sum_k c_k

over the global batch. Rationale-answer pairs of stage 1 can be rehearsed beside them: rehearsal_weight times the
mean of their -log pi(y) / |y| is added. A judge is surer of some kinds of questions than of others, and the
policy forgets those of which it is shown no pairs.

The reference is the policy as it was before the round: its log-probabilities are computed once and stored with
the pair, beside a hash of base and adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from srcfast.config.settings import DPOConfig
from srcfast.data.batching import global_batch
from srcfast.data.forest import Forest, Tree
from srcfast.data.records import LOGPROB_ROUNDING, Preference
from srcfast.errors import InputError, SrcfastError
from srcfast.models.dropout_keys import drops
from srcfast.stages.drift import Drift, drift, drift_of, rounding_bound
from srcfast.stages.logprobs import check_logprobs, reference_logprobs
from srcfast.stages.pair_trees import pair_logit_rows, pair_logprobs, preference_trees
from srcfast.stages.policy import Policy
from srcfast.stages.rationale import RationalePair, rationale_trees
from srcfast.stages.stage_run import StageRun
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.loop import Features, Metrics, TrainingItem, train
from srcfast.training.profiler import StepProfiler
from srcfast_kernels import weighted_dpo_loss
from srcfast_kernels.transfers import to_device


@dataclass(frozen=True)
class PairMeta:
    """What the loss needs of a pair beside its tree."""

    weight: float
    confidence: float
    reference_chosen_logprob: float
    reference_rejected_logprob: float


@dataclass(frozen=True)
class PairDenominator:
    """Over a global batch: the sum of weights, the number of pairs, and that of rehearsed rationale-answer pairs."""

    weight: float
    pairs: int
    rehearsed: int = 0


def preference_loss(settings: DPOConfig) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The loss function that `train` calls: the formula at the top of this file, and what to watch.

    Metrics, each a mean over the global batch's pairs: margin (Delta), reward_accuracy (share of Delta > 0),
    chosen_reward, rejected_reward, chosen_logprob, rejected_logprob, and mean_square_drift, of the two responses' (log pi -
    log pi_ref) / root of their tokens; max_drift, the greatest of its absolute values; and max_logprob, the greatest log pi.
    """

    def loss(
        hidden: Tensor,
        forest: Forest,
        head_weight: Tensor,
        items: Sequence[TrainingItem],
        denominator: PairDenominator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = pair_logprobs(hidden, forest, head_weight)  # [trees] each
        lengths, rejected_lengths = np.array(
            [_lengths(tree) for tree in forest.trees], dtype=np.float64
        ).T  # [trees] each
        pairs = [place for place, item in enumerate(items) if item.meta is not None]
        rehearsed = chosen.new_zeros(())
        if len(pairs) < len(items):
            share = 1.0 / lengths / max(1, denominator.rehearsed)
            share[pairs] = 0.0
            rehearsed = -(chosen * to_device(share, hidden.device, chosen.dtype)).sum()
        rehearsal = settings.rehearsal_weight * rehearsed
        if not pairs:
            return rehearsal, {"rehearsal_loss": rehearsed}
        if len(pairs) < len(items):
            places = to_device(pairs, hidden.device)
            chosen, rejected = chosen.index_select(0, places), rejected.index_select(0, places)  # [P] each
        metas = [items[place].meta for place in pairs]
        columns = (
            [meta.reference_chosen_logprob for meta in metas],
            [meta.reference_rejected_logprob for meta in metas],
            [meta.weight for meta in metas],
            [meta.confidence for meta in metas],
            lengths[pairs],
            rejected_lengths[pairs],
        )
        # One transfer for all numbers, and none is waited for.
        numbers = to_device(np.stack(columns), hidden.device, chosen.dtype)  # [6, P]
        reference_chosen, reference_rejected, weight, confidence, chosen_lengths, _ = numbers
        smoothing: float | Tensor
        if settings.label_smoothing == "confidence":
            smoothing = 0.5 - 0.5 * confidence
        else:
            smoothing = settings.label_smoothing
        output = weighted_dpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            weight,
            beta=settings.beta,
            label_smoothing=smoothing,
            loss_type=settings.loss_type,
            normalizer=denominator.weight,
        )
        total = output.loss + rehearsal
        if settings.sft_weight:
            total = total + settings.sft_weight * (weight * -chosen / chosen_lengths).sum() / denominator.weight
        with torch.no_grad():
            margins = output.chosen_rewards - output.rejected_rewards
            sums = {
                "margin": margins,
                "reward_accuracy": (margins > 0).to(margins.dtype),
                "chosen_reward": output.chosen_rewards,
                "rejected_reward": output.rejected_rewards,
                "chosen_logprob": chosen,
                "rejected_logprob": rejected,
            }
            metrics = {name: values.sum() / denominator.pairs for name, values in sums.items()}
            policy = torch.stack([chosen, rejected])  # [2, P]
            if denominator.rehearsed:
                metrics["rehearsal_loss"] = rehearsed
            drifts = (policy - numbers[:2]) / numbers[4:].sqrt()  # [2, P]
            metrics["mean_square_drift"] = drifts.square().sum() / (2 * denominator.pairs)
            metrics["max_drift"] = drifts.abs().max()
            metrics["max_logprob"] = policy.max()
        return total, metrics

    return loss


def _lengths(tree: Tree) -> tuple[int, int]:
    """Tokens of the chosen and of the rejected response, 1 where a tree has none that is rejected."""
    sizes = [segment.tokens.size for segment in tree.segments[1:]]
    if len(sizes) == 1:
        return sizes[0], 1
    shared = sum(sizes[:-2])
    return shared + sizes[-2], shared + sizes[-1]


def pair_denominator(items: Sequence[TrainingItem]) -> PairDenominator:
    """The global batch's sum of weights, and the number of its pairs and of its rehearsed ones."""
    pairs = [item for item in items if item.meta is not None]
    return PairDenominator(sum(item.meta.weight for item in pairs), len(pairs), len(items) - len(pairs))


def preference_items(
    model: Any,
    preferences: Sequence[Preference],
    weighting: Literal["confidence", "none"] = "confidence",
    rehearsal: Sequence[RationalePair] = (),
) -> list[TrainingItem]:
    """What `train_preference` trains on: the pairs, then the rehearsed rationale-answer pairs."""
    weighted = weighting == "confidence"
    items = [
        TrainingItem(
            tree,
            PairMeta(
                preference.confidence if weighted else 1.0,
                preference.confidence,
                float(preference.reference_chosen_logprob or 0.0),
                float(preference.reference_rejected_logprob or 0.0),
            ),
            preference.images,
        )
        for tree, preference in zip(preference_trees(model, preferences), preferences, strict=True)
    ]
    return items + rationale_trees(model, rehearsal)


def tune_preferences(
    stage: StageRun,
    policy: Policy,
    preferences: Sequence[Preference],
    settings: DPOConfig,
    rehearsal: Sequence[RationalePair] = (),
) -> None:
    """Stage 4, second half: confidence-weighted DPO from the policy as it is, which is the reference."""
    model = policy.model
    with stage.training(model, [*preferences, *rehearsal], settings) as hooks:
        train_preference(
            model,
            preferences,
            settings,
            weighting=stage.config.curation.weighting,
            expected_reference_hash=policy.hash(),
            features=policy.features,
            rehearsal=rehearsal,
            **hooks,
        )


def train_preference(
    model: Any,
    preferences: Sequence[Preference],
    settings: DPOConfig,
    *,
    weighting: Literal["confidence", "none"] = "confidence",
    expected_reference_hash: str,
    features: Features | None = None,
    on_step: Callable[[Metrics], None] | None = None,
    rehearsal: Sequence[RationalePair] = (),
    profiler: StepProfiler | None = None,
    on_items: Callable[[Sequence[TrainingItem]], None] | None = None,
    checkpoints: TrainingCheckpoints | None = None,
) -> list[Metrics]:
    """Preference-tune the model's adapter; one dict of metrics a step (see `train` and `preference_loss`).

    Args:
        model: the policy, which before the first step is the reference.
        preferences: with reference log-probabilities, see `reference_logprobs`.
        settings: the loss and the loop.
        weighting: `confidence` weighs a pair by its confidence, `none` weighs all alike.
        expected_reference_hash: of base and adapter as they are now.
        rehearsal: rationale-answer pairs of stage 1, mixed with the preferences.
        profiler: of some steps.
        on_items: called with what is trained on, before it is.
        checkpoints: see `train`.

    Raises:
        InputError: a pair whose responses are the same, or that has no reference, or another one's, or one above 0.
        SrcfastError: before the first update the policy isn't what the stored log-probabilities say, though
            the hash fits. Or a log-probability is above 0.
    """
    for preference in preferences:
        _check_reference(preference, expected_reference_hash)
    items = preference_items(model, preferences, weighting, rehearsal)
    if on_items is not None:
        on_items(items)
    first = [preferences[index] for index in global_batch(len(items), 0, settings) if index < len(preferences)]
    dtype = model.decoder.head_weight.dtype
    dropout = drops(model)
    if dropout:  # then the first step says nothing of the start: its pairs are looked at without
        check_references(model, first, settings.token_budget, features)

    def check_start(metrics: Metrics) -> None:
        check_logprobs(metrics)
        if metrics["step"] != 0 or dropout or "max_drift" not in metrics:
            return
        found = Drift(math.sqrt(metrics["mean_square_drift"]), metrics["max_drift"], 2 * len(first), dtype)
        if not found.is_rounding:
            check_references(model, first, settings.token_budget, features)  # names the pair
            raise _not_the_reference(found, "", "stored log-probabilities are others")

    return train(
        model,
        items,
        loss=preference_loss(settings),
        denominator=pair_denominator,
        settings=settings,
        features=features,
        on_step=on_step,
        before_update=check_start,
        rows=pair_logit_rows,
        profiler=profiler,
        checkpoints=checkpoints,
    )


def check_references(
    model: Any, preferences: Sequence[Preference], token_budget: int, features: Features | None = None
) -> None:
    """Compute the log-probabilities of some pairs anew; on several ranks each does all of it.

    Raises:
        SrcfastError: a stored one is another model's; the pair is named.
        InputError: one is above 0.
    """
    for preference in preferences:
        _refuse_reference_above_0(preference)
    found = reference_logprobs(model, preferences, reference_hash="", token_budget=token_budget, features=features)
    drifts, words = [], []
    for stored, exact in zip(preferences, found, strict=True):
        for side in ("chosen", "rejected"):
            field = f"reference_{side}_logprob"
            value, own = getattr(stored, field), getattr(exact, field)
            drifts.append(drift(value, own, len(model.encode_response(getattr(stored, side)))))
            words.append((f"sample {stored.sample_id}: ", f"{field} is stored as {value:.6g} and is {own:.6g}"))
    whole = drift_of(drifts, model.decoder.head_weight.dtype)
    if whole is not None and not whole.is_rounding:
        raise _not_the_reference(whole, *words[int(np.argmax(drifts))])


def _not_the_reference(found: Drift, sample: str, worst: str) -> SrcfastError:
    """The error; `sample` and `worst` name the response that differs most."""
    return SrcfastError(
        f"{sample}before the first update the policy must equal its reference, but {worst}. Over {found.responses} responses "
        f"their log-probabilities differ by {found.root_mean_square:.2e} nats a root token, the worst by {found.greatest:.2e} "
        f"(rounding makes at most {rounding_bound(found.dtype, found.responses):.1e}, of one response "
        f"{rounding_bound(found.dtype, 1):.1e}). Fix: compute the reference again with this base and adapter: leave "
        "reference_chosen_logprob and reference_rejected_logprob out; in a calibration: another run, with "
        "dpo.reuse_generation_logprobs=false"
    )


def _check_reference(preference: Preference, expected_hash: str) -> None:
    found = preference.extra.get("reference_hash")
    if preference.reference_chosen_logprob is None or preference.reference_rejected_logprob is None:
        found = None
    if found != expected_hash:
        raise InputError(
            sample_id=preference.sample_id,
            field="reference_hash",
            expected=f"reference log-probabilities of {expected_hash}",
            found="none" if found is None else f"those of {found}",
            fix="compute the reference again with the base and adapter that training starts from",
        )
    _refuse_reference_above_0(preference)


def _refuse_reference_above_0(preference: Preference) -> None:
    for field in ("reference_chosen_logprob", "reference_rejected_logprob"):
        value = getattr(preference, field)
        if not value <= LOGPROB_ROUNDING:
            raise InputError(
                sample_id=preference.sample_id,
                field=field,
                expected="a log-probability, at most 0",
                found=value,
                fix="compute the reference again: leave these fields out",
            )
