"""Stage 4, second half: train the policy by confidence-weighted DPO over shared-prefix trees.

The tree of a pair is prompt -> {chosen, rejected}; what the two responses have in common at their beginning
is a segment between the prompt and them, run once. With c the confidence, and log pi the sum over a response's
tokens, the end token included,

    Delta_k = beta [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))]
    Q_k = -log sigmoid(r+_k) - log sigmoid(-r-_k), r the two terms of Delta_k
    L = sum_k c_k [ preference_weight loss(Delta_k) + quality_weight Q_k + sft_weight (-log pi(y+_k) / |y+_k|) ] / sum_k c_k

over the global batch. Q is the quality loss of BCO (arXiv 2404.04656) and MPO (arXiv 2411.10442) with reward shift 0. With
`credit: sentence` the sums of Delta and Q run over the first sentence in which the two responses part (`stages/credit.py`).
With preference_weight and quality_weight 0 this is fine-tuning on the chosen responses. Rationale-answer pairs of stage 1
can be rehearsed beside them: rehearsal_weight times the mean of their -log pi(y) / |y| is added. The R-Scorer is surer of
some kinds of questions than of others, and the policy forgets those of which it is shown no pairs.

The reference is the policy as it was before the round: its log-probabilities are computed once and stored with
the pair, beside a hash of base and adapter.

From here the story goes down: `train_preference` hands the loss of `preference_loss` to `training.loop.train`; per forest
that loss gathers the responses' tokens by `pair_trees.pair_tokens` and makes one call of
`srcfast_kernels.weighted_dpo.linear_weighted_dpo`, where the formula of loss(Delta) and its sources are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.config.settings import DPOConfig
from srcfast.data.batching import global_batch
from srcfast.data.forest import Forest, Tree
from srcfast.data.rationale_pairs import RationalePair
from srcfast.data.records import Preference
from srcfast.models.dropout_keys import drops
from srcfast.models.head import Head
from srcfast.models.protocols import VisionLanguageModel
from srcfast.stages.credit import Spans, credited, credited_spans, credited_tokens
from srcfast.stages.drift import Drift
from srcfast.stages.logprobs import check_logprobs, stated_reference
from srcfast.stages.pair_trees import pair_logit_rows, pair_tokens, preference_trees
from srcfast.stages.policy import Policy
from srcfast.stages.rationale import rationale_trees
from srcfast.stages.reference_checks import check_reference_hash, check_references, not_the_reference
from srcfast.stages.stage_run import StageRun
from srcfast.training.items import Loss, Metrics, Objective, TrainingItem
from srcfast.training.loop import TrainingOptions, train
from srcfast_kernels.transfers import to_device
from srcfast_kernels.weighted_dpo import LinearDPOOutput, linear_weighted_dpo


@dataclass(frozen=True)
class PairMeta:
    """What the loss needs of a pair beside its tree.

    Attributes:
        weight: c of the formula.
        confidence: the R-Scorer's, also where `weight` is 1 for all pairs; `label_smoothing: confidence` reads it.
        reference_chosen_logprob, reference_rejected_logprob: log pi_ref, in nats, of the tokens that are credited.
    """

    weight: float
    confidence: float
    reference_chosen_logprob: float
    reference_rejected_logprob: float


@dataclass(frozen=True)
class SpanMeta(PairMeta):
    """The same of a pair whose preference is credited to spans of its responses."""

    spans: Spans


# Of a rehearsed response, in the arrays that hold a number for each tree: it has no weight in the loss of pairs.
_NO_PAIR = PairMeta(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class PairDenominator:
    """Over a global batch: the sum of weights, the number of pairs, and that of rehearsed rationale-answer pairs."""

    weight: float
    pairs: int
    rehearsed: int = 0


def tune_preferences(
    stage: StageRun,
    policy: Policy,
    preferences: Sequence[Preference],
    settings: DPOConfig,
    rehearsal: Sequence[RationalePair] = (),
) -> None:
    """Train the policy's adapter on the pairs from the policy as it is, which is the reference."""
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
    model: VisionLanguageModel,
    preferences: Sequence[Preference],
    settings: DPOConfig,
    *,
    weighting: Literal["confidence", "none"] = "confidence",
    expected_reference_hash: str,
    rehearsal: Sequence[RationalePair] = (),
    on_items: Callable[[Sequence[TrainingItem]], None] | None = None,
    **options: Unpack[TrainingOptions],
) -> list[Metrics]:
    """Preference-tune the model's adapter; return one dict of metrics a step (see `train` and `preference_loss`).

    Args:
        model: the policy, which before the first step is the reference.
        preferences: with reference log-probabilities, see `reference_logprobs`.
        settings: the loss and the loop.
        weighting: `confidence` weighs a pair by its confidence, `none` weighs all alike.
        expected_reference_hash: of base and adapter as they are now.
        rehearsal: rationale-answer pairs of stage 1, mixed with the preferences.
        on_items: called with the training items before training.
        options: of `train`.

    Raises:
        InputError: a pair's responses are the same, or its reference is missing, another model's, or above 0.
        SrcfastError: before the first update the policy isn't what the stored log-probabilities say, though
            the hash fits. Or a log-probability is above 0.
    """
    preferences = credited(preferences, settings.credit)
    for preference in preferences:
        check_reference_hash(preference, expected_reference_hash)
    items = preference_items(model, preferences, weighting, rehearsal)
    if on_items is not None:
        on_items(items)
    first_batch = [preferences[index] for index in global_batch(len(items), 0, settings) if index < len(preferences)]
    dtype = model.decoder.head_weight.dtype
    # The first step's log-probabilities must be the stored ones. With dropout they are not: then the step's pairs are computed
    # beforehand, without dropout.
    dropout, features = drops(model), options.get("features")
    if dropout:
        check_references(model, first_batch, settings.token_budget, features)

    def check_step(metrics: Metrics) -> None:
        check_logprobs(metrics)
        if metrics["step"] != 0 or dropout or "max_drift" not in metrics:
            return
        result = Drift(math.sqrt(metrics["mean_square_drift"]), metrics["max_drift"], 2 * len(first_batch), dtype)
        if not result.is_rounding:
            check_references(model, first_batch, settings.token_budget, features)  # its error names the pair
            raise not_the_reference(result, "", "stored log-probabilities are others")

    objective = Objective(preference_loss(settings), pair_denominator, pair_logit_rows)
    return train(model, items, objective=objective, settings=settings, before_update=check_step, **options)


