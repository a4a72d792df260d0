"""The loop: splits change nothing, order is a function of the seed, faults stop it before the update."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_model import (
    SmallModel,
    image_embedding,
    random_preferences,
    response_items,
)
from torch.utils._python_dispatch import TorchDispatchMode

from srcfast.config.settings import DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.batching import global_batch, num_steps
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError, SrcfastError
from srcfast.memory.flops import peak_flops
from srcfast.models.head import Head
from srcfast.run.progress import peak_rss_bytes
from srcfast.stages.dpo import PairMeta, pair_denominator, preference_loss
from srcfast.stages.pair_trees import preference_trees
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training import loop as training
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train
from srcfast.training.meter import StepMeter
from srcfast.training.step import StepNumbers
from srcfast_kernels.transfers import Fetched

SETTINGS = TrainingConfig(
    micro_batch_size=8,
    token_budget=4096,
    learning_rate=0.003,
    weight_decay=0.1,
    max_grad_norm=0.5,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
).seeded(3)


def trained_weights(settings: TrainingConfig, dtype: torch.dtype) -> tuple[torch.Tensor, list[dict]]:
    model = SmallModel(dtype=dtype, lora=LoRAConfig(r=3, alpha=12.0))
    history = train(model, response_items(24), objective=Objective(rationale_loss, response_tokens), settings=settings)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), history


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_three_steps_are_the_same_however_a_global_batch_is_split(dtype: torch.dtype, tolerance: float) -> None:
    whole, history = trained_weights(SETTINGS, dtype)
    assert [row["forests"] for row in history] == [1, 1, 1]
    for change in (
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
        {"token_budget": 45},
    ):
        split, split_history = trained_weights(SETTINGS.replace(**change), dtype)
        assert min(row["forests"] for row in split_history) > 1
        # Sums in another order; AdamW divides by the gradient's size, which enlarges their rounding.
        torch.testing.assert_close(split, whole, rtol=tolerance, atol=tolerance)
        for row, split_row in zip(history, split_history, strict=True):
            assert split_row["loss"] == pytest.approx(row["loss"], rel=tolerance)
            assert split_row["response_tokens"] == row["response_tokens"]


def test_the_loss_is_the_mean_over_the_batch_s_response_tokens_and_falls() -> None:
    items = response_items(8)
    model = SmallModel()
    forest = Forest.of([item.tree for item in items])
    with torch.no_grad():
        logps = (model(forest) @ model.decoder.head_weight.T).log_softmax(-1)
    losses = []
    for tree, item in enumerate(items):
        start, tokens = forest.segment_start[tree][1], item.tree.segments[1].tokens
        losses += [-float(logps[start - 1 + i, token]) for i, token in enumerate(tokens)]
    settings = SETTINGS.replace(epochs=12, warmup_ratio=0.0, learning_rate=1e-2)
    history = train(model, items, objective=Objective(rationale_loss, response_tokens), settings=settings)
    assert history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert history[0]["response_tokens"] == len(losses)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[0]["tokens"] + history[0]["wasted_tokens"] == SETTINGS.token_budget


def test_a_number_of_updates_ends_a_training_within_an_epoch_or_after_several() -> None:
    """The learning rate's schedule is that of the number of updates; an update's items are those of the epoch that it is in."""
    model, items = SmallModel(), response_items(9)
    per_epoch = math.ceil(len(items) / SETTINGS.global_batch_size)
    for updates in (1, per_epoch + 1):
        settings = SETTINGS.replace(updates=updates, epochs=7, warmup_ratio=0.0, min_learning_rate_ratio=0.0)
        history = train(model, items, objective=Objective(rationale_loss, response_tokens), settings=settings)
        shares = [step / max(1, updates - 1) for step in range(updates)]  # the last update has a rate of 0
        rates = [settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share)) for share in shares]
        assert [metrics["learning_rate"] for metrics in history] == pytest.approx(rates, abs=1e-12)


def test_the_order_is_a_function_of_seed_and_epoch_and_covers_every_item() -> None:
    settings = TrainingConfig(
        micro_batch_size=3, gradient_accumulation_steps=2, epochs=2, token_budget=8192, activation_checkpointing=0
    ).seeded(5)
    assert num_steps(13, settings) == 6
    batches = [global_batch(13, step, settings) for step in range(6)]
    assert [len(batch) for batch in batches] == [6, 6, 1, 6, 6, 1]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    assert batches == [global_batch(13, step, settings) for step in range(6)]
    assert first != sum((global_batch(13, step, settings.seeded(6)) for step in range(3)), [])


def test_each_distinct_image_is_asked_for_once_a_step() -> None:
    asked = []

    def features(keys: list[str]) -> dict[str, torch.Tensor]:
        asked.append(list(keys))
        return {key: image_embedding(key) for key in keys}

    settings = SETTINGS.replace(micro_batch_size=2, gradient_accumulation_steps=4)
    items = response_items(16, images=True)
    train(
        SmallModel(),
        items,
        objective=Objective(rationale_loss, response_tokens),
        settings=settings,
        features=features,
    )
    assert [sorted(keys) for keys in asked] == [["image-0", "image-1", "image-2"]] * 2


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update_and_is_named(where: str) -> None:
    def broken(hidden, forest, head_weight, items, denominator):
        loss, metrics = rationale_loss(hidden, forest, head_weight, items, denominator)
        if "sample-4" in [item.tree.key for item in items]:
            # sqrt has an infinite slope at 0: the loss stays finite, its gradient doesn't.
            loss = loss * math.nan if where == "loss" else loss + (hidden - hidden.detach()).abs().sum().sqrt()
        return loss, metrics

    model = SmallModel()
    before = [p.detach().clone() for p in model.parameters()]
    settings = SETTINGS.replace(micro_batch_size=1, gradient_accumulation_steps=8)
    with pytest.raises(SrcfastError, match=f"step 0: the {where} is not finite.*sample-4"):
        train(model, response_items(8), objective=Objective(broken, response_tokens), settings=settings)
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_only_what_requires_gradients_is_trained() -> None:
    model = SmallModel()
    head = model.decoder.head_weight.detach().clone()
    query = model.decoder.layers[0].self_attn.q_proj.weight.detach().clone()
    train(model, response_items(8), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    assert torch.equal(model.decoder.head_weight, head)
    assert not torch.equal(model.decoder.layers[0].self_attn.q_proj.weight, query)


def test_nothing_to_train_on_and_items_that_do_not_fit_are_refused_first() -> None:
    model, stepped = SmallModel(), []
    with pytest.raises(SrcfastError, match="nothing to train on"):
        train(model, [], objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    large = TrainingItem(Tree((Segment(np.zeros(99)), Segment(np.zeros(2), 0)), key="the-large-one"))
    with pytest.raises(InputError, match="the-large-one.*found 101"):
        train(
            model,
            [*response_items(40), large],
            objective=Objective(rationale_loss, response_tokens),
            settings=SETTINGS.replace(token_budget=100),
            on_step=stepped.append,
        )
    assert not stepped


def test_an_item_without_a_token_to_predict_is_refused_by_name_before_anything_is_trained() -> None:
    bare = TrainingItem(Tree((Segment(np.arange(4, 9)),), key="all-prompt"))
    for items in ([bare], [*response_items(20), bare]):
        model, stepped = SmallModel(), []
        with pytest.raises(InputError, match="'all-prompt'.*at least one token to predict.*found none.*Fix"):
            train(
                model,
                items,
                objective=Objective(rationale_loss, response_tokens),
                settings=SETTINGS,
                on_step=stepped.append,
            )
        assert not stepped


# What a GPU's queue asks for: nothing read between backward and update -----------------------------------------


class NoReading(TorchDispatchMode):
    """Refuses, from the second step on, what would wait for a GPU: numbers read, and shapes that depend on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.armed = self.reading = False
        self.looked_at = 0
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self._guarded(getattr(torch.Tensor, name)))
        read = training.StepNumbers.read

        def late(numbers: training.StepNumbers) -> dict:
            self.reading = True  # of a step before, whose numbers are on the host
            try:
                return read(numbers)
            finally:
                self.reading = False

        monkeypatch.setattr(training.StepNumbers, "read", late)

    def _guarded(self, method: Any) -> Any:
        def guarded(tensor: torch.Tensor, *args: Any) -> Any:
            # Whole numbers are the host's own, index maps and lengths.
            assert not self.armed or self.reading or not tensor.is_floating_point(), f"{method} waits for the device"
            return method(tensor, *args)

        return guarded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.looked_at += 1
        masks = (
            [x for x in args[1] if x is not None and x.dtype == torch.bool]
            if str(func).startswith(("aten.index.", "aten.index_put"))
            else []
        )
        if self.armed and (masks or any(name in str(func) for name in self.REFUSED)):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs or {})


