"""Adapters on the projector and the vision tower: against PEFT and plain PyTorch, and what is stored of an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import write_family
from helpers.small_checkpoints import (
    assert_close,
    lvlm_logits,
    oracle_logits,
    random_image,
    random_tokens,
    text_config,
    write_lvlm,
    write_text_model,
)
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError, SrcfastError
from srcfast.models import ImageFeatures, load_lvlm, load_text_model
from srcfast.models.lora import (
    adapters,
    add_lora,
    check_adapter_changes,
    disable_lora,
    folded_lora,
    lora_parameters,
    merge_lora,
    remove_adapter,
    save_adapter,
)
from srcfast.models.lvlm import save_lvlm
from srcfast.models.vision import TowerOutput

RNG = np.random.default_rng(5)
IMAGES = {"first": random_image(RNG, 40, 30), "second": random_image(RNG, 25, 60)}
RESPONSES = [random_tokens(RNG, length) for length in (8, 5, 6)]
QUESTIONS = ["Why?", "What is left of the red square?", "How many?"]
# Of each of three samples; the first two share one, in one forest.
KEYS: list[tuple[str, ...]] = [("first",), ("second", "first"), ("second",)]
PROJECTOR = LoRAConfig(r=3, alpha=5.0, projector=True).seeded(7)
WITH_TOWER = PROJECTOR.replace(tower_layers=1)
# Family, tower, number of the last layers with adapters, and of all adapted layers: 14 of the decoder, 2, 6 a layer.
CASES = [
    ("llava", "clip", 0, 16),
    ("llava", "clip", 1, 22),
    ("llava", "clip", 2, 28),
    ("llava", "siglip", 1, 22),
    ("llava_next", "clip", 0, 16),
    ("llava_next", "siglip", 2, 28),
]


def randomise(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: Any) -> Tensor:
    return lvlm_logits(model, QUESTIONS[1], [*IMAGES.values()], RESPONSES[0])


def strategy_of(tower: str) -> dict[str, str]:
    """SigLIP's tower has no class token to leave out."""
    return {"vision_feature_select_strategy": "full" if tower == "siglip" else "default"}


@pytest.mark.parametrize(("kind", "tower", "layers", "count"), CASES)
def test_peft_reads_a_saved_adapter_and_it_loads_as_it_was(
    kind: str, tower: str, layers: int, count: int, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    theirs = write_lvlm(tmp_path / "base", kind=kind, tower=tower, **strategy_of(tower))
    plain = load_lvlm(tmp_path / "base")
    ours = load_lvlm(tmp_path / "base", lora=PROJECTOR.replace(tower_layers=layers))
    randomise(ours)
    save_adapter(ours, tmp_path / "adapter")
    logits = logits_of(ours)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert sum(".lora_A." in name for name, _ in adapted.named_parameters()) == len(adapters(ours)) == count
    expected = oracle_logits(adapted, plain, QUESTIONS[1], [*IMAGES.values()], RESPONSES[0])
    assert_close(logits, expected)
    again = load_lvlm(tmp_path / "base", lora=tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits)
    assert sum(parameter.requires_grad for parameter in again.parameters()) == 2 * count
    assert (again.lora_config.projector, again.lora_config.tower_layers) == (True, layers)
    save_adapter(again, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    # The adapters of the decoder alone give other logits: those on images are there.
    with torch.no_grad():
        for name, layer in adapters(again).items():
            layer.lora_B *= not name.startswith(("multi_modal_projector", "vision_tower"))
    assert float((logits_of(again) - logits).abs().max()) > 0.05


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["q_proj", "linear_2"], ["q_proj", "fc1"]])
def test_an_adapter_of_peft_on_tower_or_projector_gives_peft_s_logits(targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = write_lvlm(tmp_path / "base")
    plain = load_lvlm(tmp_path / "base")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_lvlm(tmp_path / "base", lora=tmp_path / "adapter")
    expected = oracle_logits(theirs, plain, QUESTIONS[1], [*IMAGES.values()], RESPONSES[0])
    assert float((expected - logits_of(plain)).abs().max()) > 0.05
    assert_close(logits_of(ours), expected, 1e-5)


def test_ranks_that_differ_between_layers_of_one_number_are_written_for_each(tmp_path: Path) -> None:
    """Decoder and tower both have a `layers.0.self_attn.q_proj`."""
    peft = pytest.importorskip("peft")
    theirs = write_lvlm(tmp_path / "base")
    plain = load_lvlm(tmp_path / "base")
    torch.manual_seed(1)
    ranks = {r"language_model\.layers\.0\.self_attn\.q_proj": 5}
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], rank_pattern=ranks, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    save_adapter(load_lvlm(tmp_path / "base", lora=tmp_path / "adapter"), tmp_path / "again")
    again = load_lvlm(tmp_path / "base", lora=tmp_path / "again")
    sizes = {name: len(layer.lora_A) for name, layer in adapters(again).items()}
    assert sizes.pop("layers.0.self_attn.q_proj") == 5 and set(sizes.values()) == {2} and len(sizes) == 4
    expected = oracle_logits(theirs, plain, QUESTIONS[1], [*IMAGES.values()], RESPONSES[0])
    assert_close(logits_of(again), expected, 1e-5)


