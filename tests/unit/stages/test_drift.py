"""What of a stored reference may be rounding: other packings and short certain answers are, another model is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from srcfast.config.settings import DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.records import Preference, Sample
from srcfast.errors import SrcfastError
from srcfast.models import ImageFeatures
from srcfast.models.lvlm import LVLM, load_lvlm
from srcfast.stages.dpo import train_preference
from srcfast.stages.drift import ROUNDOFF, Drift, drift, drift_of, rounding_bound
from srcfast.stages.logprobs import reference_logprobs
from srcfast.stages.prompts import image_loader
from srcfast.stages.reference_checks import check_references
from srcfast.world.samples import world_samples

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = TrainingConfig(
    micro_batch_size=12,
    token_budget=4096,
    learning_rate=0.001,
    warmup_ratio=0.0,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
)


def of(differences: Sequence[float], tokens: Sequence[int], dtype: torch.dtype):
    found = drift_of([drift(one, 0.0, size) for one, size in zip(differences, tokens, strict=True)], dtype)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 60, 2000])
def test_independent_errors_of_tokens_pass_whatever_the_length(dtype: torch.dtype, tokens: int) -> None:
    """With a standard deviation of 30 roundoffs a token, as measured: see `stages/drift.py`."""
    rng = np.random.default_rng(tokens)
    for responses in (1, 2, 24, 600):
        errors = rng.normal(0.0, 30 * ROUNDOFF[dtype], (50, responses, tokens)).sum(-1)
        assert all(of(row, [tokens] * responses, dtype).is_rounding for row in errors)


def test_a_difference_that_a_short_answer_may_have_is_not_allowed_twice_over_of_a_certain_long_one() -> None:
    """Shares of the log-probability had it the other way round: 2 % of 1,000 nats, and of 1 nat."""
    assert of([0.1], [2], torch.bfloat16).is_rounding  # of an answer of 2 tokens and -0.7 nats: 6 % of 1 + 0.7
    assert not of([19.0], [800], torch.bfloat16).is_rounding  # of -1,000 nats: 1.9 %


def test_many_small_differences_are_not_rounding_where_one_is() -> None:
    each = 2 * rounding_bound(torch.bfloat16, 10_000)
    assert of([each], [1], torch.bfloat16).is_rounding
    assert not of([each] * 64, [1] * 64, torch.bfloat16).is_rounding


def test_what_is_not_a_number_is_not_rounding() -> None:
    assert not of([float("nan"), 0.0], [3, 3], torch.float32).is_rounding
    assert drift_of([], torch.float32) is None


class World:
    """Pairs of the embedded world with references by the embedded model in one dtype, and models that it is not."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        self.dtype = dtype
        self.samples = world_samples("train", 12, 5, image_dir=folder)
        self.model = self.load()
        answers = [sample.rationale for sample in self.samples]
        self.pairs = [
            self.pair(sample, answers[index], answers[index - 1]) for index, sample in enumerate(self.samples)
        ]
        # The shortest answers there are, and one that the model is certain of.
        self.pairs += [self.pair(sample, "2", "yes") for sample in self.samples[:3]]

    def load(self) -> LVLM:
        return load_lvlm("embedded", dtype=self.dtype, lora=LoRAConfig(r=4, alpha=8.0))

    def pair(self, sample: Sample, chosen: str | None, rejected: str | None) -> Preference:
        assert chosen and rejected
        return Preference(
            sample.id,
            sample.images,
            sample.question,
            chosen,
            rejected,
            1.0,
            None,
            None,
            {},
            image_root=sample.image_root,
        )

    def features_of(self, model: LVLM) -> ImageFeatures:
        return ImageFeatures(model, image_loader(self.samples))

    def referenced(self, model: LVLM, pairs: list[Preference], token_budget: int) -> list[Preference]:
        return reference_logprobs(
            model, pairs, reference_hash="abc", token_budget=token_budget, features=self.features_of(model)
        )

    def train(self, pairs: list[Preference], epochs: int = 1) -> LVLM:
        model = self.load()
        loop = SETTINGS.replace(micro_batch_size=len(pairs), epochs=epochs)
        train_preference(
            model,
            pairs,
            DPOConfig(**loop.model_dump(), sft_weight=0.0),
            expected_reference_hash="abc",
            features=self.features_of(model),
        )
        return model


