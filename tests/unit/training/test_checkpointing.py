"""Recomputed activations: the same gradients, dropout's draws included, for less memory; and rows that are left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_model import letters, random_text
from torch import Tensor, nn

from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.forest import Forest
from srcfast.data.logit_rows import response_logit_rows
from srcfast.models.decoder import Decoder, DecoderConfig
from srcfast.models.dropout_keys import dropout_keys, dropping
from srcfast.models.lora import add_lora, lora_parameters
from srcfast.stages.pair_trees import pair_logprobs, preference_tree
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training import loop
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train

LAYERS = 5


class Deep(nn.Module):
    """Five layers with an adapter; counts how often each is run."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.decoder = Decoder(
            DecoderConfig(
                vocab_size=40,
                hidden_size=24,
                intermediate_size=37,
                num_layers=LAYERS,
                num_heads=4,
                num_kv_heads=2,
                head_dim=6,
                rms_norm_eps=1e-6,
                rope_theta=100.0,
            )
        ).double()
        self.requires_grad_(False)
        add_lora(self, LoRAConfig(r=3, alpha=6.0, dropout=dropout))
        for name, parameter in self.named_parameters():
            if name.endswith("lora_B"):  # at nought it would hide all gradients of A
                nn.init.normal_(parameter, std=0.2)
        self.runs: Counter[int] = Counter()
        for number, layer in enumerate(self.decoder.layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self.runs.update([number]))

    def forward(self, forest: Forest, rows: Tensor | None = None) -> Tensor:
        embeddings = self.decoder.embed(forest.token_ids)
        return self.decoder(embeddings, forest.positions, forest_attend(forest, rows=rows), rows)


def pair_forest(seed: int = 0, pairs: int = 5) -> Forest:
    rng = np.random.default_rng(seed)

    def text(most: int) -> np.ndarray:
        return np.array([*letters(random_text(rng, most)), int(rng.integers(0, 30))])

    common = text(6)
    return Forest.of(
        [
            preference_tree(text(20), np.append(common, text(9)), np.append(common, text(12)), key=k)
            for k in range(pairs)
        ]
    )


def gradients(model: Deep, forest: Forest, every: int, rows: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    model.decoder.checkpoint_layers = every
    model.zero_grad()
    with dropping(model.decoder, dropout_keys(forest, 11, 0, range(len(forest.trees)))):
        hidden = model(forest, rows)
    chosen, rejected = pair_logprobs(hidden, forest, model.decoder.head)
    (chosen - 0.7 * rejected).sum().backward()
    return torch.cat([chosen, rejected]).detach(), [p.grad.clone() for p in lora_parameters(model)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("every", "again"), [(1, 4), (2, 4), (3, 3), (4, 4), (5, 0), (9, 0)])
def test_gradients_are_the_same_and_all_but_the_last_group_is_run_twice(every: int, again: int, dropout: float) -> None:
    model, forest = Deep(dropout).train(), pair_forest()
    whole, expected = gradients(model, forest, 0)
    assert set(model.runs.values()) == {1}
    model.runs.clear()
    values, found = gradients(model, forest, every)
    assert sum(model.runs.values()) == LAYERS + again
    # The same operations on the same numbers.
    torch.testing.assert_close(values, whole, rtol=0.0, atol=0.0)
    assert max(float(one.abs().max()) for one in expected) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_what_is_kept_for_backward_shrinks() -> None:
    model, forest = Deep().train(), pair_forest()

    def kept(every: int) -> int:
        model.decoder.checkpoint_layers = every
        found: dict[int, Tensor] = {}
        frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(forest)
        return sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in frozen)

    # One layer of five is kept, and the inputs of four groups, or of two; of groups of three, two layers and one input.
    whole, *parts = (kept(every) for every in (0, 1, 2, 3))
    assert parts[1] < parts[0] < 0.45 * whole
    assert parts[0] < parts[2] < 0.6 * whole


def test_without_gradients_nothing_is_run_twice() -> None:
    model, forest = Deep(), pair_forest()
    model.decoder.checkpoint_layers = 1
    with torch.no_grad():
        model(forest)
    assert set(model.runs.values()) == {1}


