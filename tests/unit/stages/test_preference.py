"""Preference training: log-probabilities, the start, weights, refusals."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_model import SmallModel, path_logprob, random_preferences

from srcfast.config.settings import Config, DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.records import Sample
from srcfast.errors import ConfigError, InputError, SrcfastError
from srcfast.models.head import Head
from srcfast.stages.dpo import PairMeta, pair_denominator, preference_items, preference_loss, train_preference
from srcfast.stages.logprobs import check_logprobs, reference_logprobs, response_logprobs
from srcfast.stages.pair_trees import pair_logprobs, preference_tree, preference_trees
from srcfast.stages.rationale import rationale_trees
from srcfast.stages.reference_checks import check_reference_hash
from srcfast.stages.references import with_references
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train
from srcfast_kernels import weighted_dpo, weighted_dpo_loss
from srcfast_kernels.backends import use_backend

SETTINGS = TrainingConfig(
    micro_batch_size=8,
    token_budget=4096,
    learning_rate=0.003,
    warmup_ratio=0.0,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
).seeded(1)


def referenced(model: SmallModel, count: int, seed: int = 0) -> list:
    return reference_logprobs(model, random_preferences(count, seed), reference_hash="abc", token_budget=150)


def with_loss(loop: TrainingConfig, **loss: Any) -> DPOConfig:
    """The loop's settings with those of the loss."""
    return DPOConfig(**loop.model_dump(), **({"sft_weight": 0.0} | loss)).seeded(loop.seed)


def trained(model: SmallModel, preferences: list, loop: TrainingConfig, **loss: Any) -> list[dict]:
    return train_preference(model, preferences, with_loss(loop, **loss), expected_reference_hash="abc")


def test_reference_log_probabilities_are_those_of_each_sequence_alone() -> None:
    model, plain = SmallModel(), random_preferences(7)
    for before, after in zip(plain, referenced(model, 7), strict=True):
        prompt = model.encode_prompt(before.prompt, [])
        for text, found in (
            (before.chosen, after.reference_chosen_logprob),
            (before.rejected, after.reference_rejected_logprob),
        ):
            expected = path_logprob(model, prompt, model.encode_response(text)).item()
            assert found == pytest.approx(expected, rel=1e-10)
        assert after.extra == {**before.extra, "reference_hash": "abc"}


def test_a_shared_beginning_changes_neither_log_probabilities_nor_gradients() -> None:
    model = SmallModel()
    prompt, common = np.array([5, 6, 7]), np.array([8, 9, 10, 11])
    chosen, rejected = np.append(common, [12, 2]), np.append(common, [13, 14, 15, 2])
    tree = preference_tree(prompt, chosen, rejected)
    assert [segment.tokens.size for segment in tree.segments] == [3, 4, 2, 4]
    forest = Forest.of([tree])
    found = pair_logprobs(model(forest), forest, model.decoder.head)
    expected = path_logprob(model, prompt, chosen), path_logprob(model, prompt, rejected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = (0.7, -1.9)  # unlike ones, so that what is shared doesn't cancel
    ours = torch.autograd.grad(sum(w * x.sum() for w, x in zip(weights, found, strict=True)), parameters)
    theirs = torch.autograd.grad(sum(w * x for w, x in zip(weights, expected, strict=True)), parameters)
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=1e-11, atol=1e-11)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


def test_a_response_that_begins_with_the_other_keeps_a_token_of_its_own() -> None:
    tree = preference_tree(np.array([5]), np.array([6, 7]), np.array([6, 7, 8]))
    assert [(segment.tokens.tolist(), segment.parent) for segment in tree.segments] == [
        ([5], -1),
        ([6], 0),
        ([7], 1),
        ([7, 8], 1),
    ]


