"""A tree's rows have the same dropout keys wherever it is packed; so its hidden states and its step are the same, too."""

from __future__ import annotations

import pytest
import torch
from helpers.plain_training import check_training, plain_keys, plain_training, raps
from helpers.seeds import fresh_rng
from helpers.small_model import SmallModel, path_logprob, response_items

from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.forest import Forest
from srcfast.models.dropout_keys import dropout_keys, dropping, drops
from srcfast.models.lora import adapters, lora_parameters
from srcfast.stages.rationale import rationale_loss, rationale_trees, response_tokens
from srcfast.training.items import Objective
from srcfast.training.loop import train

LORA = LoRAConfig(r=3, alpha=12.0, dropout=0.2)
SETTINGS = TrainingConfig(
    micro_batch_size=6,
    token_budget=200,
    learning_rate=0.01,
    epochs=2,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
).seeded(4)


def trained(seed: int = SETTINGS.seed, **settings: object) -> torch.Tensor:
    model = SmallModel(lora=LORA)
    own = SETTINGS.replace(**settings).seeded(seed)
    train(model, response_items(9), objective=Objective(rationale_loss, response_tokens), settings=own)
    return torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model)])


def test_a_tree_s_keys_are_its_own_whatever_is_packed_with_it() -> None:
    trees = [item.tree for item in response_items(12)]
    rng = fresh_rng()
    seed, step = int(rng.integers(2**32)), int(rng.integers(1000))
    alone = [dropout_keys(Forest.of([tree]), seed, step, [place]) for place, tree in enumerate(trees)]
    assert [len(keys) for keys in alone] == [tree.num_tokens for tree in trees]
    order = rng.permutation(12)
    together = dropout_keys(Forest.of([trees[i] for i in order]), seed, step, order.tolist())
    assert torch.equal(together, torch.cat([alone[i] for i in order]))


def test_other_seeds_steps_places_and_rows_have_other_keys() -> None:
    forest = Forest.of([item.tree for item in response_items(5)])
    found = [
        dropout_keys(forest, seed, step, [first + place for place in range(5)])
        for seed in (0, 1)
        for step in (0, 1, 2)
        for first in (0, 5)
    ]
    every = torch.cat(found)
    assert len(every.unique()) == len(every) == 12 * forest.num_tokens


def test_hidden_states_with_dropout_are_those_of_the_tree_alone() -> None:
    model = SmallModel(lora=LORA).train()
    for number, parameter in enumerate(lora_parameters(model)):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    trees = [item.tree for item in response_items(4)]
    whole = Forest.of(trees)
    with dropping(model.decoder, dropout_keys(whole, 1, 2, range(4))):
        expected = model(whole).split([tree.num_tokens for tree in trees])
    for place, tree in enumerate(trees):
        forest = Forest.of([tree])
        with dropping(model.decoder, dropout_keys(forest, 1, 2, [place])):
            torch.testing.assert_close(model(forest), expected[place], rtol=1e-10, atol=1e-11)  # fp64, other sums
        with dropping(model.decoder, dropout_keys(forest, 1, 3, [place])):
            assert not torch.allclose(model(forest), expected[place], atol=1e-3)
    assert model.decoder.dropout_keys is None


def test_however_a_batch_is_cut_training_with_dropout_is_the_same() -> None:
    expected = trained()
    for micro_batch, budget in ((2, 200), (6, 60), (1, 45)):
        accumulated = 6 // micro_batch
        found = trained(micro_batch_size=micro_batch, gradient_accumulation_steps=accumulated, token_budget=budget)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert float((trained(seed=5) - expected).abs().max()) > 1e-3


def test_pytorch_s_generator_neither_decides_what_is_dropped_nor_is_moved() -> None:
    weights = []
    for seed in (1, 2):
        model = SmallModel(lora=LORA)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(model, response_items(9), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model)]))
    assert torch.equal(*weights)


def test_every_adapted_layer_has_a_number_that_its_neighbours_do_not_change() -> None:
    all_of_them = SmallModel(lora=LORA)
    some = SmallModel(lora=LORA.replace(target_modules=("v_proj", "down_proj")))
    numbers = {name: layer.number for name, layer in adapters(all_of_them).items()}
    assert sorted(numbers.values()) == list(range(14))
    assert {name: layer.number for name, layer in adapters(some).items()}.items() <= numbers.items()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj",), ("k_proj", "o_proj", "up_proj")])
def test_where_some_layers_of_one_input_are_adapted_they_drop_as_they_do_among_all(targets: tuple[str, ...]) -> None:
    weights = []
    for cut in ({}, {"token_budget": 70}, {"micro_batch_size": 2, "gradient_accumulation_steps": 3}):
        model = SmallModel(lora=LORA.replace(target_modules=targets))
        own = SETTINGS.replace(**cut)
        train(model, response_items(9), objective=Objective(rationale_loss, response_tokens), settings=own)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model)]))
    for other in weights[1:]:  # in fp64: sums in another order
        torch.testing.assert_close(other, weights[0], rtol=1e-9, atol=1e-9)
    without = SmallModel(lora=LORA.replace(target_modules=targets, dropout=0.0))
    train(without, response_items(9), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    plain = torch.cat([parameter.detach().flatten() for parameter in lora_parameters(without)])
    assert not torch.allclose(plain, weights[0])


def test_without_dropout_no_keys_are_made() -> None:
    assert drops(SmallModel(lora=LORA))
    without = SmallModel(lora=LORA.replace(dropout=0.0))
    without.tower = torch.nn.Module()
    without.tower.dropout = 0.1  # as vision towers have it, which are never trained
    assert not drops(without)


@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 1, "gradient_accumulation_steps": 6}])
def test_training_with_dropout_is_a_plain_one_whose_keys_are_written_out(cut: dict[str, int]) -> None:
    """The steps' keys follow from seed, step and position in the global batch, whatever the forests."""
    settings = TrainingConfig(
        epochs=2, micro_batch_size=3, gradient_accumulation_steps=2, learning_rate=0.01, activation_checkpointing=0,
        max_grad_norm=0.5,
    ).seeded(8)  # fmt: skip
    models, rows = [], raps(7, seed=2)
    for _ in range(2):
        model = SmallModel(seed=4, lora=LoRAConfig(r=3, alpha=12.0, dropout=0.3))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        models.append(model.train())
    model, plain = models
    steps = iter(range(100))

    def loss_of(batch: list[int]) -> torch.Tensor:
        step, total, count = next(steps), torch.zeros((), dtype=torch.float64), 0
        for position, index in enumerate(batch):
            sample, response = rows[index]
            prompt, tokens = plain.encode_prompt(sample.question, []), plain.encode_response(response)
            plain.decoder.dropout_keys = plain_keys(8, step, position, len(prompt) + len(tokens))
            total, count = total - path_logprob(plain, prompt, tokens), count + len(tokens)
        return total / count

    objective = Objective(rationale_loss, response_tokens)
    history = train(model, rationale_trees(model, rows), objective=objective, settings=settings.replace(**cut))
    check_training(model, plain, history, plain_training(plain, len(rows), settings, loss_of))
