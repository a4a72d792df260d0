"""Layers of transformers' models sharded over ranks: the numbers of whole ones, in training and decoding, whole and in 4 bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import write_family
from helpers.family_models import LETTERS, random_images, randomise_adapter
from helpers.rank_processes import run_ranks, values_of
from torch import Tensor

from srcfast import distributed
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation.generate import Prompt, generate_greedy
from srcfast.models import load_lvlm
from srcfast.models.dropout_keys import dropping
from srcfast.models.lora import lora_parameters
from srcfast.models.sharding import empty_step, is_shard, keep_in_step, local_values

LORA = LoRAConfig(r=3, alpha=12.0, dropout=0.1).seeded(7)


# Experts' products differ by rounding (1e-6 was measured); all others are equal bit by bit.
TOLERANCE = {"qwen3_vl_moe": 1e-5}


def close(name: str, expected: Tensor, found: Tensor) -> bool:
    """Whether two tensors differ by no more than the family's tolerance, of the largest number."""
    return float((expected - found).abs().max()) <= TOLERANCE.get(name, 0.0) * float(expected.abs().max())


def load(folder: Path, name: str, shard: bool, quantize: str | None) -> Any:
    model = load_lvlm(folder / name, quantize=quantize, lora=LORA, shard=shard, backbone="transformers")
    randomise_adapter(model, 6)
    return model


class Work:
    """A prompt with an image, and a forest of it and nested responses; drawn alike on all ranks."""

    def __init__(self, model: Any) -> None:
        rng = np.random.default_rng(3)
        self.images = random_images(rng)
        self.prompt = model.encode_prompt("what is it?", [self.images["first"]])
        segments = [Segment(self.prompt)]
        segments += [Segment(rng.integers(*LETTERS, 4), parent) for parent in (0, 0, 1)]
        self.forest = Forest.of([Tree(tuple(segments), ("first",))])

    def features(self, model: Any) -> dict[str, Any]:
        return {"first": model.encode_images([self.images["first"]])[0]}

    def gradients(self, model: Any) -> tuple[Tensor, list[Tensor]]:
        model.train()
        with dropping(model.decoder, torch.arange(self.forest.num_tokens)):
            hidden = model(self.forest, self.features(model))
        model.zero_grad()
        hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7)))
        model.eval()
        return hidden.detach(), [parameter.grad.clone() for parameter in lora_parameters(model)]

    def tokens(self, model: Any) -> list[list[int]]:
        features = self.features(model)
        found = generate_greedy(model, [Prompt(self.prompt, ("first",))], lambda keys: features, 8, 1)
        return [list(result.token_ids) for result in found]


def compare(name: str, folder: Path) -> list[str]:
    """What differs between whole and sharded layers; nothing should."""
    differing = []
    for quantize in (None, "nf4"):
        whole, sharded = (load(folder, name, shard, quantize) for shard in (False, True))
        work = Work(whole)
        for recomputed in (0, 1, 3):
            whole.decoder.checkpoint_layers = sharded.decoder.checkpoint_layers = recomputed
            expected, wanted = work.gradients(whole)
            found, given = work.gradients(sharded)
            same = all(map(partial(close, name), [expected, *wanted], [found, *given]))
            if not same or not all(gradient.any() for gradient in given):
                differing.append(f"gradients, {quantize}, {recomputed} recomputed")
        # One rank decodes alone, and takes one more step of training: the others keep it company.
        if distributed.rank() == 0 and work.tokens(whole) != work.tokens(sharded):
            differing.append(f"tokens, {quantize}")
        keep_in_step(sharded.decoder)
        if distributed.rank() == 0:
            work.gradients(sharded)
        else:
            sharded.train()
            empty_step(sharded.decoder)
        shards = [parameter for parameter in sharded.decoder.parameters() if is_shard(parameter)]
        share = sum(local_values(parameter).nbytes for parameter in shards) / sum(one.nbytes for one in shards)
        if abs(share * distributed.world_size() - 1.0) > 0.1:  # rows don't always divide
            differing.append(f"a share of {share}, {quantize}")
    return differing


@pytest.mark.parametrize(("name", "ranks"), [("qwen3_vl", 3), ("qwen3_5", 2), ("qwen3_vl_moe", 2)])
def test_sharded_layers_give_the_numbers_of_whole_ones(name: str, ranks: int, tmp_path: Path) -> None:
    write_family(name, tmp_path / name)
    assert values_of(run_ranks(ranks, partial(compare, name), tmp_path)) == [[]] * ranks