def preference_items(
    model: VisionLanguageModel,
    preferences: Sequence[Preference],
    weighting: Literal["confidence", "none"] = "confidence",
    rehearsal: Sequence[RationalePair] = (),
) -> list[TrainingItem]:
    """Build the items of `train_preference`: the pairs, then the rehearsed rationale-answer pairs, which have no `PairMeta`."""
    items = [
        TrainingItem(tree, _pair_meta(model, preference, tree, weighting), preference.images)
        for tree, preference in zip(preference_trees(model, preferences), preferences, strict=True)
    ]
    return items + rationale_trees(model, rehearsal)


def _pair_meta(model: VisionLanguageModel, pair: Preference, tree: Tree, weighting: str) -> PairMeta:
    """Return what the loss needs of a pair; a reference that is missing counts as 0 (`check_reference_hash` refuses it)."""
    chosen, rejected = (float(value or 0.0) for value in list(stated_reference(pair).values())[-2:])
    weights = pair.confidence if weighting == "confidence" else 1.0, pair.judge_confidence
    spans = credited_spans(model, pair, tree)
    return PairMeta(*weights, chosen, rejected) if spans is None else SpanMeta(*weights, chosen, rejected, spans)


def pair_denominator(items: Sequence[TrainingItem]) -> PairDenominator:
    """Sum a global batch's weights, and count its pairs and its rehearsed ones."""
    pairs = [item for item in items if item.meta is not None]
    return PairDenominator(sum(item.meta.weight for item in pairs), len(pairs), len(items) - len(pairs))