@pytest.fixture(scope="module", params=DTYPES, ids=["fp32", "bf16", "fp16"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pairs(world: World) -> list[Preference]:
    """References in forests of about one pair; training packs all into one."""
    return world.referenced(world.model, world.pairs, 400)


def test_another_packing_is_the_same_model(world: World, pairs: list[Preference]) -> None:
    world.train(pairs)
    check_references(world.model, pairs, 4096, world.features_of(world.model))


def refused(world: World, pairs: list[Preference]) -> str:
    """The message of the first step's check, which has to say the same as the check of drawn pairs."""
    with pytest.raises(SrcfastError, match="before the first update") as raised:
        world.train(pairs)
    with pytest.raises(SrcfastError) as checked:
        check_references(world.model, pairs, 4096, world.features_of(world.model))
    assert str(checked.value).split(":")[0] == str(raised.value).split(":")[0]  # the same sample
    return str(raised.value)


def test_another_adapter_is_refused(world: World, pairs: list[Preference]) -> None:
    """One that three updates lead to."""
    trained = world.train(pairs, epochs=3)
    refused(world, world.referenced(trained, world.pairs, 4096))


def test_another_image_is_refused(world: World, pairs: list[Preference]) -> None:
    images = [pair.images for pair in pairs]
    moved = [replace(pair, images=images[index - 1]) for index, pair in enumerate(world.pairs)]
    found = world.referenced(world.model, moved, 4096)
    refused(world, [replace(one, images=pair.images) for one, pair in zip(found, pairs, strict=True)])


def test_shuffled_references_are_refused(world: World, pairs: list[Preference]) -> None:
    order = list(pairs)
    Random(1).shuffle(order)
    refused(world, [with_reference_of(pair, other) for pair, other in zip(pairs, order, strict=True)])


def test_two_references_exchanged_among_many_are_refused_by_name(world: World, pairs: list[Preference]) -> None:
    wrong = list(pairs)
    wrong[2], wrong[7] = with_reference_of(pairs[2], pairs[7]), with_reference_of(pairs[7], pairs[2])
    message = refused(world, wrong)
    assert any(f"sample {pair.sample_id}: " in message for pair in (pairs[2], pairs[7]))


def with_reference_of(pair: Preference, other: Preference) -> Preference:
    return replace(
        pair,
        reference_chosen_logprob=other.reference_chosen_logprob,
        reference_rejected_logprob=other.reference_rejected_logprob,
    )


@pytest.mark.parametrize(
    ("dtype", "responses", "bound"),
    [
        (torch.float32, 1, 2.0**-20 * 64 * 4),
        (torch.float32, 9, 2.0**-20 * 64 * 2),
        (torch.bfloat16, 36, 2.0**-9 * 64 * 1.5),
        (torch.float16, 100, 2.0**-12 * 64 * 1.3),
        (torch.float64, 4, 2.0**-36 * 64 * 2.5),
    ],
)
def test_the_bound_is_a_multiple_of_the_roundoff_that_falls_with_the_root_of_the_number(
    dtype: torch.dtype, responses: int, bound: float
) -> None:
    assert rounding_bound(dtype, responses) == pytest.approx(bound, rel=1e-12)
    assert Drift(bound, bound, responses, dtype).is_rounding
    assert not Drift(bound * 1.0001, bound, responses, dtype).is_rounding
    one = rounding_bound(dtype, 1)
    assert Drift(0.0, one, responses, dtype).is_rounding and not Drift(0.0, one * 1.0001, responses, dtype).is_rounding


def test_drifts_are_summarised_by_their_root_mean_square_and_their_greatest() -> None:
    assert drift(-3.0, -3.5, 4) == drift(-3.5, -3.0, 4) == 0.25
    assert drift_of([3.0, 4.0, 0.0, 0.0], torch.float32) == Drift(2.5, 4.0, 4, torch.float32)
    assert drift_of([], torch.float32) is None