def preference_items(model: SmallModel, count: int) -> list[TrainingItem]:
    pairs = random_preferences(count)
    return [
        TrainingItem(tree, PairMeta(pair.confidence, pair.confidence, -20.0, -22.0))
        for tree, pair in zip(preference_trees(model, pairs), pairs, strict=True)
    ]


@pytest.mark.parametrize("kind", ["rationale", "preference", "both"])
def test_nothing_is_read_from_the_device_from_the_second_step_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "reads_late", lambda device: True)
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
    items = {
        "rationale": response_items(24),
        "preference": preference_items(model, 24),
        "both": preference_items(model, 16) + response_items(8),
    }[kind]
    loss = preference_loss(DPOConfig(sft_weight=0.3, rehearsal_weight=0.5, label_smoothing="confidence"))
    guard = NoReading(monkeypatch)
    calls = []

    def denominator(batch: list[TrainingItem]) -> Any:  # the step begins
        guard.armed = len(calls) > 0
        calls.append(len(batch))
        return response_tokens(batch) if kind == "rationale" else pair_denominator(batch)

    with guard:
        history = train(
            model,
            items,
            objective=Objective(rationale_loss if kind == "rationale" else loss, denominator),
            settings=SETTINGS.replace(micro_batch_size=4, gradient_accumulation_steps=2),
            on_step=lambda metrics: None,
        )
    assert calls == [8, 8, 8] and len(history) == 3 and guard.looked_at > 1000


