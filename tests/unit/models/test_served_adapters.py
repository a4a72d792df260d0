"""Written adapters have the fields and names that vLLM, SGLang and PEFT read, and no others' layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import write_family
from helpers.small_checkpoints import write_lvlm
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from srcfast.config.settings import LoRAConfig
from srcfast.models import load_lvlm
from srcfast.models.lora import save_adapter

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm")
# What vLLM and SGLang compute: https://docs.vllm.ai/en/v0.22.1/api/vllm/lora/peft_helper, sglang/srt/lora/lora_config.py
SERVED = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None}


def write_base(family: str, directory: Path) -> None:
    if family.startswith("llava"):
        write_lvlm(directory, kind=family)
    else:
        write_family(family, directory, seed=3)


def written(family: str, folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings and tensors of a new adapter."""
    write_base(family, folder / "base")
    model = load_lvlm(folder / "base", lora=LoRAConfig(r=3, alpha=7.0, **settings).seeded(4))
    save_adapter(model, folder / "adapter")
    text = (folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    return json.loads(text), load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_servers_find_the_fields_and_layers_that_they_read(family: str, tmp_path: Path) -> None:
    settings, tensors = written(family, tmp_path)
    assert {name: settings[name] for name in SERVED} == SERVED
    assert (settings["r"], settings["lora_alpha"]) == (3, 7.0)
    assert "rank_pattern" not in settings and "alpha_pattern" not in settings  # they scale all layers alike
    # A list of last parts of names: what SGLang, which refuses a regular expression, maps to its stacked layers.
    assert isinstance(settings["target_modules"], list)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    linears = {name for name, part in theirs.named_modules() if isinstance(part, torch.nn.Linear)}
    layers = set()
    for name, tensor in tensors.items():
        layer, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        layers.add(layer)
        assert name.startswith("base_model.model.") and layer in linears
        assert matrix in ("lora_A", "lora_B") and tensor.shape[0 if matrix == "lora_A" else 1] == 3
        assert layer.rsplit(".", 1)[-1] in settings["target_modules"]
    assert len(tensors) == 2 * len(layers)
    [decoder] = [name for name, part in theirs.named_modules() if part is theirs.get_decoder()]
    assert all(layer.startswith(f"{decoder}.") for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapts_the_layers_that_were_trained(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, tensors = written(family, tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    names = {name.replace(".default", "") for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert names == {*tensors}


def test_an_adapter_of_projector_and_tower_names_each_of_its_layers(tmp_path: Path) -> None:
    settings, tensors = written("llava", tmp_path, projector=True, tower_layers=1)
    layers = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in tensors}
    assert {*settings["target_modules"]} == layers and "exclude_modules" not in settings
    assert sum("vision_tower" in name for name in layers) == 6
