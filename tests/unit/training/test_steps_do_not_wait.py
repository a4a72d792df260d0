"""No step waits for the device but for its numbers, one step late, and none copies from memory that can be paged.

On a simulated device, which counts both. Its numbers are the CPU's: in fp32 but for the order of sums, in 16 bits (where the
CPU's attention computes in fp32, and the device's rounds) to a hundredth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import simulated_cuda
import torch
from helpers.small_model import SmallModel, random_preferences

from srcfast.config.settings import DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.rationale_pairs import RationalePair, build_raps
from srcfast.data.records import Preference
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.lora import add_lora
from srcfast.stages.dpo import pair_denominator, preference_items, preference_loss, train_preference
from srcfast.stages.logprobs import reference_logprobs
from srcfast.stages.pair_trees import pair_logit_rows
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.training.items import Metrics, Objective
from srcfast.training.loop import train
from srcfast.world.samples import world_samples

pytestmark = pytest.mark.simulated
OnStep = Callable[[Metrics], None]


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    quantize: str | None = None
    checkpointing: int = 0
    dropout: float = 0.0
    vision_offload: bool = False
    workers: int = 0
    tower_layers: int | None = None  # with adapters, as the projector's; None: without


CASES = {
    "bf16": Case(torch.bfloat16),
    "bf16, recomputed, dropout, workers": Case(torch.bfloat16, checkpointing=2, dropout=0.2, workers=2),
    "bf16, NF4, vision on the host": Case(torch.bfloat16, quantize="nf4", vision_offload=True),
    "fp16, NF4, recomputed, dropout": Case(torch.float16, quantize="nf4", checkpointing=1, dropout=0.2),
    "fp16, vision on the host, a worker": Case(torch.float16, vision_offload=True, workers=1),
    "bf16, projector, vision on the host": Case(torch.bfloat16, vision_offload=True, tower_layers=0),
    "fp32, projector and tower, vision on the host, a worker": Case(torch.float32, None, 0, 0.0, True, 1, 2),
    "fp32": Case(torch.float32),
    "fp32, recomputed, dropout, vision on the host, a worker": Case(torch.float32, None, 2, 0.2, True, 1),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def raps(tmp_path_factory: pytest.TempPathFactory) -> list[RationalePair]:
    return build_raps(world_samples("train", 6, 3, image_dir=tmp_path_factory.mktemp("images")), "tagged")[0]


def pair_of(rap: RationalePair) -> Preference:
    sample, response = rap
    return Preference(
        sample_id=sample.id,
        images=sample.images,
        prompt=sample.question,
        chosen=response,
        rejected=response.replace("<answer>", "<answer> no"),
        confidence=0.5,
        reference_chosen_logprob=None,
        reference_rejected_logprob=None,
        extra={},
        image_root=sample.image_root,
    )


def model_and_features(case: Case, device: str, raps: list[RationalePair]) -> tuple[Any, ImageFeatures]:
    lora = LoRAConfig(r=4, alpha=8.0, dropout=case.dropout)
    if case.tower_layers is not None:
        lora = lora.replace(projector=True, tower_layers=case.tower_layers)
    model = load_lvlm("embedded", quantize=case.quantize, dtype=case.dtype, device=device)
    if case.vision_offload:
        model.vision.to_host()
    add_lora(model, lora)
    return model, ImageFeatures(model, image_loader([sample for sample, _ in raps]), batch_size=2)


def settings_of(case: Case) -> TrainingConfig:
    """Three steps of two forests or more."""
    return TrainingConfig(
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        token_budget=700,
        learning_rate=0.001,
        loader_workers=case.workers,
        activation_checkpointing=case.checkpointing,
    )


def train_dpo(
    case: Case, model: Any, features: ImageFeatures, raps: list[RationalePair], on_step: OnStep
) -> list[Metrics]:
    """A reference pass, then DPO on the pairs and some rehearsed rationale-answer pairs."""
    pairs = [pair_of(rap) for rap in raps]
    known = reference_logprobs(model, pairs, reference_hash="own", token_budget=400, features=features)
    return train_preference(
        model,
        known,
        DPOConfig(**settings_of(case).model_dump(), sft_weight=0.2, rehearsal_weight=0.5),
        expected_reference_hash="own",
        features=features,
        on_step=on_step,
        rehearsal=raps[:4],
    )


def train_rationale(
    case: Case, model: Any, features: ImageFeatures, raps: list[RationalePair], on_step: OnStep
) -> list[Metrics]:
    return fine_tune_rationale(model, raps, settings_of(case), features=features, on_step=on_step)


@pytest.mark.parametrize("training", [train_dpo, train_rationale])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_training_waits_for_one_event_a_step(
    training: Callable[..., list[Metrics]], case: Case, raps: list[RationalePair]
) -> None:
    events: list[int] = []
    on_gpu, on_cpu = (model_and_features(case, device, raps) for device in ("cuda", "cpu"))
    with simulated_cuda.recording() as record:
        found = training(case, *on_gpu, raps, lambda row: events.append(sum(record.event_waits.values())))
    expected = training(case, *on_cpu, raps, lambda row: None)
    assert not record.waits and not record.pageable_copies, record.text()
    assert len(found) >= 2 and [after - before for before, after in pairwise(events)] == [1] * (len(found) - 1)
    losses, tolerance = [row["loss"] for row in expected], TOLERANCE[case.dtype]
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=tolerance)


@pytest.mark.triton
def test_nor_is_a_step_of_triton_s_kernels_waited_for() -> None:
    """Of which the interpreter takes long: a small model, two pairs."""
    losses = []
    for device in ("cuda", "cpu"):
        lora = LoRAConfig(r=3, alpha=12.0, dropout=0.2)
        model = SmallModel(dtype=torch.bfloat16, lora=lora, head_dim=8).to(device)
        items = preference_items(model, random_preferences(2))
        with simulated_cuda.recording() as record:
            history = train(
                model,
                items,
                objective=Objective(preference_loss(DPOConfig(sft_weight=0.0)), pair_denominator, pair_logit_rows),
                settings=TrainingConfig(
                    micro_batch_size=2, activation_checkpointing=1, gradient_accumulation_steps=1, token_budget=8192
                ),
            )
        losses.append([row["loss"] for row in history])
        assert not record.waits and not record.pageable_copies, record.text()
        if device == "cuda":
            launched = {
                "gather_rows_kernel",
                "gather_rows_backward_kernel",
                "dropout_kernel",
                "rms_norm_kernel",
                "token_dpo_kernel",
            }
            assert launched <= set(record.launches), record.text()
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE[torch.bfloat16])