def test_the_guard_sees_what_waits() -> None:
    with pytest.MonkeyPatch.context() as patched, NoReading(patched) as guard:
        guard.armed = True
        values = torch.ones(3)
        for wait in (
            lambda: float(values.sum()),
            lambda: values.tolist(),
            lambda: values[values > 0],
            lambda: values.cpu(),
            lambda: bool((values > 0).any()),
        ):
            with pytest.raises(AssertionError, match="waits for the device"):
                wait()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_numbers_that_are_read_late_are_the_same(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    weights, histories = [], []
    for late in (False, True):
        monkeypatch.setattr(training, "reads_late", lambda device, late=late: late)
        model, steps = SmallModel(lora=LoRAConfig(r=3, alpha=12.0, dropout=dropout)), []
        history = train(
            model,
            response_items(40),
            objective=Objective(rationale_loss, response_tokens),
            settings=SETTINGS,
            on_step=lambda metrics, steps=steps: steps.append(metrics["step"]),
            before_update=lambda metrics, steps=steps: steps.append(metrics["step"]),
        )
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
        histories.append(history)
        seen.append(steps)
    assert seen[0] == seen[1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    torch.testing.assert_close(
        weights[0], weights[1], rtol=1e-12, atol=1e-14
    )  # clipped by a quotient that rounds otherwise
    timed = {"tokens_per_second", "mfu", "peak_memory_bytes"}
    for now, later in zip(*histories, strict=True):
        assert now.keys() == later.keys()
        for name in now.keys() - timed:
            assert later[name] == pytest.approx(now[name], rel=1e-9)


@pytest.mark.parametrize("late", [False, True])
def test_no_weight_has_changed_when_the_first_step_is_checked(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong from the start, such as references of another model, must not be trained on."""
    monkeypatch.setattr(training, "reads_late", lambda device: late)
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]

    def refuse(metrics: dict) -> None:
        raise SrcfastError(f"step {metrics['step']} is refused")

    with pytest.raises(SrcfastError, match="step 0 is refused"):
        train(
            model,
            response_items(40),
            objective=Objective(rationale_loss, response_tokens),
            settings=SETTINGS,
            before_update=refuse,
        )
    assert all(torch.equal(now, then) for now, then in zip(weights, start, strict=True))


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_what_is_not_finite_stops_a_late_reader_with_the_weights_of_the_step_before(
    where: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "reads_late", lambda device: True)
    items = response_items(40)
    bad = items[global_batch(40, step, SETTINGS)[3]].tree.key
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
    kept = []  # the weights that each step starts with

    def broken(hidden, forest, head_weight, inside, denominator):
        kept.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
        loss, metrics = rationale_loss(hidden, forest, head_weight, inside, denominator)
        if bad in [item.tree.key for item in inside]:
            loss = loss * math.nan if where == "loss" else loss + (hidden - hidden.detach()).abs().sum().sqrt()
        return loss, metrics

    done: list[int] = []
    with pytest.raises(SrcfastError, match=f"step {step}: the {where} is not finite.*{bad}"):
        train(
            model,
            items,
            objective=Objective(broken, response_tokens),
            settings=SETTINGS,
            on_step=lambda metrics: done.append(metrics["step"]),
        )
    now = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert torch.equal(now, kept[step])
    assert step == 0 or not torch.equal(kept[step], kept[step - 1])
    assert done == list(range(step))


def test_a_step_says_how_fast_it_was_and_what_it_took() -> None:
    model = SmallModel(dtype=torch.float32, lora=LoRAConfig(r=3, alpha=12.0))
    items = response_items(8)
    history = train(model, items, objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    forest = Forest.of([item.tree for item in items])
    config = model.decoder.config
    # Counted by hand: 2 layers, a query sees its own path up to itself.
    linear = 2 * 24 * (2 * 24 + 2 * 12 + 3 * 37)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    attended = sum(n * (n + 1) // 2 for n in (tree.num_tokens for tree in forest.trees))
    scored = response_tokens(items)
    flops = forest.num_tokens * (4 * linear + 6 * adapters) + 12 * 24 * 2 * attended
    flops += 4 * 24 * config.vocab_size * scored
    seconds = history[0]["tokens"] / history[0]["tokens_per_second"]
    assert history[0]["mfu"] == pytest.approx(
        flops / seconds / peak_flops(torch.device("cpu"), torch.float32), rel=1e-9
    )
    assert history[0]["peak_memory_bytes"] == pytest.approx(peak_rss_bytes(), rel=0.2)


def test_a_decoder_of_unknown_shapes_has_no_mfu() -> None:
    class Bare(torch.nn.Module):
        head_weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        head = Head(head_weight)

    model = torch.nn.Module()
    model.decoder = Bare()
    model.embedding = torch.nn.Embedding(40, 6)
    model.forward = lambda forest: model.embedding(forest.token_ids)
    history = train(model, response_items(8), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    assert history[0]["mfu"] is None and history[0]["tokens_per_second"] > 0


def test_of_several_forests_metrics_add_up_and_the_largest_counts_of_those_named_max() -> None:
    def watched(hidden, forest, head, items, denominator):
        loss, _ = rationale_loss(hidden, forest, head, items, denominator)
        sizes = torch.tensor([float(item.tree.num_tokens) for item in items], dtype=torch.float64)
        return loss, {"sum_tokens": sizes.sum(), "max_tokens": sizes.max()}

    items = response_items(8)
    settings = SETTINGS.replace(micro_batch_size=3, gradient_accumulation_steps=2)
    history = train(SmallModel(), items, objective=Objective(watched, response_tokens), settings=settings)
    sizes = [item.tree.num_tokens for item in items]
    for step, row in enumerate(history):
        batch = [sizes[index] for index in global_batch(8, step, settings)]
        assert row["forests"] == -(-len(batch) // 3)
        assert (row["sum_tokens"], row["max_tokens"]) == (sum(batch), max(batch))
    assert history[0]["forests"] == 2


def test_the_denominator_is_that_of_the_whole_batch_on_a_rank_that_runs_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process that stands for rank 0 of 2: it runs half of each batch, and divides by all of it."""
    monkeypatch.setattr(training.distributed, "rank", lambda: 0)
    monkeypatch.setattr(training.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(training, "check_same_start", lambda weights, trees: None)
    given, run = [], []

    def denominator(batch: list[TrainingItem]) -> int:
        given.append([item.tree.key for item in batch])
        return response_tokens(batch)

    def loss(hidden, forest, head, items, total):
        run.append([item.tree.key for item in items])
        return rationale_loss(hidden, forest, head, items, total)

    items = response_items(8)
    monkeypatch.setattr("srcfast.training.step.StepNumbers.of", classmethod(one_rank(StepNumbers.of)))
    train(SmallModel(), items, objective=Objective(loss, denominator), settings=SETTINGS)
    expected = [items[index].tree.key for index in global_batch(8, 0, SETTINGS)]
    assert given == [expected]
    assert 0 < len(run[0]) < 8 and set(run[0]) < set(expected)


def one_rank(of: Any) -> Any:
    """`StepNumbers.of` of one process: without the other ranks' numbers."""

    def alone(cls: Any, *arguments: Any) -> StepNumbers:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.distributed, "world_size", lambda: 1)
            return of(*arguments)

    return alone


def test_flops_of_a_base_that_is_trained_are_six_a_weight_and_token() -> None:
    model = SmallModel()
    forest = Forest.of([item.tree for item in response_items(4)])
    meter = StepMeter(model, lambda forest: 17)
    shapes = model.decoder.config
    weights = sum(
        parameter.numel() for name, parameter in model.decoder.layers.named_parameters() if parameter.dim() == 2
    )
    norms = sum(
        parameter.numel() for name, parameter in model.decoder.layers.named_parameters() if parameter.dim() == 1
    )
    attended = sum(
        position + 1 for item in response_items(4) for position in range(item.tree.num_tokens)
    )  # of each token all before it and itself
    expected = 6 * forest.num_tokens * weights + 12 * 2 * 24 * attended + 4 * 24 * shapes.vocab_size * 17
    # The weights of norms count with the others, and a third of them is rounded down.
    assert meter._flops([forest]) == pytest.approx(expected, abs=6 * forest.num_tokens * (norms / 3 + 1))
    meter.rate, meter._last = 1e9, time.perf_counter() - 2.0
    measured = meter.measure({"tokens": 50}, [forest])
    assert measured["tokens_per_second"] == pytest.approx(25.0, rel=0.1)  # the clock's
    assert measured["mfu"] == pytest.approx(meter._flops([forest]) / 2e9, rel=0.1)


@pytest.mark.parametrize("step", [0, 3])
def test_a_step_that_is_run_again_gives_the_numbers_of_the_step_and_changes_no_weight(step: int) -> None:
    """With dropout, whose masks follow from the step's number; the weights are those before it."""
    settings = SETTINGS.replace(micro_batch_size=2, gradient_accumulation_steps=3, epochs=2)
    lora = LoRAConfig(r=3, alpha=12.0, dropout=0.4)
    model, items = SmallModel(lora=lora), response_items(12)
    before: list[torch.Tensor] = []

    def remember(metrics: dict) -> None:
        if metrics["step"] == step:
            before.extend(p.detach().clone() for p in model.parameters() if p.requires_grad)

    objective = Objective(rationale_loss, response_tokens)
    history = train(model, items, objective=objective, settings=settings, before_update=remember)
    again = SmallModel(lora=lora)
    weights = [p for p in again.parameters() if p.requires_grad]
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
    batch = [items[index] for index in global_batch(12, step, settings)]
    metrics = training.rerun_step(again, batch, step, objective=objective, settings=settings)
    for name in ("loss", "grad_norm", "max_logprob", "response_tokens"):
        assert metrics[name] == pytest.approx(history[step][name], rel=1e-10), name
    other = training.rerun_step(again, batch, step + 1, objective=objective, settings=settings)
    assert (other["loss"] != pytest.approx(metrics["loss"], rel=1e-6)) == (step > 0)  # at first B is 0
    assert all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))


def test_a_rank_s_dropout_follows_the_positions_in_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2 runs some items of each batch, under the keys that one rank alone would give them."""
    asked: list[tuple[int, int, list[int]]] = []
    keys = training.step_keys

    def recorded(seed: int, step: int, positions: Any) -> Any:
        asked.append((seed, step, list(positions)))
        return keys(seed, step, positions)

    monkeypatch.setattr(training, "step_keys", recorded)
    monkeypatch.setattr(training.distributed, "rank", lambda: 1)
    monkeypatch.setattr(training.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(training, "check_same_start", lambda weights, trees: None)
    monkeypatch.setattr("srcfast.training.step.StepNumbers.of", classmethod(one_rank(StepNumbers.of)))
    items = response_items(16)
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0, dropout=0.4))
    train(model, items, objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    sizes = [item.tree.num_tokens for item in items]
    for step, (seed, number, positions) in enumerate(asked):
        batch = global_batch(16, step, SETTINGS)
        shares: list[list[int]] = [[], []]
        for position in sorted(range(8), key=lambda position: (-sizes[batch[position]], position)):
            totals = [sum(sizes[batch[index]] for index in share) for share in shares]
            shares[totals.index(min(totals))].append(position)
        assert (seed, number, positions) == (3, step, sorted(shares[1]))
        assert positions != list(range(len(positions)))
    assert len(asked) == 2


def test_numbers_of_two_ranks_add_up_and_maxima_are_the_larger_ones() -> None:
    """Rank 0 has two forests, rank 1 one; a metric that a rank lacks counts for nothing, not for 0."""
    shared = [
        {"tokens": 30, "wasted_tokens": 2, "forests": 2, "names": ["margin", "max_drift"]},
        {"tokens": 12, "wasted_tokens": 5, "forests": 1, "names": ["max_drift", "rehearsal_loss", "max_logprob"]},
    ]
    names = ["margin", "max_drift", "rehearsal_loss", "max_logprob"]
    values = [0.25, 0.5, 3.0]  # rank 0's losses, the norm
    values += [0.75, 0.125, 0.5, 0.0, 0.0]  # rank 0's loss and metrics
    values += [0.5, 0.0, 0.25, 2.0, -1.5]
    forests = [Forest.of([item.tree]) for item in response_items(2)]
    numbers = StepNumbers(
        step=4,
        forests=forests,
        shared=shared,
        names=names,
        norm=torch.tensor(3.0),
        finite=torch.tensor(True),
        values=Fetched(torch.tensor(values, dtype=torch.float64), None),
        learning_rate=0.01,
    )
    assert numbers.read() == {
        "step": 4,
        "loss": 1.25,
        "grad_norm": 3.0,
        "tokens": 42,
        "wasted_tokens": 7,
        "forests": 3,
        "learning_rate": 0.01,
        "margin": 0.125,
        "max_drift": 0.5,
        "rehearsal_loss": 2.0,
        "max_logprob": -1.5,
    }