@pytest.mark.parametrize(("kind", "tower", "layers", "count"), CASES)
def test_merging_is_adding_and_disabling_is_the_base(
    kind: str, tower: str, layers: int, count: int, tmp_path: Path
) -> None:
    write_lvlm(tmp_path / "base", kind=kind, tower=tower, **strategy_of(tower))
    plain = logits_of(load_lvlm(tmp_path / "base"))
    ours = load_lvlm(tmp_path / "base", lora=PROJECTOR.replace(tower_layers=layers))
    assert_close(logits_of(ours), plain, 1e-6)  # a new adapter changes nothing
    randomise(ours)
    adapted = logits_of(ours)
    with disable_lora(ours):
        assert_close(logits_of(ours), plain, 1e-6)
    with folded_lora(ours):
        assert_close(logits_of(ours), adapted)
    assert torch.equal(logits_of(ours), adapted)
    assert merge_lora(ours) == count and not adapters(ours)
    assert_close(logits_of(ours), adapted)
    save_lvlm(ours, tmp_path / "merged")
    assert torch.equal(logits_of(load_lvlm(tmp_path / "merged")), logits_of(ours))


# Gradients --------------------------------------------------------------------------------------------------------------


def packed_logprob(model: Any, features: ImageFeatures) -> Tensor:
    """The responses' summed log-probability, of all samples in one forest."""
    trees = [
        Tree((Segment(model.encode_prompt(question, [IMAGES[key] for key in keys])), Segment(response, 0)), keys)
        for question, keys, response in zip(QUESTIONS, KEYS, RESPONSES, strict=True)
    ]
    forest = Forest.of(trees)
    logits = model(forest, features(forest.images)) @ model.decoder.head_weight.T
    rows = [forest.target_rows(number, [1]) for number in range(len(trees))]
    index, targets = (torch.cat(column) for column in zip(*rows, strict=True))
    return logits[index].log_softmax(-1).gather(1, targets[:, None]).sum()


