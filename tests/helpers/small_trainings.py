"""A few steps of DPO or rationale fine-tuning of a small LVLM on a device, and how far two of them may be apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcfast.config.settings import DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import Preference, Sample
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.lora import lora_parameters
from srcfast.stages.dpo import train_preference
from srcfast.stages.logprobs import reference_logprobs
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.training.checkpoint import TrainingCheckpoints

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BETA = 0.1
# Of five samples: three steps, the last of one sample.
LOOP = TrainingConfig(
    micro_batch_size=2,
    token_budget=2048,
    learning_rate=0.001,
    warmup_ratio=0.0,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
).seeded(2)


@dataclass(frozen=True)
class Case:
    """One combination of settings; what `numbers` leaves out changes no number."""

    stage: str
    dtype: str
    quantize: str | None = None
    checkpointing: int = 0
    dropout: float = 0.0
    vision_offload: bool = False
    workers: int = 0
    optimizer: Any = "adamw"
    tower_layers: int | None = None  # with adapters, as the projector's; None: without

    def numbers(self) -> Case:
        return replace(self, checkpointing=0, vision_offload=False, workers=0)

    def __str__(self) -> str:
        parts = [self.stage, self.dtype, self.quantize or "whole", self.optimizer]
        parts += [f"every{self.checkpointing}"] * bool(self.checkpointing) + ["dropout"] * bool(self.dropout)
        parts += [] if self.tower_layers is None else [f"projector tower{self.tower_layers}"]
        return " ".join(parts + ["offload"] * self.vision_offload + ["worker"] * self.workers)


@dataclass(frozen=True)
class Trained:
    """What a training gave, on the host.

    Attributes:
        history: the metrics of each step.
        references: of each pair, its two reference log-probabilities.
        update: of the adapter, flat, fp32.
    """

    history: list[dict[str, Any]]
    references: list[float]
    update: Tensor


def pairs_of(samples: Sequence[Sample]) -> list[Preference]:
    """Each sample's true response against the next one's."""
    raps, _ = build_raps(samples)
    responses = [response for _, response in raps]
    return [
        Preference(
            sample_id=sample.id,
            images=sample.images,
            prompt=sample.question,
            chosen=chosen,
            rejected=rejected,
            confidence=0.2 + 0.1 * number,
            reference_chosen_logprob=None,
            reference_rejected_logprob=None,
            extra={},
            image_root=sample.image_root,
        )
        for number, ((sample, chosen), rejected) in enumerate(zip(raps, responses[1:] + responses[:1], strict=True))
    ]


def flat_adapter(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten().float().cpu() for parameter in lora_parameters(model)])


def train_on(
    device: str,
    samples: Sequence[Sample],
    case: Case,
    path: str | Path = "embedded",
    checkpoints: TrainingCheckpoints | None = None,
    on_step: Any = None,
) -> Trained:
    """Load, train, and let go of the model.

    4-bit weights are quantised on the CPU: bitsandbytes, which ours equal bit for bit, rounds their scales to a grid there and
    on a GPU not, so that a few scales differ by a step.
    """
    lora = LoRAConfig(r=4, alpha=8.0, dropout=case.dropout)
    if case.tower_layers is not None:
        lora = lora.replace(projector=True, tower_layers=case.tower_layers)
    model = load_lvlm(
        path, quantize=case.quantize, dtype=DTYPES[case.dtype], device="cpu" if case.quantize else device, lora=lora
    ).to(device)
    if case.vision_offload:
        model.vision.to_host()
    features = ImageFeatures(model, image_loader(samples))
    loop = LOOP.replace(
        activation_checkpointing=case.checkpointing, loader_workers=case.workers, optimizer=case.optimizer
    )
    start, references = flat_adapter(model), list[float]()
    if case.stage == "rationale":
        pairs, _ = build_raps(samples)
        history = fine_tune_rationale(model, pairs, loop, features=features, checkpoints=checkpoints, on_step=on_step)
    else:
        known = {"reference_hash": "start", "token_budget": loop.token_budget, "features": features}
        preferences = reference_logprobs(model, pairs_of(samples), **known)
        for one in preferences:
            references += [one.reference_chosen_logprob or 0.0, one.reference_rejected_logprob or 0.0]
        history = train_preference(
            model,
            preferences,
            DPOConfig(**loop.model_dump(), beta=BETA, sft_weight=0.0).seeded(loop.seed),
            expected_reference_hash="start",
            features=features,
            checkpoints=checkpoints,
            on_step=on_step,
        )
    return Trained(history, references, flat_adapter(model) - start)


def assert_alike(ours: Trained, theirs: Trained, dtype: str) -> None:
    """The same training but for rounding in a dtype, whose distance between two numbers around 1 is `eps`.

    A result in 16 bits is summed in fp32 and rounded once, and layer after layer some of these roundings remain: 2 eps of a
    log-probability. Of the first gradient's norm 8 eps: backward passes each layer twice, and nothing scales fp16's gradients,
    so that many are below its smallest normal number. In fp32 the sums themselves are rounded, in another order: 64 eps of
    either. A reward is beta times a difference of two log-probabilities, a margin one of two rewards, and the slope of the
    sigmoid loss is at most 1.

    AdamW divides gradients by their size: where one is less than its rounding, a share of about eps of all, the step goes
    either way. The square of the updates' distance is proportional to that share, the distance to its root. Later gradients are
    those of weights that are so far apart: their norms by up to half of the updates' bound.
    """
    eps = torch.finfo(DTYPES[dtype]).eps
    relative = (64 if dtype == "fp32" else 2) * eps
    assert len(ours.history) == len(theirs.history) > 0
    logprob = relative * max((abs(value) for value in theirs.references), default=0.0)
    reward = BETA * 2 * logprob
    bounds = {
        "loss": reward * 2 if theirs.references else relative * max(row["loss"] for row in theirs.history),
        "chosen_logprob": logprob,
        "rejected_logprob": logprob,
        "chosen_reward": reward,
        "rejected_reward": reward,
        "margin": 2 * reward,
        "tokens": 0,
        "learning_rate": 0,
    }
    for own, other in zip(ours.history, theirs.history, strict=True):
        assert own.keys() == other.keys()
        bounds["grad_norm"] = (2 * eps**0.5 if own["step"] else max(relative, 8 * eps)) * other["grad_norm"]
        for name in own.keys() & bounds.keys():
            distance = abs(own[name] - other[name])
            assert distance <= bounds[name], f"step {own['step']}, {name}: {own[name]} on the device, {other[name]}"
    for own, other in zip(ours.references, theirs.references, strict=True):
        assert abs(own - other) <= logprob
    distance = float((ours.update - theirs.update).norm() / theirs.update.norm())
    assert distance <= 4 * eps**0.5, f"the adapters' updates differ by {distance:.2e} of their size"
