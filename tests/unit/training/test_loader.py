"""Steps ahead of time in worker processes: whatever their number, the same steps and the same training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_model import END, IMAGE, TOKENS_PER_IMAGE, SmallModel, image_embedding, letters, random_text
from torch import Tensor

from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.batching import global_batch
from srcfast.data.forest import Segment, Tree
from srcfast.data.logit_rows import response_logit_rows
from srcfast.errors import InputError
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loader import PackedStep, packed_steps
from srcfast.training.loop import train

SETTINGS = TrainingConfig(
    epochs=2,
    micro_batch_size=2,
    gradient_accumulation_steps=3,
    token_budget=90,
    learning_rate=0.01,
    activation_checkpointing=0,
).seeded(3)


def picture_items(count: int = 15) -> list[TrainingItem]:
    """Every image belongs to two items."""
    rng = np.random.default_rng(5)
    items = []
    for number in range(count):
        prompt = np.array([IMAGE] * TOKENS_PER_IMAGE + letters(random_text(rng, 20)))
        response = np.array([*letters(random_text(rng, 15)), END])
        tree = Tree((Segment(prompt), Segment(response, 0)), (f"image-{number // 2}",), key=f"sample-{number}")
        items.append(TrainingItem(tree))
    return items


class Pictures:
    """Like `ImageFeatures`, with room for few images; notes what was prepared in which process."""

    def __init__(self, room: int = 4, broken: str | None = None) -> None:
        self.kept: dict[str, Tensor] = {}
        self.room, self.broken = room, broken
        self.encoded: list[str] = []
        self.prepared_here: list[str] = []
        self.prepared_by: set[int] = set()

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in self.kept]

    def prepare(self, key: str) -> dict[str, Tensor]:
        self.prepared_here.append(key)
        if key == self.broken:
            raise InputError(file=key, expected="an image", found="a broken one")
        return {"pixels": image_embedding(key), "process": torch.tensor(os.getpid())}

    def __call__(
        self, keys: Iterable[str], prepared: Mapping[str, dict[str, Tensor]] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        wanted = list(keys)
        ready = {key: prepared[key] if key in prepared else self.prepare(key) for key in self.missing(wanted)}
        self.encoded += ready
        self.prepared_by |= {int(one["process"]) for one in ready.values()}
        found = {key: ready[key]["pixels"] if key in ready else self.kept[key] for key in wanted}
        self.kept = dict(list((self.kept | found).items())[-self.room :])
        return found


def steps_of(workers: int, trees: list[Tree], **more: Any) -> list[PackedStep]:
    batch_of = partial(global_batch, len(trees), settings=SETTINGS)
    return list(packed_steps(trees, range(6), batch_of, SETTINGS, workers=workers, **more))


def test_workers_make_the_same_steps_in_the_same_order() -> None:
    trees = [item.tree for item in picture_items()]
    alone, ahead = (steps_of(workers, trees, plan=response_logit_rows) for workers in (0, 2))
    assert [one.step for one in ahead] == [one.step for one in alone] == list(range(6))
    for mine, other in zip(alone, ahead, strict=True):
        assert mine.indices == other.indices and mine.images == other.images and len(mine.forests) > 1
        for forest, there in zip(mine.forests, other.forests, strict=True):
            assert forest.indices == there.indices
            for name in ("token_ids", "positions", "cu_seqlens_q", "cu_seqlens_k", "kv_index", "predictor"):
                assert torch.equal(getattr(forest, name), getattr(there, name))
            assert torch.equal(there.cache["response rows"], response_logit_rows(forest))  # made by the worker


@pytest.mark.parametrize("lora", [LoRAConfig(r=3, alpha=12.0, dropout=0.2)])
def test_training_is_the_same_with_any_number_of_workers(lora: LoRAConfig) -> None:
    weights, encoded = [], []
    for workers in (0, 2):
        model, pictures = SmallModel(lora=lora), Pictures()
        train(
            model,
            picture_items(),
            objective=Objective(rationale_loss, response_tokens),
            settings=SETTINGS.replace(loader_workers=workers),
            features=pictures,
        )
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
        encoded.append(pictures.encoded)
        # Each step asked for what was missing when it was asked for; what was dropped since is prepared here.
        assert (pictures.prepared_by - {os.getpid()} != set()) == (workers > 0)
        assert len(pictures.prepared_here) < len(pictures.encoded) or workers == 0
    assert torch.equal(weights[0], weights[1])
    assert encoded[0] == encoded[1]
    assert len(encoded[0]) > 8  # more than the distinct ones: some were dropped and encoded again


def test_an_image_that_a_worker_cannot_read_is_this_process_s_error() -> None:
    pictures = Pictures(broken="image-3")
    with pytest.raises(InputError, match="image-3: expected an image, found a broken one"):
        train(
            SmallModel(lora=LoRAConfig(r=2, alpha=32.0)),
            picture_items(),
            objective=Objective(rationale_loss, response_tokens),
            settings=SETTINGS.replace(loader_workers=1),
            features=pictures,
        )


def test_workers_leave_a_plain_function_of_features_alone() -> None:
    asked: list[list[str]] = []

    def features(keys: Iterable[str]) -> dict[str, Tensor]:
        asked.append(list(keys))
        return {key: image_embedding(key) for key in asked[-1]}

    history = train(
        SmallModel(),
        picture_items(),
        objective=Objective(rationale_loss, response_tokens),
        settings=SETTINGS.replace(loader_workers=1),
        features=features,
    )
    assert len(asked) == len(history) == 6
    assert all(len(set(keys)) == len(keys) for keys in asked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forests_of_workers_reach_the_device_whole() -> None:
    trees = [item.tree for item in picture_items()]
    for workers in (0, 1):
        forest = steps_of(workers, trees, pin=True)[0].forests[0]
        moved = forest.to("cuda")
        for name in ("token_ids", "positions", "cu_seqlens_q", "cu_seqlens_k", "kv_index", "predictor"):
            there, here = getattr(moved, name), getattr(forest, name)
            assert there.is_cuda and torch.equal(there.cpu(), here) and there.dtype == here.dtype
        assert moved.host is forest and moved.to("cuda") is moved is moved.to(moved.token_ids.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_that_workers_prepared_are_page_locked() -> None:
    step = steps_of(1, [item.tree for item in picture_items()], features=Pictures(), pin=True)[0]
    assert step.prepared and all(part.is_pinned() for own in step.prepared.values() for part in own.values())