def preference_loss(settings: DPOConfig) -> Loss:
    """Return the loss function that `train` calls: the formula at the top of this file, and its metrics.

    Metrics, each a mean over the global batch's pairs: margin (Delta), reward_accuracy (share of Delta > 0),
    chosen_reward, rejected_reward, chosen_logprob, rejected_logprob, and mean_square_drift, of the two responses' (log pi -
    log pi_ref) / root of their tokens; max_drift, the greatest of its absolute values; and max_logprob, the greatest log pi.
    Margin, rewards and drift are of the tokens that are credited.
    """

    def loss(
        hidden: Tensor,
        forest: Forest,
        head: Head,
        items: Sequence[TrainingItem],
        denominator: PairDenominator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = [index for index, item in enumerate(items) if item.meta is not None]  # P; the others are rehearsed
        batch = TreeTensors.of(items, forest, denominator.rehearsed, hidden)
        tokens = pair_tokens(hidden, forest)
        counted = credited_tokens(forest, [_spans(item) for item in items])
        output = linear_weighted_dpo(
            tokens.hidden,
            head.weight,
            tokens.targets,
            tokens.sequence_ids,
            batch.reference_logprobs[0],
            batch.reference_logprobs[1],
            batch.weights,
            beta=settings.beta,
            label_smoothing=_label_smoothing(settings, batch.confidences),
            loss_type=settings.loss_type,
            normalizer=denominator.weight or 1.0,  # 0 of a batch that only rehearses
            credited=None if counted is None else to_device(counted, hidden.device),
            **head.options,
        )
        rehearsed = output.loss.new_zeros(())
        # A term of weight 0 adds nothing: not even NaN, where it is infinite.
        total = settings.preference_weight * output.loss if settings.preference_weight else rehearsed
        if len(pairs) < len(items):
            rehearsed = -(output.chosen_logps * batch.rehearsal_shares).sum()
            total = total + settings.rehearsal_weight * rehearsed
        if not pairs:
            return total, {"rehearsal_loss": rehearsed}
        if settings.quality_weight:
            rewards = settings.beta * (torch.stack(output.credited_logps) - batch.reference_logprobs)  # [2, trees]
            quality = batch.weights * (F.softplus(-rewards[0]) + F.softplus(rewards[1]))  # [trees]
            total = total + settings.quality_weight * quality.sum() / denominator.weight
        if settings.sft_weight:
            nll = batch.weights * -output.chosen_logps / batch.lengths[0]  # [trees], 0 of a rehearsed one
            total = total + settings.sft_weight * nll.sum() / denominator.weight
        return total, _metrics(output, batch, pairs, rehearsed, denominator)

    return loss


@dataclass(frozen=True)
class TreeTensors:
    """The numbers of a forest's trees, on the device; a rehearsed response has weight 0 in the loss of pairs.

    Attributes:
        reference_logprobs: [2, trees], chosen and rejected, of the tokens that are credited.
        weights: [trees].
        confidences: [trees].
        lengths: [2, trees], tokens of chosen and rejected.
        credited_lengths: [2, trees], those that are credited.
        rehearsal_shares: [trees], 1 / (tokens * rehearsed responses of the global batch), 0 of a pair.
    """

    reference_logprobs: Tensor
    weights: Tensor
    confidences: Tensor
    lengths: Tensor
    credited_lengths: Tensor
    rehearsal_shares: Tensor

    @classmethod
    def of(cls, items: Sequence[TrainingItem], forest: Forest, rehearsed: int, hidden: Tensor) -> TreeTensors:
        """Copy the numbers to the device of the hidden states, in one transfer that nothing awaits."""
        metas = [_NO_PAIR if item.meta is None else item.meta for item in items]
        lengths = np.array([response_lengths(tree) for tree in forest.trees], dtype=np.float64)  # [trees, 2]
        counted = lengths.copy()
        for tree, spans in enumerate(_spans(item) for item in items):
            if spans is not None:
                counted[tree] = [end - start for start, end in spans]
        shares = 1.0 / lengths[:, 0] / max(1, rehearsed)  # [trees]
        shares[[index for index, item in enumerate(items) if item.meta is not None]] = 0.0
        columns = (
            [meta.reference_chosen_logprob for meta in metas],
            [meta.reference_rejected_logprob for meta in metas],
            [meta.weight for meta in metas],
            [meta.confidence for meta in metas],
            *lengths.T,
            *counted.T,
            shares,
        )
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        numbers = to_device(np.stack(columns), hidden.device, dtype)  # [9, trees]
        return cls(numbers[:2], numbers[2], numbers[3], numbers[4:6], numbers[6:8], numbers[8])


def _spans(item: TrainingItem) -> Spans | None:
    """Return the spans that an item's preference is credited to; None: whole responses."""
    return item.meta.spans if isinstance(item.meta, SpanMeta) else None


def response_lengths(tree: Tree) -> tuple[int, int]:
    """Count the tokens of the chosen and of the rejected response; (n, 1) for a tree with one response of n tokens."""
    sizes = [segment.tokens.size for segment in tree.segments[1:]]
    if len(sizes) == 1:
        return sizes[0], 1
    shared = sum(sizes[:-2])
    return shared + sizes[-2], shared + sizes[-1]


def _label_smoothing(settings: DPOConfig, confidences: Tensor) -> float | Tensor:
    """Return the probability that a label is wrong: the setting, or by pair [P], from 0 at confidence 1 to 1/2 at 0."""
    if settings.label_smoothing == "confidence":
        return 0.5 - 0.5 * confidences
    return settings.label_smoothing


@torch.no_grad()
def _metrics(
    output: LinearDPOOutput, batch: TreeTensors, pairs: Sequence[int], rehearsed: Tensor, denominator: PairDenominator
) -> dict[str, Tensor]:
    """Return the metrics of `preference_loss`, over the trees that are pairs."""
    rewards = torch.stack([output.chosen_rewards, output.rejected_rewards])  # [2, trees]
    policy = torch.stack([output.chosen_logps, output.rejected_logps])  # [2, trees]
    counted = torch.stack(output.credited_logps)  # [2, trees]
    reference, lengths = batch.reference_logprobs, batch.credited_lengths  # [2, trees] each
    if len(pairs) < policy.shape[1]:
        index = to_device(pairs, policy.device)
        rewards, policy, counted, reference, lengths = (
            one.index_select(1, index) for one in (rewards, policy, counted, reference, lengths)
        )
    margins = rewards[0] - rewards[1]  # [P]
    sums = {
        "margin": margins,
        "reward_accuracy": (margins > 0).to(margins.dtype),
        "chosen_reward": rewards[0],
        "rejected_reward": rewards[1],
        "chosen_logprob": policy[0],
        "rejected_logprob": policy[1],
    }
    metrics = {name: values.sum() / denominator.pairs for name, values in sums.items()}
    if denominator.rehearsed:
        metrics["rehearsal_loss"] = rehearsed
    drifts = (counted - reference) / lengths.sqrt()  # [2, P], z of `drift.py`
    metrics["mean_square_drift"] = drifts.square().sum() / (2 * denominator.pairs)
    metrics["max_drift"] = drifts.abs().max()
    metrics["max_logprob"] = policy.max()
    return metrics
