"""`deterministic`: which algorithms a GPU then takes, whether images are encoded anew, and that a CPU's numbers stay the same."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import simulated_cuda
import torch
from helpers.small_model import SmallModel, response_items
from torch import Tensor

from srcfast.config.load import load_config
from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.rationale_pairs import build_raps
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.lora import lora_parameters
from srcfast.stages.policy import load_model
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import fine_tune_rationale, rationale_loss, response_tokens
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.determinism import deterministic_algorithms
from srcfast.training.items import Objective
from srcfast.training.loop import train
from srcfast.world.samples import world_samples

SETTINGS = TrainingConfig(
    epochs=2,
    micro_batch_size=2,
    token_budget=2048,
    learning_rate=0.001,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
)


def trained(settings: TrainingConfig, **more: Any) -> Tensor:
    model = SmallModel(lora=LoRAConfig(r=2, alpha=32.0))
    train(model, response_items(7), objective=Objective(rationale_loss, response_tokens), settings=settings, **more)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def test_within_it_is_on_and_after_it_is_as_before() -> None:
    states = []
    for wanted in (False, True):
        with deterministic_algorithms(wanted):
            filling = torch.utils.deterministic.fill_uninitialized_memory
            states.append((torch.are_deterministic_algorithms_enabled(), filling))
    assert states == [(False, True), (True, False)]
    with pytest.raises(ValueError), deterministic_algorithms(True):
        raise ValueError
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def test_on_a_cpu_it_changes_no_bit_and_a_training_goes_on_with_it(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 1:
            raise Killed

    whole = trained(SETTINGS)
    assert torch.equal(whole, trained(SETTINGS.seeded(0, deterministic=True)))
    with pytest.raises(Killed):
        trained(SETTINGS, on_step=kill, checkpoints=TrainingCheckpoints(tmp_path, {}, steps=1))
    checkpoints = TrainingCheckpoints(tmp_path, {}, steps=1)
    assert torch.equal(whole, trained(SETTINGS.seeded(0, deterministic=True), checkpoints=checkpoints))


def test_the_setting_reaches_every_training_and_the_libraries_before_their_first_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(None, ["deterministic=true"])
    for section in (config.rationale, config.dpo, config.scorer_training):
        assert section.seeded(0, config.deterministic).deterministic
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # which monkeypatch restores, whatever is set below
    load_model(config, None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    load_model(load_config(None), None)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    load_model(config, None)
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


@pytest.mark.simulated
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_takes_deterministic_algorithms_alone_and_encodes_images_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    samples = world_samples("train", 6, 3, image_dir=tmp_path / "images")
    pairs, _ = build_raps(samples, "tagged")
    model = load_lvlm("embedded", dtype=torch.bfloat16, device="cuda", lora=LoRAConfig(r=2, alpha=32.0))
    features = ImageFeatures(model, image_loader(samples))
    settings = SETTINGS.seeded(0, deterministic)
    seen: list[Any] = []
    with simulated_cuda.stand_in_flash_attn():
        import flash_attn

        attend = flash_attn.flash_attn_varlen_func

        @functools.wraps(attend)
        def spy(*args: Any, **options: Any) -> Tensor:
            seen.append((options["deterministic"], torch.are_deterministic_algorithms_enabled()))
            return attend(*args, **options)

        monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", spy)
        monkeypatch.setattr("srcfast.attention.forest_attention._forced", "flash_attn")
        history = fine_tune_rationale(model, pairs, settings, features=features)
    assert set(seen) == {(deterministic, deterministic)} and len(history) == 6
    assert not torch.are_deterministic_algorithms_enabled()
    distinct = len({image for sample in samples for image in sample.images})
    assert distinct < len(history) <= features.encoded if deterministic else features.encoded == distinct
    assert all(parameter.isfinite().all() for parameter in lora_parameters(model))
