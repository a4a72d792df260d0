"""The general backbone against the hand-written decoder on its four shapes; 4 bits, rows and dropout on the general one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.family_models import ADAPTER, FamilyModels, RandomForest, randomise_adapter
from helpers.small_checkpoints import assert_close
from torch import Tensor

from srcfast.data.forest import Forest
from srcfast.models import LVLM
from srcfast.models.dropout_keys import dropout_keys, dropping
from srcfast.models.experts import expert_parameters
from srcfast.models.lora import apply_lora, lora_parameters, save_adapter
from srcfast.models.quantized import NF4Linear
from srcfast.models.transformers_decoder import text_model
from srcfast.models.transformers_lvlm import TransformersLVLM
from srcfast_kernels import nf4_dequantize, nf4_quantize

GetFamily = Callable[[str], FamilyModels]
ROUNDING = 5e-5  # of the largest number: fp32 sums in another order over four layers
HANDWRITTEN = ("llava_llama", "llava_mistral", "llava_qwen2", "llava_qwen3", "llava_next")
VARIED = ("qwen3_vl", "qwen3_vl_moe", "glm4v", "internvl", "smolvlm")


def weighted_sum(hidden: Tensor, seed: int) -> Tensor:
    """A number that depends on every entry of hidden states [T, D]."""
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))).sum()


def gradients(model: Any) -> list[Tensor]:
    """Those of the adapter, which are set to None."""
    result = []
    for parameter in lora_parameters(model):
        assert parameter.grad is not None
        result.append(parameter.grad)
        parameter.grad = None
    return result


def assert_all_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Gradients are sums over some hundred rows of products over four layers, in another order."""
    assert len(ours) == len(theirs) > 0 and all(float(gradient.abs().max()) > 0 for gradient in theirs)
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient, 1e-4)


def both_backbones(models: FamilyModels, directory: Path, dropout: float = 0.0) -> tuple[Any, Any]:
    """The general and the hand-written one, with the same adapter."""
    first = models.load(lora=ADAPTER.replace(dropout=dropout))
    randomise_adapter(first, 2)
    save_adapter(first, directory)
    general, handwritten = (models.load(lora=directory, backbone=kind) for kind in ("transformers", "handwritten"))
    assert isinstance(general, TransformersLVLM) and isinstance(handwritten, LVLM)
    return general, handwritten


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_both_backbones_compute_the_same(
    name: str, family: GetFamily, rng: np.random.Generator, tmp_path: Path
) -> None:
    models = family(name)
    general, handwritten = both_backbones(models, tmp_path)
    forest = RandomForest(models, rng)
    for turn, tree in zip(forest.turns, forest.trees, strict=True):
        prompt = handwritten.encode_prompt(turn.question, [forest.images[key] for key in turn.images])
        assert prompt.tolist() == tree.segments[0].tokens.tolist()
    for image in forest.images.values():
        assert general.vision.num_tokens(image) == handwritten.vision.num_tokens(image)
    hidden = [model(forest.forest, forest.features(model)) for model in (general, handwritten)]
    assert_close(hidden[0], hidden[1], ROUNDING)
    for states in hidden:
        weighted_sum(states, 3).backward()
    assert_all_close(gradients(general), gradients(handwritten))


@pytest.mark.parametrize(("backbone", "kind"), [("auto", LVLM), ("transformers", TransformersLVLM)])
def test_a_setting_picks_the_backbone(backbone: str, kind: type, family: GetFamily) -> None:
    assert isinstance(family("llava_qwen2").load(backbone=backbone), kind)
    assert isinstance(family("internvl").load(backbone="auto"), TransformersLVLM)


@torch.no_grad()
def round_to_four_bits(layers: torch.nn.Module) -> None:
    """Replace the weights of linears and experts by what is left of them in 4 bits."""
    for part in layers.modules():
        if isinstance(part, torch.nn.Linear):
            part.weight.copy_(nf4_dequantize(nf4_quantize(part.weight)))
    for part, name in expert_parameters(layers):
        for matrix in getattr(part, name):
            matrix.copy_(nf4_dequantize(nf4_quantize(matrix)))