def test_the_setting_holds_for_the_training_alone_and_changes_nothing_of_it() -> None:
    trees = pair_forest(pairs=6).trees
    items = [TrainingItem(replace(tree, segments=(tree.segments[0], tree.segments[1]))) for tree in trees]
    weights, runs = [], []
    for every in (0, 2):
        model = Deep(dropout=0.2)
        settings = TrainingConfig(
            micro_batch_size=3,
            learning_rate=0.01,
            activation_checkpointing=every,
            gradient_accumulation_steps=1,
            token_budget=8192,
        )
        train(model, items, objective=Objective(rationale_loss, response_tokens), settings=settings)
        assert model.decoder.checkpoint_layers == 0
        weights.append(torch.cat([p.detach().flatten() for p in lora_parameters(model)]))
        runs.append(sum(model.runs.values()))
    assert runs == [2 * LAYERS, 2 * (LAYERS + 4)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("memories", "plans", "expected"),
    [([80, 24, 48], [1, 4, 2], 4), ([24, 80], [0, 3], 0), ([16], [5], 5), ([80, 80], [2, 2], 2)],
)
def test_ranks_that_share_layers_recompute_what_the_one_with_the_least_memory_plans(
    memories: list[int], plans: list[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingConfig(activation_checkpointing="auto")
    for rank, plan in enumerate(plans):
        monkeypatch.setattr(loop, "plan_checkpointing", lambda model, trees, settings, plan=plan: plan)
        monkeypatch.setattr(loop, "memory_for", lambda model, rank=rank: memories[rank])

        def gather(value: Any, rank: int = rank) -> list[Any]:
            assert value == [memories[rank], plans[rank]]
            return [list(pair) for pair in zip(memories, plans, strict=True)]

        monkeypatch.setattr(loop.distributed, "gather", gather)
        for is_sharded, layers in ((True, expected), (False, plan)):
            monkeypatch.setattr(loop, "is_sharded", lambda decoder, is_sharded=is_sharded: is_sharded)
            assert loop.checkpoint_layers(Deep(), [], settings) == layers
            assert loop.checkpoint_layers(Deep(), [], settings.replace(activation_checkpointing=3)) == 3


# Rows that no loss reads ---------------------------------------------------------------------------------------


def test_response_rows_are_those_that_predict_a_response_s_token() -> None:
    forest = pair_forest()
    needed: set[int] = set()
    for number, tree in enumerate(forest.trees):
        for segment in range(1, len(tree.segments)):
            needed.update(forest.target_rows(number, [segment])[0].tolist())
    assert response_logit_rows(forest).tolist() == sorted(needed)
    assert len(needed) < forest.num_tokens


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("every", [0, 2])
def test_with_the_needed_rows_alone_log_probabilities_and_gradients_are_the_same(every: int, dropout: float) -> None:
    model, forest = Deep(dropout).train(), pair_forest()
    rows = response_logit_rows(forest)
    with dropping(model.decoder, dropout_keys(forest, 11, 0, range(len(forest.trees)))):
        assert model(forest, rows).shape == (len(rows), 24)
        torch.testing.assert_close(model(forest, rows), model(forest)[rows], rtol=1e-10, atol=1e-12)
    whole, expected = gradients(model, forest, 0)
    values, found = gradients(model, forest, every, rows)
    # fp64 sums in another order.
    torch.testing.assert_close(values, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_training_asks_a_model_that_takes_rows_for_those_of_the_loss(monkeypatch: Any) -> None:
    asked: list[Tensor | None] = []
    forward = Deep.forward

    def watched(self: Deep, forest: Forest, rows: Tensor | None = None) -> Tensor:
        asked.append(rows)
        return forward(self, forest, rows)

    monkeypatch.setattr(Deep, "forward", watched)
    items = [TrainingItem(replace(tree, segments=tree.segments[:2])) for tree in pair_forest(pairs=4).trees]
    settings = TrainingConfig(
        micro_batch_size=4,
        learning_rate=0.01,
        gradient_accumulation_steps=1,
        token_budget=8192,
        activation_checkpointing=0,
    )
    losses = []
    for rows in (None, response_logit_rows):
        history = train(
            Deep(),
            items,
            objective=Objective(rationale_loss, response_tokens, rows),
            settings=settings,
        )
        losses.append(history[0]["loss"])
    assert asked[0] is None and asked[1] is not None
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