def test_responses_to_one_prompt_are_scored_together_as_if_alone() -> None:
    model, rng = SmallModel(), np.random.default_rng(2)
    prompts = [rng.integers(4, 40, n) for n in (11, 3)]
    items = [(prompts[i % 2], (), rng.integers(4, 40, rng.integers(1, 9))) for i in range(9)]
    found = response_logprobs(model, items, token_budget=30)
    for (prompt, _, response), (logprob, tokens) in zip(items, found, strict=True):
        assert tokens == len(response)
        assert logprob == pytest.approx(path_logprob(model, prompt, response).item(), rel=1e-10)
    with pytest.raises(InputError, match="at most 10 tokens"):
        response_logprobs(model, items, token_budget=10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_before_the_first_update_margins_are_nought_and_the_loss_is_ln_2(dtype: torch.dtype) -> None:
    model = SmallModel(dtype=dtype)
    preferences = referenced(model, 16)
    history = trained(model, preferences, SETTINGS.replace(epochs=6), beta=0.3)
    start, end = history[0], history[-1]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(start["margin"]) < 1e-5 and start["max_drift"] < 1e-5
    assert end["loss"] < start["loss"] - 0.02 and end["margin"] > 0.05 and end["reward_accuracy"] > 0.5
    assert end["margin"] == pytest.approx(end["chosen_reward"] - end["rejected_reward"], rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_training_is_the_same_however_the_batch_is_split(dtype: torch.dtype, tolerance: float) -> None:
    def weights(settings: TrainingConfig) -> torch.Tensor:
        model = SmallModel(dtype=dtype, lora=LoRAConfig(r=3, alpha=12.0))
        history = trained(model, referenced(model, 24), settings, sft_weight=0.4, label_smoothing=0.1)
        assert len(history) == 3
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    whole = weights(SETTINGS)
    for change in (
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
        {"token_budget": 70},
        {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "token_budget": 100},
    ):
        # fp32: sums of some hundred terms in another order, enlarged where AdamW divides by small gradients.
        torch.testing.assert_close(weights(SETTINGS.replace(**change)), whole, rtol=tolerance, atol=tolerance)


def loss_by_hand(model: SmallModel, preferences: list, settings: DPOConfig, weighted: bool = True) -> float:
    total = weight_sum = 0.0
    for pair in preferences:
        prompt = model.encode_prompt(pair.prompt, [])
        texts = (model.encode_response(pair.chosen), model.encode_response(pair.rejected))
        chosen, rejected = (float(path_logprob(model, prompt, text).detach()) for text in texts)
        margin = (chosen - pair.reference_chosen_logprob) - (rejected - pair.reference_rejected_logprob)
        weight = pair.confidence if weighted else 1.0
        epsilon = settings.label_smoothing
        epsilon = (1 - pair.confidence) / 2 if epsilon == "confidence" else epsilon
        delta = settings.beta * margin
        loss = (1 - epsilon) * math.log1p(math.exp(-delta)) + epsilon * math.log1p(math.exp(delta))
        total += weight * (loss - settings.sft_weight * chosen / len(texts[0]))
        weight_sum += weight
    return total / weight_sum


@pytest.mark.parametrize(
    ("settings", "weighted"),
    [
        (DPOConfig(beta=0.4, sft_weight=0.0), True),
        (DPOConfig(beta=0.4, sft_weight=0.0), False),
        (DPOConfig(beta=0.2, sft_weight=0.7, label_smoothing=0.15), True),
        (DPOConfig(beta=0.2, label_smoothing="confidence", sft_weight=0.0), True),
    ],
)
def test_the_loss_is_the_formula_s(settings: DPOConfig, weighted: bool) -> None:
    model = SmallModel(seed=1)
    preferences = referenced(SmallModel(seed=2), 9)  # another model's: margins are far from nought
    items = [
        TrainingItem(
            tree,
            PairMeta(
                pair.confidence if weighted else 1.0,
                pair.confidence,
                pair.reference_chosen_logprob,
                pair.reference_rejected_logprob,
            ),
        )
        for tree, pair in zip(preference_trees(model, preferences), preferences, strict=True)
    ]
    total = 0.0
    for part in (items[:4], items[4:]):
        forest = Forest.of([item.tree for item in part])
        loss, _ = preference_loss(settings)(model(forest), forest, model.decoder.head, part, pair_denominator(items))
        total += loss.item()
    assert total == pytest.approx(loss_by_hand(model, preferences, settings, weighted), rel=1e-9)


def test_confidence_smooths_labels_also_where_it_weighs_no_pair() -> None:
    """Curation without weighting stores confidence 1; the R-Scorer's is stored beside it."""
    model = SmallModel(seed=1)
    judged = [replace(pair, confidence=1.0, extra={"judge_confidence": 0.25}) for pair in referenced(model, 3)]
    stated = [replace(pair, confidence=0.25, extra={}) for pair in judged]
    metas = [[item.meta for item in preference_items(model, pairs, "none")] for pairs in (judged, stated)]
    assert metas[0] == metas[1] and {(meta.weight, meta.confidence) for meta in metas[0]} == {(1.0, 0.25)}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "settings",
    [
        DPOConfig(sft_weight=0.0),
        DPOConfig(beta=0.2, sft_weight=0.7, label_smoothing="confidence", rehearsal_weight=1.5),
        DPOConfig(beta=0.3, sft_weight=0.1, loss_type="ipo", rehearsal_weight=0.5),
    ],
)
def test_the_fused_loss_is_that_of_the_references_log_probabilities(
    settings: DPOConfig, backend: Any, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, with shared beginnings and rehearsal: value, gradient, and the log-probabilities that are watched."""
    launches = []
    launch = weighted_dpo.token_dpo_triton
    monkeypatch.setattr(weighted_dpo, "token_dpo_triton", lambda *given: launches.append(1) or launch(*given))
    rng = np.random.default_rng(3)
    items = []
    for shared, chosen, rejected in ((4, 5, 3), (0, 2, 7), (1, 1, 1)):
        both = rng.integers(4, 40, shared)
        ends = [np.append(both, rng.permutation(40)[:count]) for count in (chosen, rejected)]
        tree = preference_tree(rng.integers(4, 40, 6), *ends)
        items.append(TrainingItem(tree, PairMeta(*rng.uniform(0.1, 1.0, 2), *rng.uniform(-30.0, -5.0, 2))))
    if settings.rehearsal_weight:
        items.insert(1, TrainingItem(Tree((Segment(rng.integers(4, 40, 5)), Segment(rng.integers(4, 40, 4), 0)))))
    forest = Forest.of([item.tree for item in items])
    generator = torch.Generator().manual_seed(4)
    head = Head(torch.randn(40, 8, generator=generator, dtype=torch.float64), softcap)
    hidden = torch.randn(forest.num_tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    denominator = pair_denominator(items)
    with use_backend(backend):
        loss, metrics = preference_loss(settings)(hidden, forest, head, items, denominator)
        (gradient,) = torch.autograd.grad(loss, hidden)
    assert len(launches) == (backend == "triton")

    chosen, rejected = pair_logprobs(hidden, forest, head)
    pairs = [index for index, item in enumerate(items) if item.meta is not None]
    metas = [items[index].meta for index in pairs]
    columns = ("reference_chosen_logprob", "reference_rejected_logprob", "weight", "confidence")
    numbers = torch.tensor([[getattr(meta, name) for meta in metas] for name in columns], dtype=torch.float64)
    smoothing = 0.5 - 0.5 * numbers[3] if settings.label_smoothing == "confidence" else settings.label_smoothing
    expected = weighted_dpo_loss(
        chosen[pairs],
        rejected[pairs],
        *numbers[:3],
        beta=settings.beta,
        label_smoothing=smoothing,
        loss_type=settings.loss_type,
        normalizer=denominator.weight,
    ).loss
    for index, item in enumerate(items):
        size = sum(segment.tokens.size for segment in item.tree.segments[1:-1]) or item.tree.segments[1].tokens.size
        share = settings.sft_weight * item.meta.weight / denominator.weight if item.meta else settings.rehearsal_weight
        expected = expected - share * chosen[index] / size
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)
    assert metrics["chosen_logprob"].item() == pytest.approx(chosen[pairs].mean().item(), rel=1e-12)
    assert metrics["rejected_logprob"].item() == pytest.approx(rejected[pairs].mean().item(), rel=1e-12)


def test_without_a_preference_loss_the_stage_fine_tunes_on_the_chosen_responses() -> None:
    """A preference loss of infinity (IPO of a reference far off, in fp32) has no part in it; the metrics stay."""
    settings = DPOConfig(preference_weight=0.0, sft_weight=0.7, loss_type="ipo")
    model = SmallModel(seed=1)
    pairs = [replace(pair, reference_rejected_logprob=-1e200) for pair in referenced(model, 5)]
    items = preference_items(model, pairs)
    forest = Forest.of([item.tree for item in items])
    loss, metrics = preference_loss(settings)(model(forest), forest, model.decoder.head, items, pair_denominator(items))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        tokens = model.encode_response(pair.chosen)
        likelihood = path_logprob(model, model.encode_prompt(pair.prompt, []), tokens) / len(tokens)
        expected = expected - 0.7 * pair.confidence * likelihood / sum(one.confidence for one in pairs)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for mine, true in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12)
    assert metrics["margin"] < -1e198 and {"chosen_logprob", "rejected_logprob", "reward_accuracy"} <= metrics.keys()


def rehearsed(count: int) -> list[tuple[Sample, str]]:
    pairs = random_preferences(count, seed=5)
    samples = [Sample(f"r{k}", (), pair.prompt, "red", image_root=pair.image_root) for k, pair in enumerate(pairs)]
    return [(sample, pair.chosen) for sample, pair in zip(samples, pairs, strict=True)]


@pytest.mark.parametrize("cut", [4, 9, 11])  # a forest of both kinds, one of pairs and one of rehearsal, one of each
def test_rehearsal_adds_its_mean_likelihood_whatever_the_cut(cut: int) -> None:
    settings = DPOConfig(beta=0.2, sft_weight=0.7, rehearsal_weight=1.5)
    model = SmallModel(seed=1)
    preferences, raps = referenced(SmallModel(seed=2), 9), rehearsed(5)
    pairs = zip(preference_trees(model, preferences), preferences, strict=True)
    items = [
        TrainingItem(
            tree, PairMeta(p.confidence, p.confidence, p.reference_chosen_logprob, p.reference_rejected_logprob)
        )
        for tree, p in pairs
    ] + rationale_trees(model, raps)
    total = 0.0
    for part in (items[:cut], items[cut:]):
        forest = Forest.of([item.tree for item in part])
        loss, _ = preference_loss(settings)(model(forest), forest, model.decoder.head, part, pair_denominator(items))
        total += loss.item()
    likelihoods = []
    for sample, text in raps:
        response = model.encode_response(text)
        logprob = float(path_logprob(model, model.encode_prompt(sample.question, []), response).detach())
        likelihoods.append(logprob / len(response))
    expected = loss_by_hand(model, preferences, settings) - 1.5 * np.mean(likelihoods)
    assert total == pytest.approx(expected, rel=1e-9)


def test_rehearsal_holds_what_it_rehearses_while_pairs_are_learnt() -> None:
    def likelihood(raps: list[tuple[Sample, str]], weight: float) -> tuple[float, float]:
        model = SmallModel()
        history = train_preference(
            model,
            referenced(model, 12),
            with_loss(SETTINGS.replace(epochs=4), rehearsal_weight=weight),
            expected_reference_hash="abc",
            rehearsal=raps,
        )
        total = 0.0
        for sample, text in rehearsed(4):
            prompt = model.encode_prompt(sample.question, [])
            total += float(path_logprob(model, prompt, model.encode_response(text)).detach())
        return total, history[-1]["margin"]

    without, _ = likelihood([], 0.0)
    with_rehearsal, margin = likelihood(rehearsed(4), 2.0)
    assert with_rehearsal > without + 1.0 and margin > 0.02


def test_a_pair_of_little_confidence_weighs_little() -> None:
    def chosen_gain(confidence: float) -> float:
        model = SmallModel()
        first, second = referenced(model, 2)
        pairs = [replace(first, confidence=confidence), replace(second, confidence=1.0)]
        trained(model, pairs, SETTINGS.replace(epochs=3))
        prompt = model.encode_prompt(first.prompt, [])
        margins = [
            float(path_logprob(model, prompt, model.encode_response(t)).detach())
            for t in (first.chosen, first.rejected)
        ]
        return (margins[0] - margins[1]) - (first.reference_chosen_logprob - first.reference_rejected_logprob)

    assert chosen_gain(1.0) > 2 * abs(chosen_gain(1e-3))


def test_a_reference_of_another_model_is_refused_by_name() -> None:
    model = SmallModel()
    preferences = referenced(model, 3)
    for wrong, found in (
        ({"extra": {"reference_hash": "xyz"}}, "those of xyz"),
        ({"extra": {}}, "none"),
        ({"reference_rejected_logprob": None}, "none"),
    ):
        pairs = [*preferences[:2], replace(preferences[2], **wrong)]
        with pytest.raises(InputError, match=f"sample-2.*reference_hash.*of abc, found {found}"):
            trained(model, pairs, SETTINGS)


def test_a_stored_log_probability_that_is_not_the_policy_s_is_refused_before_the_update() -> None:
    model = SmallModel()
    preferences = referenced(model, 8)
    wrong = replace(preferences[3], reference_chosen_logprob=preferences[3].reference_chosen_logprob + 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(SrcfastError, match="before the first update"):
        trained(model, [*preferences[:3], wrong, *preferences[4:]], SETTINGS)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_with_dropout_too_a_stored_log_probability_that_is_not_the_policy_s_is_refused() -> None:
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0, dropout=0.2))
    preferences = referenced(model, 8)
    assert len(trained(model, preferences, SETTINGS)) == 1
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0, dropout=0.2))
    wrong = replace(preferences[3], reference_rejected_logprob=preferences[3].reference_rejected_logprob * 1.01)
    with pytest.raises(SrcfastError, match="sample-3.*before the first update.*reference_rejected_logprob.*Fix"):
        trained(model, [*preferences[:3], wrong, *preferences[4:]], SETTINGS)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def test_a_pair_of_identical_responses_is_refused_by_name() -> None:
    model = SmallModel()
    pair = referenced(model, 1)[0]
    with pytest.raises(InputError, match="sample-0.*the same tokens"):
        trained(model, [replace(pair, rejected=pair.chosen)], SETTINGS)


def test_a_reference_above_0_is_refused_by_name() -> None:
    model = SmallModel(lora=LoRAConfig(r=3, alpha=32.0))
    pairs = referenced(model, 3)
    pairs[1] = replace(pairs[1], reference_rejected_logprob=0.25)
    with pytest.raises(InputError, match="sample-1.*reference_rejected_logprob.*at most 0, found 0.25.*Fix"):
        trained(model, pairs, SETTINGS)


def test_a_log_probability_above_0_is_an_error_and_rounding_is_none() -> None:
    check_logprobs({"step": 3, "max_logprob": 1e-6})
    with pytest.raises(SrcfastError, match="step 3: expected log-probabilities of at most 0, found 0.01"):
        check_logprobs({"step": 3, "max_logprob": 0.01})


def test_the_greatest_log_probability_of_a_step_is_watched() -> None:
    model = SmallModel(lora=LoRAConfig(r=3, alpha=32.0))
    pairs = referenced(model, 4)
    first = trained(model, pairs, SETTINGS)[0]
    stored = [value for pair in pairs for value in (pair.reference_chosen_logprob, pair.reference_rejected_logprob)]
    assert first["max_logprob"] == pytest.approx(max(stored), rel=1e-6)


@pytest.mark.parametrize("changed", [field.name for field in fields(PairMeta)])
def test_a_stopped_training_does_not_go_on_with_another_confidence_or_reference(changed: str, tmp_path: Path) -> None:
    def run(change: float) -> None:
        model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
        items = preference_items(model, referenced(model, 3))
        value = getattr(items[1].meta, changed) + change
        items[1] = replace(items[1], meta=replace(items[1].meta, **{changed: value}))
        checkpoints = TrainingCheckpoints(tmp_path, {}, minutes=0, steps=1)
        objective = Objective(preference_loss(DPOConfig()), pair_denominator)
        train(model, items, objective=objective, settings=SETTINGS, checkpoints=checkpoints)

    run(0.0)
    run(0.0)  # the same goes on
    with pytest.raises(ConfigError, match="this checkpoint is of a training with items"):
        run(-0.01)


def test_a_log_probability_of_nought_is_one_and_not_a_missing_one(tmp_path: Path) -> None:
    """A response of certain tokens has log-probability 0: it is stored, compared and trained with as any other."""
    (pair,) = random_preferences(1)
    stored = replace(
        pair, reference_chosen_logprob=0.0, reference_rejected_logprob=0.0, extra={"reference_hash": "abc"}
    )
    check_reference_hash(stored, "abc")
    (item,) = preference_items(SmallModel(), [stored])
    assert (item.meta.reference_chosen_logprob, item.meta.reference_rejected_logprob) == (0.0, 0.0)
    policy = SimpleNamespace(hash=lambda: "abc", model=SmallModel(), features=None)
    pairs, computed = with_references(Config(quiet=True), policy, [stored], tmp_path)
    assert computed == 0 and pairs == [stored]


def test_a_step_s_metrics_by_hand() -> None:
    """Shared beginnings, a margin of exactly 0, lengths that differ, a rehearsed response between the pairs."""
    rng = np.random.default_rng(9)
    settings = DPOConfig(beta=0.5, sft_weight=0.0, rehearsal_weight=0.5)
    trees = []
    for shared, chosen, rejected in ((3, 2, 6), (0, 4, 1), (2, 1, 3)):
        both = rng.integers(4, 40, shared)
        ends = [np.append(both, rng.permutation(36)[:count] + 4) for count in (chosen, rejected)]
        trees.append(preference_tree(rng.integers(4, 40, 6), *ends))
    trees.insert(1, Tree((Segment(rng.integers(4, 40, 5)), Segment(rng.integers(4, 40, 4), 0))))
    lengths = [(5, 9), (4, 1), (3, 5)]
    forest, model = Forest.of(trees), SmallModel(seed=3)
    hidden = model(forest).detach()
    chosen, rejected = (side.tolist() for side in pair_logprobs(hidden, forest, model.decoder.head))
    policy = [(chosen[tree], rejected[tree]) for tree in (0, 2, 3)]
    # The second pair's reference is the policy: its margin is 0 without rounding, and is no pair that is ranked right.
    reference = [(policy[0][0] - 0.4, policy[0][1] + 0.3), policy[1], (policy[2][0] + 0.9, policy[2][1] + 0.1)]
    metas = [PairMeta(weight, 0.5, *both) for weight, both in zip((0.2, 0.9, 0.4), reference, strict=True)]
    items = [TrainingItem(tree) for tree in trees]
    for tree, meta in zip((0, 2, 3), metas, strict=True):
        items[tree] = TrainingItem(trees[tree], meta)
    loss, metrics = preference_loss(settings)(hidden, forest, model.decoder.head, items, pair_denominator(items))
    rewards = [[0.5 * (p - r) for p, r in zip(*both, strict=True)] for both in zip(policy, reference, strict=True)]
    margins = [one - other for one, other in rewards]
    assert margins[0] == pytest.approx(0.35) and margins[1] == 0.0 and margins[2] == pytest.approx(-0.4)
    drifts = [
        (p - r) / math.sqrt(n)
        for sides in zip(policy, reference, lengths, strict=True)
        for p, r, n in zip(*sides, strict=True)
    ]
    rehearsed_loss = -chosen[1] / 4
    expected = {
        "margin": sum(margins) / 3,
        "reward_accuracy": 1 / 3,
        "chosen_reward": sum(one for one, _ in rewards) / 3,
        "rejected_reward": sum(other for _, other in rewards) / 3,
        "chosen_logprob": sum(one for one, _ in policy) / 3,
        "rejected_logprob": sum(other for _, other in policy) / 3,
        "rehearsal_loss": rehearsed_loss,
        "mean_square_drift": sum(z * z for z in drifts) / 6,
        "max_drift": max(abs(z) for z in drifts),
        "max_logprob": max(value for both in policy for value in both),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-10, abs=1e-12)
    terms = [meta.weight * math.log1p(math.exp(-margin)) for meta, margin in zip(metas, margins, strict=True)]
    assert loss.item() == pytest.approx(sum(terms) / 1.5 + 0.5 * rehearsed_loss, rel=1e-10)


@pytest.mark.parametrize(("roundoffs", "passes"), [(3.0, True), (3.5, False)])
def test_the_first_step_is_bounded_by_the_number_of_its_responses(roundoffs: float, passes: bool) -> None:
    """Two responses may differ by 64 (1 + 3 / sqrt(2)) = 64 x 3.12 roundoffs a root token, one by 64 x 4."""
    model = SmallModel()
    (pair,) = referenced(model, 1)
    z = roundoffs * 64 * 2.0**-36
    lengths = [len(model.encode_response(text)) for text in (pair.chosen, pair.rejected)]
    moved = replace(
        pair,
        reference_chosen_logprob=pair.reference_chosen_logprob - z * math.sqrt(lengths[0]),
        reference_rejected_logprob=pair.reference_rejected_logprob - z * math.sqrt(lengths[1]),
    )
    if passes:
        assert len(trained(model, [moved], SETTINGS)) == 1
    else:
        with pytest.raises(SrcfastError, match="before the first update"):
            trained(model, [moved], SETTINGS)


@pytest.mark.parametrize("value", [math.nan, 1.1e-3, 5.0])
@pytest.mark.parametrize("field", ["reference_chosen_logprob", "reference_rejected_logprob"])
def test_a_reference_that_is_no_log_probability_is_refused(field: str, value: float) -> None:
    (pair,) = random_preferences(1)
    stored = replace(
        pair, reference_chosen_logprob=-1.0, reference_rejected_logprob=-1.0, extra={"reference_hash": "a"}
    )
    check_reference_hash(stored, "a")
    check_reference_hash(replace(stored, **{field: 0.9e-3}), "a")  # rounding
    with pytest.raises(InputError, match=f"{field}.*at most 0"):
        check_reference_hash(replace(stored, **{field: value}), "a")


def test_a_step_s_greatest_log_probability_may_round_above_0() -> None:
    check_logprobs({"step": 0, "max_logprob": 0.9e-3})
    check_logprobs({"step": 0})
    with pytest.raises(SrcfastError, match="found 0.0011"):
        check_logprobs({"step": 0, "max_logprob": 1.1e-3})
