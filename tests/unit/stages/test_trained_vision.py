"""Trainings whose adapters reach projector and tower: every stage, references, batches cut otherwise, ranks, continuing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rank_processes import run_ranks, values_of
from helpers.small_trainings import pairs_of
from torch import Tensor

from srcfast.config.settings import DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import Preference, Sample
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.lora import adapters, disable_lora, lora_parameters, save_adapter
from srcfast.stages.dpo import train_preference
from srcfast.stages.logprobs import reference_logprobs
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.meter import StepMeter
from srcfast.world.samples import world_samples

LORA = LoRAConfig(r=4, alpha=8.0, projector=True, tower_layers=1).seeded(3)
# Of six samples: three steps, the last of two samples.
LOOP = TrainingConfig(
    micro_batch_size=2,
    gradient_accumulation_steps=1,
    token_budget=2048,
    learning_rate=0.003,
    warmup_ratio=0.0,
    activation_checkpointing=0,
).seeded(2)
JUDGED = {"preference_weight": 0.0, "sft_weight": 1.0}
REHEARSED = {"sft_weight": 0.3, "rehearsal_weight": 0.5}
OF_VISION = ("multi_modal_projector", "vision_tower")


def samples_in(folder: Path) -> list[Sample]:
    """Six questions about three images: two about each, which a batch has at times in one forest and at times in two."""
    drawn = world_samples("train", 12, 3, image_dir=folder / "images")
    images = list(dict.fromkeys(sample.images for sample in drawn))
    return [replace(sample, images=images[number % 3]) for number, sample in enumerate(drawn[:6])]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples_in(tmp_path_factory.mktemp("vision"))


class Trained:
    """The embedded base with an adapter, and what its training gave."""

    def __init__(
        self,
        samples: Sequence[Sample],
        dtype: torch.dtype = torch.float64,
        lora: LoRAConfig | Path = LORA,
        shard: bool = False,
    ) -> None:
        self.samples = samples
        self.model = load_lvlm("embedded", dtype=dtype, lora=lora, shard=shard)
        self.features = ImageFeatures(self.model, image_loader(samples))
        self.history: list[dict[str, Any]] = []

    def tune(self, loop: TrainingConfig = LOOP, loss: dict[str, Any] | None = None, **options: Any) -> Trained:
        """Rationale fine-tuning, or with settings of the loss preference training."""
        raps, _ = build_raps(self.samples)
        if loss is None:
            self.history = fine_tune_rationale(self.model, raps, loop, features=self.features, **options)
            return self
        self.history = train_preference(
            self.model,
            self.referenced(),
            DPOConfig(**loop.model_dump(), **loss).seeded(loop.seed),
            expected_reference_hash="start",
            features=self.features,
            rehearsal=raps if "rehearsal_weight" in loss else (),
            **options,
        )
        return self

    def referenced(self) -> list[Preference]:
        known = {"reference_hash": "start", "token_budget": 1024, "features": self.features}
        return reference_logprobs(self.model, pairs_of(self.samples), **known)

    def logprobs(self) -> list[float]:
        return [
            value
            for pair in self.referenced()
            for value in (pair.reference_chosen_logprob, pair.reference_rejected_logprob)
            if value is not None
        ]

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in lora_parameters(self.model)])


@pytest.mark.parametrize(
    "loss", [None, {"sft_weight": 0.0}, JUDGED, REHEARSED], ids=["rationale", "dpo", "judged", "rehearsed"]
)
def test_each_training_moves_all_adapters_and_nothing_else(loss: dict[str, Any] | None, samples: list[Sample]) -> None:
    trained = Trained(samples)
    before = {name: parameter.detach().clone() for name, parameter in trained.model.named_parameters()}
    trained.tune(loss=loss)
    assert trained.features.encoded == 3  # in all of its steps
    changed = {name for name, parameter in trained.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert sum(name.startswith(OF_VISION) for name in adapters(trained.model)) == 8


@pytest.mark.parametrize("loss", [None, REHEARSED], ids=["rationale", "dpo"])
def test_gradients_of_an_image_add_up_however_the_batch_is_cut(
    loss: dict[str, Any] | None, samples: list[Sample]
) -> None:
    """Its samples in one forest, or in a forest each; with activations recomputed; with images prepared by a worker."""
    whole = LOOP.replace(micro_batch_size=6, gradient_accumulation_steps=1, epochs=3)
    expected = Trained(samples).tune(whole, loss).weights()
    for change in (
        {"micro_batch_size": 1, "gradient_accumulation_steps": 6},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "activation_checkpointing": 2},
        {"token_budget": 400, "loader_workers": 1},
    ):
        found = Trained(samples).tune(whole.replace(**change), loss).weights()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_references_stay_those_of_the_base_while_the_adapter_is_trained(samples: list[Sample], tmp_path: Path) -> None:
    """Of the adapter as it is, images stored before a training give what a model gives that stores none."""
    trained = Trained(samples)
    base = Trained(samples, lora=LORA.replace(projector=False, tower_layers=0)).logprobs()
    start = trained.logprobs()
    np.testing.assert_allclose(start, base, rtol=1e-12)
    for _ in range(2):
        trained.tune()
        with disable_lora(trained.model):
            np.testing.assert_allclose(trained.logprobs(), start, rtol=1e-12)  # a CPU sums as data lie in memory
        now = trained.logprobs()
        assert float(np.abs(np.subtract(now, start)).max()) > 0.1
        save_adapter(trained.model, tmp_path)
        again = Trained(samples, lora=tmp_path)
        np.testing.assert_allclose(now, again.logprobs(), rtol=1e-6)  # adapters are stored in fp64
        assert trained.features.encoded == 3


def test_without_its_part_on_images_a_trained_adapter_gives_other_log_probabilities(samples: list[Sample]) -> None:
    trained = Trained(samples).tune()
    now = trained.logprobs()
    with torch.no_grad():
        for name, layer in adapters(trained.model).items():
            if name.startswith(OF_VISION):
                layer.lora_B.zero_()
    assert float(np.abs(np.subtract(trained.logprobs(), now)).max()) > 1e-3


def test_mfu_counts_the_adapters_of_the_decoder_alone(samples: list[Sample]) -> None:
    """128 rows and columns of q, k, v and o, and 384 beside 128 of gate, up and down, in five layers; rank 4."""
    model = Trained(samples, torch.float32).model
    assert StepMeter(model, lambda forest: 0).adapter_parameters == 5 * 4 * (4 * 256 + 3 * 512)


# Continuing -------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", [None, REHEARSED], ids=["rationale", "dpo"])
def test_a_training_that_was_stopped_continues_bit_for_bit(
    loss: dict[str, Any] | None, dtype: torch.dtype, samples: list[Sample], tmp_path: Path
) -> None:
    loop = LOOP.replace(epochs=2)

    def trained(name: str, until: int) -> Trained:
        def count(metrics: dict[str, Any]) -> None:
            if metrics["step"] + 1 == until:
                raise Stopped

        checkpoints = TrainingCheckpoints(tmp_path / name, {}, steps=1)
        return Trained(samples, dtype).tune(loop, loss, checkpoints=checkpoints, on_step=count)

    undisturbed = trained("undisturbed", 99)
    for stop in (2, 4):
        with pytest.raises(Stopped):
            trained("stopped", stop)
    continued = trained("stopped", 99)
    assert torch.equal(continued.weights(), undisturbed.weights())
    timed = {"tokens_per_second", "mfu", "peak_memory_bytes"}
    for one, other in zip(continued.history, undisturbed.history, strict=True):
        assert {name: one[name] for name in one.keys() - timed} == {name: other[name] for name in other.keys() - timed}


# Ranks ------------------------------------------------------------------------------------------------------------------


BY_RANKS = LOOP.replace(micro_batch_size=1, gradient_accumulation_steps=4)


def tuned(folder: Path, shard: bool = False) -> dict[str, Any]:
    trained = Trained(samples_in(folder), shard=shard).tune(BY_RANKS)
    return {"weights": trained.weights().tolist(), "norms": [row["grad_norm"] for row in trained.history]}


def tuned_with_shared_layers(folder: Path) -> dict[str, Any]:
    return tuned(folder, shard=True)


@pytest.mark.parametrize("work", [tuned, tuned_with_shared_layers], ids=["whole", "shared"])
def test_ranks_add_up_the_gradients_of_projector_and_tower(work: Callable[[Path], Any], tmp_path: Path) -> None:
    """Six samples in batches of four: the second has two, and an image's samples may be on two ranks."""
    alone = tuned(tmp_path)
    for one in values_of(run_ranks(2, work, tmp_path)):
        np.testing.assert_allclose(one["weights"], alone["weights"], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(one["norms"], alone["norms"], rtol=1e-9)
