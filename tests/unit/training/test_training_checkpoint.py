"""A training that is stopped anywhere goes on bit for bit; a damaged or foreign checkpoint is never continued from."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_model import SmallModel, response_items

from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.batching import num_steps
from srcfast.data.forest import Segment, Tree
from srcfast.data.jsonl import file_hash
from srcfast.errors import ConfigError, Interrupted, SrcfastError
from srcfast.run import signals
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training.checkpoint import (
    BEFORE,
    SavedTraining,
    TrainingCheckpoints,
    identity_of,
    load_training,
    save_training,
)
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train
from srcfast.training.optimizer import AdamW

# 5 items in batches of 4: an epoch's last batch is smaller, and each batch of 4 is run as two forests.
SETTINGS = TrainingConfig(
    epochs=2,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    token_budget=4096,
    learning_rate=0.01,
    activation_checkpointing=0,
).seeded(3)
NEUTRAL = ("loader_workers", "activation_checkpointing", "deterministic")
STEPS = num_steps(5, SETTINGS)
MEASURED = ("tokens_per_second", "mfu", "peak_memory_bytes")  # of the clock and the machine
OnStep = Callable[[dict[str, Any]], None]


def trained(
    directory: Path | None,
    settings: TrainingConfig = SETTINGS,
    on_step: OnStep | None = None,
    items: list[TrainingItem] | None = None,
    seed: int = 0,
    beta: float = 0.1,
    **keep: Any,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Weights and metrics of a training in this directory, by a process that knows nothing but the directory."""
    model = SmallModel(dtype=torch.float32, lora=LoRAConfig(r=3, alpha=12.0, dropout=0.2).seeded(seed))
    checkpoints = None
    if directory is not None:
        checkpoints = TrainingCheckpoints(directory, {"beta": beta}, **({"minutes": 0} | keep))
    history = train(
        model,
        items or response_items(5),
        objective=Objective(rationale_loss, response_tokens),
        settings=settings,
        on_step=on_step,
        checkpoints=checkpoints,
    )
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, [{name: row[name] for name in row if name not in MEASURED} for row in history]


def signal_at(step: int, steps_seen: list[int] | None = None) -> OnStep:
    def on_step(metrics: dict[str, Any]) -> None:
        if steps_seen is not None:
            steps_seen.append(metrics["step"])
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return on_step


def stop_after(step: int, directory: Path, settings: TrainingConfig = SETTINGS, **keep: Any) -> list[int]:
    seen: list[int] = []
    with signals.listening(), pytest.raises(Interrupted, match=rf"SIGTERM after step {step + 1} of {STEPS}") as error:
        trained(directory, settings, signal_at(step, seen), **keep)
    assert error.value.status == 143
    return seen