def in_fp64(theirs: Any, ours: Any) -> Any:
    """transformers' model in fp64: with Llama's norms, which are computed in fp32 else, and the rotary angles of ours."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = ours.decoder.rotary(position_ids[0], x.dtype)
        return cosines[None], sines[None]

    for part in theirs.modules():
        if isinstance(part, LlamaRMSNorm):
            part.forward = norm.__get__(part)
    theirs.model.language_model.rotary_emb.forward = angles
    return theirs.double()


def plain_logprob(theirs: Any, ours: Any, weights: dict[str, Tensor]) -> Tensor:
    """The same by transformers' model with these weights, from pixels, one sample after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for question, keys, response in zip(QUESTIONS, KEYS, RESPONSES, strict=True):
        prompt = ours.encode_prompt(question, [IMAGES[key] for key in keys])
        inputs = ours.vision.processor(images=[IMAGES[key] for key in keys], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        tokens = torch.from_numpy(np.concatenate([prompt, response]))[None]
        logits = torch.func.functional_call(theirs, weights, (), {"input_ids": tokens, **inputs}).logits[0]
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total = total + logps.gather(1, torch.from_numpy(response)[:, None]).sum()
    return total


@pytest.mark.parametrize("checkpoint_layers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "tower", "layers"), [("llava", "clip", 0), ("llava", "clip", 2), ("llava_next", "siglip", 1)]
)
def test_gradients_are_those_of_plain_pytorch(
    kind: str, tower: str, layers: int, checkpoint_layers: int, tmp_path: Path
) -> None:
    """In fp64, by W + alpha / r B A from pixels, without packing or stored images; one of ours was stored by decoding."""
    theirs = write_lvlm(tmp_path, kind=kind, tower=tower, **strategy_of(tower))
    ours = load_lvlm(tmp_path, dtype=torch.float64, lora=PROJECTOR.replace(tower_layers=layers))
    theirs = in_fp64(theirs, ours)
    randomise(ours)
    ours.train()
    ours.decoder.checkpoint_layers = checkpoint_layers
    features = ImageFeatures(ours, IMAGES.__getitem__)
    with torch.inference_mode():
        features(["first"])  # as by decoding
    found = packed_logprob(ours, features)
    found.backward()
    weights = {}
    for name, layer in adapters(ours).items():
        path = f"model.{name}" if name.startswith(("multi", "vision")) else f"model.language_model.{name}"
        base = dict(theirs.named_parameters())[f"{path}.weight"].detach()
        a, b = (part.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
        weights[f"{path}.weight"] = base + 5.0 / 3 * b @ a
        layer.expected = (a, b)
    expected = plain_logprob(theirs, ours, weights)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, layer in adapters(ours).items():
        for mine, other in zip((layer.lora_A, layer.lora_B), layer.expected, strict=True):
            assert mine.grad is not None and float(mine.grad.abs().max()) > 1e-6, name
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-9)
    assert [name for name, p in ours.named_parameters() if p.grad is not None and ".lora_" not in name] == []


# What is stored of an image ---------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_lvlm(tmp_path / "base")
    return tmp_path / "base"


def stored_logits(model: Any, features: ImageFeatures) -> Tensor:
    tokens = np.concatenate([model.encode_prompt(QUESTIONS[1], [*IMAGES.values()]), RESPONSES[0]])
    forest = Forest.of([Tree((Segment(tokens),), tuple(IMAGES))])
    with torch.no_grad():
        return model(forest, features(IMAGES)) @ model.decoder.head_weight.T


@pytest.mark.parametrize("config", [PROJECTOR, WITH_TOWER], ids=["projector", "tower"])
def test_stored_images_follow_each_change_of_the_adapter(config: LoRAConfig, base: Path) -> None:
    """The tower runs once an image for all states of an adapter, and again where an adapter comes or goes."""
    plain = logits_of(load_lvlm(base))
    model = load_lvlm(base)
    features = ImageFeatures(model, IMAGES.__getitem__)
    assert torch.equal(stored_logits(model, features), plain) and features.encoded == 2
    add_lora(model, config)
    assert features.missing(IMAGES) == [*IMAGES]
    for seed in range(3):
        randomise(model, seed)
        adapted = stored_logits(model, features)
        assert torch.equal(adapted, logits_of(model)) and float((adapted - plain).abs().max()) > 0.05
        with disable_lora(model):
            assert_close(stored_logits(model, features), plain, 1e-6)
        with folded_lora(model):
            assert_close(stored_logits(model, features), adapted, 1e-5)
    assert features.encoded == 4 and features.missing(IMAGES) == []
    remove_adapter(model)
    assert torch.equal(stored_logits(model, features), plain) and features.encoded == 6
    add_lora(model, config.replace(projector=False, tower_layers=0))
    assert torch.equal(stored_logits(model, features), plain) and features.encoded == 6


def test_images_that_passed_an_adapted_layer_are_refused(base: Path) -> None:
    model = load_lvlm(base)
    without = dict(zip(IMAGES, model.encode_images([*IMAGES.values()]), strict=True))
    add_lora(model, PROJECTOR)
    below_projector = dict(zip(IMAGES, model.encode_images([*IMAGES.values()]), strict=True))
    forest = Forest.of([Tree((Segment(model.encode_prompt("Why?", [IMAGES["first"]])),), ("first",))])
    with pytest.raises(SrcfastError, match=r"images: expected outputs of the tower.*found embeddings.*Fix: encode"):
        model(forest, without)
    model(forest, below_projector)
    remove_adapter(model)
    model(forest, below_projector)  # nothing above has an adapter
    add_lora(model, WITH_TOWER)
    with pytest.raises(
        SrcfastError, match=r"images: expected outputs of the tower's first 1 layers.*found.*\[2\].*Fix"
    ):
        model(forest, below_projector)


@pytest.mark.parametrize(("layers", "shape"), [(0, [1, 9, 16]), (1, [1, 10, 16])])
def test_what_is_stored_is_what_enters_the_first_adapted_layer(layers: int, shape: Sequence[int], base: Path) -> None:
    """The projector's input has no class token; of three layers the last is not used."""
    model = load_lvlm(base, lora=PROJECTOR.replace(tower_layers=layers))
    (one,) = model.encode_images([IMAGES["first"]])
    assert isinstance(one, TowerOutput) and list(one.values.shape) == shape
    assert one.passed == 2 - layers and one.nbytes == 4 * int(np.prod(shape))
    inputs: list[Tensor] = []
    module = model.vision.model.vision_tower.encoder.layers[1] if layers else model.vision.model.multi_modal_projector
    with module.register_forward_pre_hook(lambda _, given: inputs.append(given[0])), torch.no_grad():
        model.vision.model.get_image_features(model.vision.prepare(IMAGES["first"])["pixel_values"])
    assert torch.equal(inputs[0], one.values)


def test_an_image_of_several_samples_is_projected_once_a_forest(base: Path) -> None:
    model = load_lvlm(base, lora=PROJECTOR)
    rows: list[int] = []
    hook = model.vision.model.multi_modal_projector.register_forward_hook(lambda *given: rows.append(len(given[2])))
    with hook, torch.no_grad():
        packed_logprob(model, ImageFeatures(model, IMAGES.__getitem__))
    assert rows == [2]


# Types, refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "dtype"), [(None, "bfloat16"), ("nf4", "float32"), ("nf4", "bfloat16")])
def test_the_projector_computes_in_its_own_type_and_trains_in_fp32(
    quantize: str | None, dtype: str, base: Path
) -> None:
    model = load_lvlm(base, quantize=quantize, dtype=getattr(torch, dtype), lora=WITH_TOWER)
    randomise(model)
    for name in ("linear_1", "linear_2"):
        layer = model.vision.model.multi_modal_projector.get_submodule(name)
        assert layer.base.weight.dtype == getattr(torch, dtype) and layer.lora_A.dtype == torch.float32
    features = ImageFeatures(model, IMAGES.__getitem__)
    packed_logprob(model, features).backward()
    assert all(bool(parameter.grad.any()) for parameter in lora_parameters(model))
    assert features(["first"])["first"].values.dtype == getattr(torch, dtype)
    if quantize:
        with pytest.raises(InputError, match="expected a base weight"):
            merge_lora(model)


def test_the_decoder_s_adapter_is_drawn_as_without(base: Path) -> None:
    one, other = (adapters(load_lvlm(base, lora=config)) for config in (PROJECTOR.replace(projector=False), WITH_TOWER))
    # `replace` keeps the seed.
    for name, layer in one.items():
        assert torch.equal(layer.lora_A, other[name].lora_A) and layer.number == other[name].number
    added = [layer for name, layer in other.items() if name not in one]
    assert len(added) == 8
    for layer in added:
        bound = layer.base.in_features**-0.5
        assert not layer.lora_B.any() and 0.8 * bound < float(layer.lora_A.detach().abs().max()) <= bound


def test_dropout_is_of_the_decoder_alone(base: Path) -> None:
    model = load_lvlm(base, lora=WITH_TOWER.replace(dropout=0.5))
    dropouts = {name: layer.dropout for name, layer in adapters(model).items()}
    assert {dropouts.pop(name) for name in [*dropouts] if name.startswith("layers.")} == {0.5}
    assert set(dropouts.values()) == {0.0} and len(dropouts) == 8


def test_an_adapter_of_the_projector_alone_counts_as_a_change(base: Path) -> None:
    model = load_lvlm(base, lora=PROJECTOR)
    with pytest.raises(InputError, match="an adapter that changes the model"):
        check_adapter_changes(model, "adapter")
    with torch.no_grad():
        adapters(model)["multi_modal_projector.linear_2"].lora_B[0, 0] = 1.0
    check_adapter_changes(model, "adapter")


@pytest.mark.parametrize(("name", "found"), [("llava_llama", "llava with the transformers"), ("qwen2_vl", "qwen2_vl")])
def test_models_of_transformers_refuse_the_settings_and_such_adapters(name: str, found: str, tmp_path: Path) -> None:
    write_family(name, tmp_path / name)
    for config, field in ((PROJECTOR, "projector"), (WITH_TOWER.replace(projector=False), "tower_layers")):
        with pytest.raises(
            InputError, match=rf"(?s)lora\.{field}.*expected LLaVA-1\.5 or LLaVA-NeXT.*found {found}.*Fix"
        ):
            load_lvlm(tmp_path / name, backbone="transformers", lora=config)
    write_lvlm(tmp_path / "llava")
    save_adapter(load_lvlm(tmp_path / "llava", lora=PROJECTOR), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"(?s)multi_modal_projector.*expected lora_A or lora_B of a decoder layer"):
        load_lvlm(tmp_path / name, backbone="transformers", lora=tmp_path / "adapter")


def test_what_a_model_has_not_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    write_text_model(tmp_path / "text", text_config())
    with pytest.raises(InputError, match=r"(?s)lora\.tower_layers.*found a text model"):
        load_text_model(tmp_path / "text", lora=WITH_TOWER.replace(projector=False))
    with pytest.raises(InputError, match=r"(?s)lora\.tower_layers.*at most 2.*found 3"):
        load_lvlm(base, lora=WITH_TOWER.replace(tower_layers=3))


def test_an_adapter_whose_settings_leave_the_projector_out_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    save_adapter(load_lvlm(base, lora=PROJECTOR), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_modules"] = [name for name in settings["target_modules"] if "projector" not in name]
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"(?s)multi_modal_projector\.linear_1.*one adapter for each target layer"):
        load_lvlm(base, lora=tmp_path / "adapter")


def test_embeddings_of_several_layers_take_adapters_on_the_projector_alone(tmp_path: Path) -> None:
    write_lvlm(tmp_path, vision_feature_layer=[-3, -2])
    model = load_lvlm(tmp_path, lora=PROJECTOR)
    randomise(model)
    (one,) = model.encode_images([IMAGES["first"]])
    assert list(one.values.shape) == [1, 9, 32]
    assert len(logits_of(model))
    with pytest.raises(InputError, match=r"(?s)lora\.tower_layers.*one vision_feature_layer.*found \[-3, -2\]"):
        load_lvlm(tmp_path, lora=WITH_TOWER)