@pytest.mark.parametrize("name", VARIED)
def test_a_model_in_four_bits_equals_one_of_the_dequantised_weights(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    small = models.load(quantize="nf4")
    quantised = {name for name, part in small.decoder.named_modules() if isinstance(part, NF4Linear)}
    theirs = copy.deepcopy(models.theirs)
    prefix = small.adapter_prefix
    linears = {
        part_name.removeprefix(f"{prefix}."): part
        for part_name, part in theirs.named_modules()
        if isinstance(part, torch.nn.Linear) and part_name.startswith(f"{prefix}.layers.")
    }
    assert quantised == linears.keys() and len(quantised) >= 4 * 4
    forest = RandomForest(models, rng)
    with torch.no_grad():
        plain = forest.their_logits(theirs)
        round_to_four_bits(text_model(theirs).layers)
        packed, dequantised = forest.our_logits(small), forest.their_logits(theirs)
    scale = max(float(logits.abs().max()) for logits in dequantised)
    for (_, path, _), logits in zip(forest.paths(), dequantised, strict=True):
        torch.testing.assert_close(packed[path], logits, rtol=0.0, atol=ROUNDING * scale)
    rounded = max(float((a - b).abs().max()) for a, b in zip(plain, dequantised, strict=True))
    assert rounded > 20 * ROUNDING * scale  # 4 bits show


@pytest.mark.parametrize("name", VARIED)
def test_gradients_in_four_bits_are_those_of_the_dequantised_weights(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    forest = RandomForest(models, rng)
    results = []
    for quantize in ("nf4", None):
        model = models.load(quantize=quantize)
        if quantize is None:
            round_to_four_bits(model.decoder.layers)
        _adapt(model)
        weighted_sum(model(forest.forest, forest.features(model)), 4).backward()
        results.append(gradients(model))
    assert_all_close(*results)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe"])
def test_experts_in_four_bits_are_those_of_the_dequantised_weights(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    forest = RandomForest(models, rng)
    whole, dequantised, small = (models.load(quantize=quantize) for quantize in (None, None, "nf4"))
    with torch.no_grad():
        round_to_four_bits(dequantised.decoder.layers)
        experts = list(expert_parameters(dequantised.decoder.layers))
        expected = forest.our_logits(dequantised)
        assert_close(forest.our_logits(small), expected, ROUNDING)
        assert float((forest.our_logits(whole) - expected).abs().max()) > 20 * ROUNDING * float(expected.abs().max())
    assert len(experts) >= 2 * 3 and not list(expert_parameters(small.decoder.layers))
    results, saved = [], []
    for model in (small, dequantised):
        _adapt(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda one: (saved.append(one), one)[1], lambda one: one):
            loss = weighted_sum(model(forest.forest, forest.features(model)), 4)
        found = any(_is_among(one, matrix) for one in saved for matrix in getattr(*experts[0]))
        assert found == (model is dequantised)  # in 4 bits no expert's whole matrix is stored for backward
        saved.clear()
        loss.backward()
        results.append(gradients(model))
    assert_all_close(*results)


def _is_among(saved: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether a tensor is a matrix, transposed or not, or holds it among others."""
    if saved.dtype != matrix.dtype or saved.ndim < 2:
        return False
    rows = saved.reshape(-1, *saved.shape[-2:])
    return any(torch.equal(row, one) for row in rows for one in (matrix, matrix.T))


def _adapt(model: Any, dropout: float = 0.0) -> None:
    apply_lora(model, ADAPTER.replace(dropout=dropout))
    randomise_adapter(model, 5)


@pytest.mark.parametrize("name", VARIED)
def test_selected_rows_are_those_of_the_whole(name: str, family: GetFamily, rng: np.random.Generator) -> None:
    models = family(name)
    model = models.load()
    _adapt(model)
    forest = RandomForest(models, rng)
    features = forest.features()
    rows = torch.from_numpy(np.sort(rng.choice(forest.forest.num_tokens, 20, replace=False)))
    hidden = [model(forest.forest, features)[rows], model(forest.forest, features, rows)]
    assert hidden[1].shape == (20, 64)
    assert_close(hidden[1], hidden[0].detach(), ROUNDING)
    results = []
    for states in hidden:
        weighted_sum(states, 6).backward()
        results.append(gradients(model))
    assert_all_close(results[1], results[0])


def dropped_gradients(model: Any, forest: RandomForest, packs: Sequence[Sequence[int]], step: int = 3) -> list[Tensor]:
    """Gradients of all trees, packed so into forests, under an adapter's dropout."""
    features = forest.features(model)
    model.train()
    for pack in packs:
        part = Forest.of([forest.trees[number] for number in pack])
        with dropping(model.decoder, dropout_keys(part, 0, step, pack)):
            hidden = model(part, features)
        starts = np.cumsum([0, *(forest.trees[number].num_tokens for number in pack)])
        terms = [
            weighted_sum(hidden[start : start + forest.trees[number].num_tokens], number)
            for number, start in zip(pack, starts, strict=False)
        ]
        torch.stack(terms).sum().backward()
    model.eval()
    return gradients(model)


@pytest.mark.parametrize("name", VARIED)
def test_dropout_is_the_same_however_trees_are_packed(name: str, family: GetFamily, rng: np.random.Generator) -> None:
    models = family(name)
    model = models.load()
    _adapt(model, dropout=0.4)
    forest = RandomForest(models, rng)
    whole = dropped_gradients(model, forest, [[0, 1, 2]])
    for packs in ([[2], [1], [0]], [[1, 0], [2]]):
        assert_all_close(dropped_gradients(model, forest, packs), whole)
    other = dropped_gradients(model, forest, [[0, 1, 2]], step=4)
    assert max(float((a - b).abs().max()) for a, b in zip(other, whole, strict=True)) > 0.01


def test_both_backbones_drop_the_same(family: GetFamily, rng: np.random.Generator, tmp_path: Path) -> None:
    models = family("llava_qwen3")
    general, handwritten = both_backbones(models, tmp_path, dropout=0.4)
    forest = RandomForest(models, rng)
    results = [dropped_gradients(model, forest, [[0, 1, 2]]) for model in (general, handwritten)]
    assert_all_close(*results)