def crash_at(step: int, directory: Path, **keep: Any) -> None:
    def on_step(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            raise KeyError("killed")

    with pytest.raises(KeyError, match="killed"):
        trained(directory, SETTINGS, on_step, **keep)


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_at_any_step_a_training_goes_on_bit_for_bit(tmp_path: Path, workers: int) -> None:
    settings = SETTINGS.replace(loader_workers=workers)
    weights, history = trained(None, settings)
    for step in range(STEPS):
        directory = tmp_path / str(step)
        seen = stop_after(step, directory, settings)
        again: list[int] = []
        resumed, resumed_history = trained(directory, settings, signal_at(STEPS, again))
        assert torch.equal(resumed, weights)
        assert resumed_history == history
        assert seen + again == list(range(STEPS))


def test_stopped_after_every_step_in_turn_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    weights, history = trained(None)
    for step in range(STEPS):
        assert stop_after(step, tmp_path) == [step]
    resumed, resumed_history = trained(tmp_path)
    assert torch.equal(resumed, weights)
    assert resumed_history == history


def test_8_bit_moments_go_on_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for name in ("adamw_8bit", "paged_adamw"):
        settings = SETTINGS.replace(optimizer=name)
        weights, _ = trained(None, settings)
        stop_after(1, tmp_path / name, settings)
        assert torch.equal(trained(tmp_path / name, settings)[0], weights)


def test_a_crash_costs_the_steps_since_the_last_save(tmp_path: Path) -> None:
    weights, history = trained(None)
    crash_at(2, tmp_path, steps=2)
    again: list[int] = []
    known: list[list[int]] = []
    resumed, resumed_history = trained(
        tmp_path,
        on_step=lambda metrics: again.append(metrics["step"]),
        steps=2,
        on_continue=lambda rows, seconds: known.append([row["step"] for row in rows]),
    )
    assert (known, again) == ([[0, 1]], list(range(2, STEPS)))
    assert torch.equal(resumed, weights)
    assert resumed_history == history


def test_the_last_two_are_kept_and_nothing_half_written(tmp_path: Path) -> None:
    trained(tmp_path, steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (STEPS - 1, STEPS)]


@pytest.mark.parametrize(("steps", "expected"), [(0, [4]), (3, [3, 4]), (5, [4])])
def test_the_last_step_is_saved_whether_or_not_a_save_is_due(tmp_path: Path, steps: int, expected: list[int]) -> None:
    weights, history = trained(tmp_path, minutes=0, steps=steps)  # two epochs of two steps
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in expected]
    again: list[int] = []
    resumed, resumed_history = trained(tmp_path, minutes=0, on_step=lambda metrics: again.append(metrics["step"]))
    assert again == [] and torch.equal(resumed, weights) and resumed_history == history


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None], file: str) -> None:
    weights, history = trained(None)
    crash_at(2, tmp_path, steps=1)  # steps 1 and 2 are saved
    damage(tmp_path / "step-00000002" / file)
    with pytest.warns(RuntimeWarning, match="step-00000002: a damaged checkpoint .* the one before is used"):
        resumed, resumed_history = trained(tmp_path, steps=1)
    assert torch.equal(resumed, weights)
    assert resumed_history == history


def test_where_both_are_damaged_training_begins_anew(tmp_path: Path) -> None:
    weights, _ = trained(None)
    crash_at(2, tmp_path, steps=1)
    for name in ("step-00000001", "step-00000002"):
        flip_a_bit(tmp_path / name / "optimizer.safetensors")
    with pytest.warns(RuntimeWarning, match="step-00000001: a damaged checkpoint .* this training begins anew"):
        assert torch.equal(trained(tmp_path, steps=1)[0], weights)


def test_a_checkpoint_of_another_training_is_refused_by_name(tmp_path: Path) -> None:
    stop_after(1, tmp_path)
    with pytest.raises(ConfigError, match=r"with stage.beta = 0.1, this run has 0.2.*Fix: set stage.beta back"):
        trained(tmp_path, beta=0.2)
    with pytest.raises(ConfigError, match="with loop.learning_rate = 0.01, this run has 0.02"):
        trained(tmp_path, SETTINGS.replace(learning_rate=0.02))
    with pytest.raises(ConfigError, match="with items = "):
        trained(tmp_path, items=response_items(6)[1:])
    with pytest.raises(ConfigError, match="with starting weights = "):
        trained(tmp_path, seed=1)


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SrcfastError, match=r"file/checkpoint.*expected space and permission.*Fix"):
        trained(tmp_path / "file" / "checkpoint", steps=1)


# Whose training it is ----------------------------------------------------------------------------------------------


def made(name: str, *columns: tuple[str, Any]) -> Any:
    """An instance of a dataclass of this name with these (field, value)."""
    return make_dataclass(name, [field for field, _ in columns], frozen=True)(*(value for _, value in columns))


def items_hash(meta: Any) -> str:
    item = replace(response_items(1)[0], meta=meta)
    return identity_of({}, {}, [item], torch.zeros(3))["items"]


