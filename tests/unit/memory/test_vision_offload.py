"""A vision tower that waits on the host: where its weights are, that features stay the same, and what it saves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from srcfast.config.load import load_config
from srcfast.config.settings import LoRAConfig
from srcfast.memory.forecast import forecast_training
from srcfast.memory.model_sizes import ModelSizes
from srcfast.memory.plan import policy_sizes
from srcfast.models import ImageFeatures
from srcfast.models.lora import add_lora, remove_adapter
from srcfast.stages.policy import load_model


def image(key: str) -> Image.Image:
    return Image.fromarray(np.random.default_rng(ord(key)).integers(0, 256, (72, 72, 3), dtype=np.uint8))


def test_on_the_host_itself_nothing_waits() -> None:
    whole, asked = (
        load_model(load_config(None), None),
        load_model(load_config(None, ["model.vision_offload=true"]), None),
    )
    assert ModelSizes.of(asked) == ModelSizes.of(whole)
    one, other = ([*model.encode_images([image("a")])] for model in (whole, asked))
    assert torch.equal(one[0], other[0])


def test_weights_are_on_their_device_within_and_on_the_host_after(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = load_model(load_config(None), None).vision
    weights = [parameter.data for parameter in vision.model.parameters()]
    placed: list[list[torch.Tensor]] = []
    monkeypatch.setattr(vision, "_set_weights", lambda tensors: placed.append(list(tensors)))
    vision._host_weights, vision._device = weights, torch.device("meta")  # a device that is no host, on any machine
    with pytest.raises(KeyError), vision.on_device():
        assert [[part.is_meta for part in tensors] for tensors in placed] == [[True] * len(weights)]
        raise KeyError
    assert len(placed) == 2 and all(one is other for one, other in zip(placed[1], weights, strict=True))


def test_the_tower_is_woken_for_missing_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    model = load_model(load_config(None), None)
    woken = []

    @contextmanager
    def on_device():
        woken.append(True)
        yield

    monkeypatch.setattr(model.vision, "on_device", on_device)
    features = ImageFeatures(model, image)
    features(["a", "b"])
    features(["b", "a"])
    assert len(woken) == 1
    features(["a", "c"])
    assert len(woken) == 2


def test_the_forecast_is_lower_by_the_tower_but_while_images_are_encoded() -> None:
    words = ["model.device=cuda", "model.dtype=bfloat16", "lora.r=4"]
    kept, waiting = (policy_sizes(load_config(None, [*words, f"model.vision_offload={x}"])) for x in ("false", "true"))
    tower = 2 * (kept.parameters["vision"] + kept.parameters["projector"])
    assert waiting.waiting_bytes == kept.weight_bytes - waiting.weight_bytes == tower
    from helpers.small_training import random_trees

    from srcfast.data.forest import Forest
    from srcfast.memory.activations import ForestSizes

    forest = ForestSizes.of(Forest.of(random_trees(np.random.default_rng(1), 60, 300, 60, 2)), "cuda")
    one, other = (forecast_training(sizes, forest, images=1) for sizes in (kept, waiting))
    assert one.peak - other.peak == tower  # the pass is the peak, not the images
    few = forest.times(0.001)
    one, other = (forecast_training(sizes, few, images=64) for sizes in (kept, waiting))
    assert one.peak == pytest.approx(other.peak)  # now it is the images


@pytest.mark.simulated
def test_what_a_step_reads_is_on_the_device_with_adapters_and_waits_again_without_them() -> None:
    """Adapters come and go while the tower's weights wait on the host, as in the stages of a calibration."""
    model = load_model(load_config(None, ["model.device=cuda"]), None)
    whole = {name for name, _ in model.vision.named_parameters()}
    expected = [one.cpu() for one in model.encode_images([image("a")])]

    def waiting() -> set[str]:
        return {name for name, parameter in model.vision.named_parameters() if not parameter.is_cuda}

    model.vision.to_host()
    assert waiting() == whole
    for layers in (0, 2):
        add_lora(model, LoRAConfig(r=2, projector=True, tower_layers=layers))
        read = ("model.multi_modal_projector.", *(f"model.vision_tower.encoder.layers.{3 - n}." for n in range(layers)))
        assert waiting() == {name for name in whole if not name.startswith(read)}
        (stored,) = model.encode_images([image("a")])
        torch.testing.assert_close(model.vision.project([stored])[0].cpu(), expected[0], rtol=1e-4, atol=1e-4)
        remove_adapter(model)
        assert waiting() == whole
    torch.testing.assert_close(model.encode_images([image("a")])[0].cpu(), expected[0])


@pytest.mark.parametrize("layers", [0, 2])
def test_the_forecast_counts_what_waits_beside_adapters(layers: int) -> None:
    words = ["model.device=cuda", "lora.r=4", "lora.projector=true", f"lora.tower_layers={layers}"]
    kept, waiting = (policy_sizes(load_config(None, [*words, f"model.vision_offload={x}"])) for x in ("false", "true"))
    model = load_model(load_config(None, []), None)
    read = sum(
        parameter.nbytes
        for name, parameter in model.vision.named_parameters()
        if "projector" in name or any(f"layers.{3 - n}." in name for n in range(layers))
    )
    everything = sum(parameter.nbytes for parameter in model.vision.parameters())
    assert kept.waiting_bytes == 0 and waiting.waiting_bytes == everything - read
    assert waiting.weight_bytes == kept.weight_bytes - waiting.waiting_bytes
    assert (waiting.lora, waiting.adapted_layers) == (kept.lora, layers)
    add_lora(model, LoRAConfig(r=4, projector=True, tower_layers=layers))
    found = ModelSizes.of(model)
    assert found.lora is not None and kept.lora is not None
    assert (found.lora, found.adapted_layers) == (replace(kept.lora, target_modules=found.lora.target_modules), layers)
    assert {*found.lora.target_modules} == {*kept.lora.target_modules}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_towers_memory_for_other_things() -> None:
    config = load_config(None, ["model.device=cuda", "model.dtype=bfloat16"])
    model = load_model(config, None)
    expected = model.encode_images([image("a"), image("b")])
    before = torch.cuda.memory_allocated()
    sizes = ModelSizes.of(model)
    model.vision.to_host()
    saved = before - torch.cuda.memory_allocated()
    tower = 2 * (sizes.parameters["vision"] + sizes.parameters["projector"])
    assert saved == pytest.approx(tower, rel=0.05)  # blocks of 512 bytes
    found = ImageFeatures(model, image)(["a", "b"])
    assert torch.cuda.memory_allocated() < before
    torch.testing.assert_close([found["a"], found["b"]], expected)
