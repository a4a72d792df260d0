"""Any LVLM of transformers on the packed forest gives what transformers' ordinary pass gives, from pixels, path by path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, REFUSED, write_family
from helpers.family_models import (
    ADAPTER,
    FamilyModels,
    RandomForest,
    Turn,
    inputs_of,
    random_images,
    random_turns,
    randomise_adapter,
    response_score,
)
from helpers.small_checkpoints import assert_close
from torch import Tensor

from srcfast.data.forest import Forest
from srcfast.errors import InputError
from srcfast.models import encoded_images, load_lvlm
from srcfast.models.lora import adapters, lora_parameters, save_adapter
from srcfast.models.transformers_lvlm import EncodedImage

GetFamily = Callable[[str], FamilyModels]
# fp32 sums in another order over four layers: 1e-6 to 1.3e-5 of the largest logit, measured over all families.
ROUNDING = 5e-5
AXES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "glm4v",
    "paddleocr_vl",
)  # rotary positions by time, height and width


def difference(ours: Tensor, forest: RandomForest, theirs: list[Tensor]) -> float:
    """The largest difference of logits, of the largest logit."""
    pairs = list(zip(forest.paths(), theirs, strict=True))
    scale = max(float(logits.abs().max()) for _, logits in pairs)
    return max(float((ours[path] - logits).abs().max()) for (_, path, _), logits in pairs) / scale


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_of_every_path_are_those_of_the_ordinary_pass(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    forest = RandomForest(family(name), rng)
    ours, theirs = forest.our_logits(), forest.their_logits()
    assert difference(ours, forest, theirs) < ROUNDING
    compared = 0
    for (_, path, _), logits in zip(forest.paths(), theirs, strict=True):
        highest = logits.topk(2).values
        clear = highest[:, 0] - highest[:, 1] > 2 * ROUNDING * float(logits.abs().max())
        assert torch.equal(ours[path].argmax(-1)[clear], logits.argmax(-1)[clear])
        compared += int(clear.sum())
    assert compared > 0.9 * sum(len(logits) for logits in theirs)


@pytest.mark.parametrize(
    "name", ["qwen3_vl", "internvl", "idefics2", "deepseek_vl_hybrid", "llava_next", "video_llava"]
)
@torch.no_grad()
def test_images_go_to_models_without_an_argument_for_them(
    name: str, family: GetFamily, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_images, "_has_argument", lambda model: False)
    models = family(name)
    ours, forest = models.load(), RandomForest(models, rng)
    base, (image,) = ours.vision._whole[0].base_model, ours.encode_images([forest.images["first"]])
    arguments = encoded_images.image_arguments(base, ours.vision.outputs([image]))
    assert arguments and all("pixel_values" in name for name in arguments)
    assert difference(forest.our_logits(ours), forest, forest.their_logits()) < ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_those_of_the_processor_as_documented(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models, images = family(name), random_images(rng)
    for turn in random_turns(models, rng):
        ours = models.ours.encode_prompt(turn.question, [images[key] for key in turn.images])
        assert np.array_equal(ours, inputs_of(models.processor, turn, images)["input_ids"][0])
    for image in images.values():
        (encoded,) = models.ours.encode_images([image])
        positions = encoded.values.numel() // encoded.values.shape[-1]
        prompt = models.ours.encode_prompt("", [image])
        expected = int((prompt == models.ours.image_token_id).sum())
        deep = encoded.values.shape[-1] // models.ours.vision.hidden_size
        assert models.ours.vision.num_tokens(image) == positions == expected > 0
        tower = models.theirs.config.vision_config
        assert deep == 1 + len(getattr(tower, "deepstack_visual_indexes", None) or ())


@pytest.mark.parametrize("name", AXES)
@torch.no_grad()
def test_linear_positions_would_show(
    name: str, family: GetFamily, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = family(name)
    forest = RandomForest(models, rng)
    theirs = forest.their_logits()
    monkeypatch.setattr(type(models.ours), "_positions", lambda self, host, features: host.positions.expand(3, -1))
    assert difference(forest.our_logits(), forest, theirs) > 50 * ROUNDING


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "llava_llama", "idefics2"])
@torch.no_grad()
def test_every_part_of_an_image_shows(
    name: str, family: GetFamily, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = family(name)
    forest = RandomForest(models, rng)
    theirs, features = forest.their_logits(), forest.features()
    for column in range(0, features["first"].values.shape[-1], models.ours.vision.hidden_size):
        changed = {key: EncodedImage(image.values.clone(), image.sizes) for key, image in features.items()}
        for image in changed.values():
            image.values[..., column : column + models.ours.vision.hidden_size] = 0.0
        monkeypatch.setattr(forest, "features", lambda model, changed=changed: changed)
        assert difference(forest.our_logits(), forest, theirs) > 20 * ROUNDING


@torch.no_grad()
def test_the_order_of_images_shows(family: GetFamily, rng: np.random.Generator) -> None:
    forest = RandomForest(family("llava_llama"), rng)
    theirs = forest.their_logits()
    assert difference(forest.our_logits(), forest, theirs) < ROUNDING
    forest.images["second"], forest.images["third"] = forest.images["third"], forest.images["second"]
    assert difference(forest.our_logits(), forest, theirs) > 20 * ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_an_adapter_are_those_of_peft(
    name: str, family: GetFamily, rng: np.random.Generator, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    models = family(name)
    ours = models.load(lora=ADAPTER)
    randomise_adapter(ours, int(rng.integers(2**31)))
    save_adapter(ours, tmp_path / "adapter")
    base = copy.deepcopy(models.theirs)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    forest = RandomForest(models, rng)
    weights = rng.normal(size=len(forest.paths()))
    packed, plain = forest.our_logits(ours), forest.their_logits(theirs)
    # Under large adapters experts and recurrent states round most: 5e-6 to 6e-5 in some twenty draws.
    rounding = 4 * ROUNDING if name == "qwen3_5_moe" else ROUNDING
    assert difference(packed.detach(), forest, [logits.detach() for logits in plain]) < rounding
    with torch.no_grad():
        assert difference(forest.our_logits(), forest, plain) > 20 * ROUNDING  # the adapter shows
    response_score([packed[path] for _, path, _ in forest.paths()], forest, weights).backward()
    response_score(plain, forest, weights).backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if ".lora_" in name
    }
    gradients = {name: parameter.grad for name, parameter in _named(ours)}
    assert gradients.keys() == expected.keys() and len(gradients) == len(lora_parameters(ours)) >= 2 * 4 * 4
    for key, gradient in gradients.items():
        assert gradient is not None and float(expected[key].abs().max()) > 0
        # Sums over some hundred rows in another order; logits above are equal to 1e-5. Experts and recurrent states round at
        # each token, which comes to 1.2e-4 at times.
        assert_close(gradient, expected[key], 4e-4 if name == "qwen3_5_moe" else 1e-4)


def test_linears_that_peft_would_take_for_experts_are_refused(family: GetFamily) -> None:
    models = family("glm4v_moe")
    targets = {name.rpartition(".")[2] for name in adapters(models.load(lora=ADAPTER))}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(InputError, match=r"target_modules.*q_proj, k_proj, v_proj, o_proj.*found up_proj"):
        models.load(lora=ADAPTER.replace(target_modules=("q_proj", "up_proj")))


def _named(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The adapter's parameters by transformers' names."""
    prefix = model.adapter_prefix
    return [(f"{prefix}.{name}", part) for name, part in model.decoder.named_parameters() if ".lora_" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_sixteen_bits_round_and_nothing_else(
    name: str, dtype: torch.dtype, family: GetFamily, rng: np.random.Generator
) -> None:
    """The comparison that loading makes lets each family through, and logits are those of fp32 but for rounding."""
    models = family(name)
    small = models.load(dtype=dtype)
    forest = RandomForest(models, rng)
    exact, rounded = forest.our_logits(), forest.our_logits(small).float()
    ratio = float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    # Weights and activations rounded to 2^-9 or 2^-12, over four layers; experts are chosen by rounded numbers.
    assert 1e-5 < ratio < (0.1 if dtype == torch.bfloat16 else 0.05)


@torch.no_grad()
def test_an_image_is_encoded_as_its_prompt_asks_for(family: GetFamily, rng: np.random.Generator) -> None:
    """LLaVA-OneVision cuts an image into tiles only where it is the only one: here in one forest alone and beside another."""
    forest = RandomForest(family("llava_onevision"), rng)
    forest.turns = [
        Turn("which one?", keys) for keys in (("first",), ("first", "second"), ("second", "first", "first"))
    ]
    forest.trees = [forest._tree(turn, rng) for turn in forest.turns]
    forest.forest = Forest.of(forest.trees)
    theirs = forest.their_logits()
    assert difference(forest.our_logits(), forest, theirs) < ROUNDING
    vision, image = forest.models.ours.vision, forest.images["first"]
    assert vision.num_tokens(image) > vision.num_tokens(image, 2) == vision.num_tokens(image, 3) == 65
    encoded = forest.models.ours.encode_images([image])[0]
    assert encoded.nbytes == encoded.values.nbytes + encoded.untiled.nbytes


@pytest.mark.parametrize(("name", "named"), [(name, named) for name, (_, named) in REFUSED.items()])
def test_what_would_not_be_exact_is_refused_by_name(name: str, named: str, tmp_path: Path) -> None:
    write_family(name, tmp_path)
    with pytest.raises(InputError, match=rf"(?s){named}.*Fix: "):
        load_lvlm(tmp_path, backbone="transformers")