def test_items_are_named_by_their_fields_and_not_by_the_names_of_their_classes() -> None:
    weight, confidence = ("weight", 0.5), ("confidence", 0.25)
    first = items_hash(made("PairMeta", weight, confidence))
    assert items_hash(made("Renamed", weight, confidence)) == first
    assert items_hash(made("PairMeta", weight, ("confidence", 0.5))) != first
    assert items_hash(made("PairMeta", weight, ("certainty", 0.25))) != first


def test_every_number_of_a_long_array_counts() -> None:
    # An array's own text leaves out its middle.
    values = np.zeros(5000)
    changed = values.copy()
    changed[2500] = 1.0
    assert repr(values) == repr(changed)
    assert items_hash((values,)) != items_hash((changed,))
    assert items_hash(torch.from_numpy(values)) != items_hash(torch.from_numpy(changed))
    assert items_hash(torch.zeros(4)) != items_hash(torch.zeros(2, 2))


def test_what_cannot_be_named_is_refused() -> None:
    with pytest.raises(TypeError, match="expected numbers, text, tensors or dataclasses"):
        items_hash(object())


def test_a_checkpoint_of_the_first_release_goes_on(tmp_path: Path) -> None:
    stop_after(1, tmp_path)
    for file in tmp_path.glob("step-*/state.json"):
        state = json.loads(file.read_text())
        state["identity"]["items"] = identity_of({}, {}, response_items(5), torch.zeros(3))[BEFORE]
        file.write_text(json.dumps(state))
        (file.parent / "COMPLETE").write_text(json.dumps({"state.json": file_hash(file)}))
    steps: list[int] = []
    trained(tmp_path, on_step=lambda metrics: steps.append(metrics["step"]))
    assert steps == [2, 3]


def whole_identity(**changes: Any) -> dict[str, Any]:
    """The identity of a small training, a part of it changed."""
    parts: dict[str, Any] = {
        "prompt": [5, 6, 7],
        "first": [8, 9],
        "second": [10],
        "parent": 0,
        "images": (),
        "key": "sample",
        "meta": {"weight": 0.5, "reference": -3.25},
        "settings": {"beta": 0.1},
        "loop": SETTINGS.loop(),
        "weights": torch.arange(6.0),
    } | changes
    segments = (
        Segment(np.array(parts["prompt"])),
        Segment(np.array(parts["first"]), 0),
        Segment(np.array(parts["second"]), parts["parent"]),
    )
    item = TrainingItem(Tree(segments, parts["images"], parts["key"]), parts["meta"])
    return identity_of(parts["settings"], parts["loop"], [item], parts["weights"])


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [5, 6, 4]},
        {"prompt": [5, 6], "first": [7, 8, 9]},  # the same tokens, cut elsewhere
        {"parent": 1},  # the same segments in another tree
        {"second": [11]},
        {"images": ("a.png",)},
        {"key": "other"},
        {"meta": {"weight": 0.25, "reference": -3.25}},
        {"meta": {"weight": 0.5, "reference": -3.5}},
        {"meta": None},
        {"settings": {"beta": 0.2}},
        {"loop": SETTINGS.replace(learning_rate=0.02).loop()},
        {"loop": SETTINGS.seeded(4).loop()},
        {"weights": torch.arange(6.0) * 1.000001},
    ],
    ids=str,
)
def test_whatever_the_numbers_depend_on_is_part_of_what_names_a_training(change: dict[str, Any]) -> None:
    names = ("stage", "loop", "items", "starting weights")
    before, after = whole_identity(), whole_identity(**change)
    assert before == whole_identity()
    assert [name for name in names if before[name] != after[name]] == [
        {"settings": "stage", "loop": "loop", "weights": "starting weights"}.get(next(iter(change)), "items")
    ]


@pytest.mark.parametrize("name", [name for name in SETTINGS.loop() if name not in NEUTRAL])
def test_each_setting_that_changes_numbers_refuses_the_checkpoint_of_another(name: str, tmp_path: Path) -> None:
    identity = {key: value for key, value in whole_identity().items() if key != BEFORE}
    save_training(tmp_path, SavedTraining(1, torch.zeros(2), {}, [{}], identity, 0.0))
    loop = {"loop": identity["loop"] | {name: 0.123}}
    with pytest.raises(ConfigError, match=f"loop.{name} = "):
        load_training(tmp_path, identity | loop)


@pytest.mark.parametrize("name", NEUTRAL)
def test_each_setting_that_changes_no_number_may_change(name: str, tmp_path: Path) -> None:
    identity = {key: value for key, value in whole_identity().items() if key != BEFORE}
    save_training(tmp_path, SavedTraining(1, torch.zeros(2), {}, [{}], identity, 0.0))
    loaded = load_training(tmp_path, identity | {"loop": identity["loop"] | {name: 0.123}})
    assert loaded is not None and loaded.step == 1


@pytest.mark.parametrize(
    ("minutes", "steps", "passed", "step", "saves"),
    [
        (10.0, 0, 599.0, 7, False),
        (10.0, 0, 600.0, 7, True),
        (0.5, 0, 29.0, 7, False),
        (0.5, 0, 31.0, 7, True),
        (0, 0, 1e9, 7, False),  # 0: never by time
        (0, 3, 0.0, 3, True),
        (0, 3, 0.0, 4, False),
        (0, 3, 0.0, 6, True),
        (10.0, 3, 1.0, 4, False),
        (10.0, 3, 601.0, 4, True),
    ],
)
def test_a_checkpoint_is_due_by_minutes_or_by_steps(
    minutes: float, steps: int, passed: float, step: int, saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("srcfast.training.checkpoint.time.monotonic", lambda: clock[0])
    checkpoints = TrainingCheckpoints(tmp_path, {}, minutes, steps)
    checkpoints._last = clock[0]
    clock[0] += passed
    assert checkpoints.due(step) == (0, saves)


def test_minutes_count_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a minute each, a save each three minutes, and one that a signal asked for after the fourth step."""
    clock = [1000.0]
    monkeypatch.setattr("srcfast.training.checkpoint.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("srcfast.training.checkpoint.save_training", lambda directory, training: None)
    checkpoints = TrainingCheckpoints(tmp_path, {}, minutes=3.0)
    checkpoints._last = clock[0]
    optimizer = AdamW(SmallModel(lora=LoRAConfig(r=3, alpha=12.0)).decoder.layers[0].self_attn.q_proj.parameters())
    saved = []
    for step in range(1, 12):
        clock[0] += 60.0
        _, save = checkpoints.due(step)
        if save or step == 4:
            checkpoints.save(step, optimizer, [])
            saved.append(step)
    assert saved == [3, 4, 7, 10]


def test_seconds_add_up_over_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 seconds, a pause of hours, 25 seconds more: 65 in the last checkpoint."""
    clock = [1000.0]
    monkeypatch.setattr("srcfast.training.checkpoint.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("srcfast.training.checkpoint.weights_hash", lambda *weights: "as it began")
    known: list[tuple[int, float]] = []
    optimizer = AdamW(SmallModel(lora=LoRAConfig(r=3, alpha=12.0)).decoder.layers[0].self_attn.q_proj.parameters())
    for seconds, step in ((40.0, 1), (25.0, 2), (5.0, 3)):
        clock[0] += 10_000.0
        checkpoints = TrainingCheckpoints(
            tmp_path, {}, on_continue=lambda history, spent: known.append((len(history), spent))
        )
        checkpoints._began = clock[0]
        begun, history = checkpoints.begin(optimizer, SETTINGS.loop(), response_items(1))
        assert begun == step - 1
        clock[0] += seconds
        checkpoints.save(step, optimizer, [*history, {"step": step - 1}])
    assert [json.loads((tmp_path / f"step-0000000{k}" / "state.json").read_text())["seconds"] for k in (2, 3)] == [
        65,
        70,
    ]
    assert known == [(1, 40.0), (2, 65.0)]
