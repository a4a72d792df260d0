"""A merged checkpoint has its base's types: what the merge doesn't touch is byte-equal, and config.json says the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.families import write_family
from helpers.small_checkpoints import write_lvlm
from safetensors.torch import load_file, save_file
from torch import Tensor

from srcfast.config.settings import LoRAConfig
from srcfast.models.lora import lora_parameters, save_adapter
from srcfast.models.lvlm import load_lvlm
from srcfast_kernels.nf4 import nf4_dequantize, nf4_quantize, nf4_state_dict

Srcfast = Callable[..., Result]
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MATRIX = ("q_proj.weight", "v_proj.weight")


def write_base(directory: Path, family: str, cast: Callable[[str, Tensor], Tensor], said: str) -> dict[str, Tensor]:
    """Write a base whose weights are cast, and whose config says `said`; return the weights."""
    write_lvlm(directory, seed=3) if family == "llava" else write_family(family, directory, seed=3)
    file = directory / "model.safetensors"
    tensors = {name: cast(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    say(directory, said)
    return tensors


def say(directory: Path, dtype: str, **more: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)):
        part["dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config | more))


def said(directory: Path) -> set[str]:
    config = json.loads((directory / "config.json").read_text())
    parts = (config, *(value for value in config.values() if isinstance(value, dict)))
    return {part["dtype"] for part in parts if part.get("dtype")}


def write_adapter(base: Path, directory: Path) -> dict[str, Tensor]:
    """Write an adapter of two kinds of matrices; return its change of each, by the end of the weight's name."""
    model = load_lvlm(base, lora=LoRAConfig(r=3, alpha=7.0, target_modules=("q_proj", "v_proj")).seeded(4))
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_adapter(model, directory)
    stored = load_file(directory / "adapter_model.safetensors")
    changes = {}
    for name, lora_a in stored.items():
        if name.endswith("lora_A.weight"):
            lora_b = stored[name.replace("lora_A", "lora_B")]
            end = name[name.index("layers.") :].replace("lora_A.weight", "weight")
            changes[end] = 7.0 / 3 * (lora_b.double() @ lora_a.double())
    assert len(changes) >= 4
    return changes


def merged(srcfast: Srcfast, base: Path, out: Path, *words: str) -> dict[str, Tensor]:
    done = srcfast("merge", "--model", base, "--adapter", base.parent / "adapter", "--output", out, *words)
    assert done.exit_code == 0, done.output
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def end_of(name: str) -> str:
    """The name of a weight without what the two layouts of LLaVA's have before it."""
    for prefix in ("model.", "language_model.model.", "language_model."):
        name = name.removeprefix(prefix)
    return name


def assert_merged(found: dict[str, Tensor], base: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    ours = {end_of(name): tensor for name, tensor in found.items()}
    assert ours.keys() == {end_of(name) for name in base}
    touched = 0
    for name, tensor in base.items():
        new = ours[end_of(name)]
        assert new.dtype == tensor.dtype, name
        change = next((c for end, c in changes.items() if name.endswith(end) and "vision" not in name), None)
        if change is None:
            assert new.view(torch.uint8).equal(tensor.view(torch.uint8)), name
        else:
            touched += 1
            exact = tensor.double() + change
            # Rounded once from fp32, which is itself within 2^-22 of the exact sum's largest terms.
            bound = torch.finfo(tensor.dtype).eps * exact.abs() + 2e-6
            assert ((new.double() - exact).abs() <= bound).all(), name
    assert touched == len(changes)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("stored", TYPES)
def test_weights_and_config_have_the_base_s_type(srcfast: Srcfast, tmp_path: Path, family: str, stored: str) -> None:
    base = write_base(tmp_path / "base", family, lambda name, tensor: tensor.to(TYPES[stored]), stored)
    changes = write_adapter(tmp_path / "base", tmp_path / "adapter")
    assert_merged(merged(srcfast, tmp_path / "base", tmp_path / "out"), base, changes)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_base_of_several_types_keeps_each(srcfast: Srcfast, tmp_path: Path, family: str) -> None:
    def cast(name: str, tensor: Tensor) -> Tensor:
        return tensor if "norm" in name else tensor.to(torch.float16 if "visual" in name else torch.bfloat16)

    base = write_base(tmp_path / "base", family, cast, "bfloat16")
    assert len({tensor.dtype for tensor in base.values()}) > 1
    changes = write_adapter(tmp_path / "base", tmp_path / "adapter")
    assert_merged(merged(srcfast, tmp_path / "base", tmp_path / "out"), base, changes)
    assert said(tmp_path / "out") == {"bfloat16"}


def test_a_base_of_the_older_layout_keeps_its_types(srcfast: Srcfast, tmp_path: Path) -> None:
    def older(name: str) -> str:
        if name.startswith("model.language_model."):
            return name.replace("model.language_model.", "language_model.model.")
        return f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")

    base = write_base(
        tmp_path / "base", "llava", lambda name, t: t if "norm" in name else t.to(torch.bfloat16), "bfloat16"
    )
    renamed = {older(name): tensor for name, tensor in base.items()}
    save_file(renamed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    changes = write_adapter(tmp_path / "base", tmp_path / "adapter")
    assert_merged(merged(srcfast, tmp_path / "base", tmp_path / "out"), renamed, changes)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("asked", TYPES)
def test_a_type_that_the_user_asks_for_is_written_and_said(
    srcfast: Srcfast, tmp_path: Path, family: str, asked: str
) -> None:
    write_base(tmp_path / "base", family, lambda name, tensor: tensor.to(torch.bfloat16), "bfloat16")
    write_adapter(tmp_path / "base", tmp_path / "adapter")
    found = merged(srcfast, tmp_path / "base", tmp_path / "out", f"model.dtype={asked}")
    assert {tensor.dtype for tensor in found.values()} == {TYPES[asked]}
    assert said(tmp_path / "out") == {asked}


def test_a_config_that_says_another_type_than_the_weights_is_put_right(srcfast: Srcfast, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llava", lambda name, tensor: tensor.to(torch.float16), "float32")
    changes = write_adapter(tmp_path / "base", tmp_path / "adapter")
    assert_merged(merged(srcfast, tmp_path / "base", tmp_path / "out"), base, changes)
    assert said(tmp_path / "out") == {"float16"}


def test_the_types_of_another_program_s_section_stay(srcfast: Srcfast, tmp_path: Path) -> None:
    """As SmolVLM's config has them."""
    write_base(tmp_path / "base", "llava", lambda name, tensor: tensor.to(torch.bfloat16), "bfloat16")
    others = {"dtype": {"decoder_model_merged": "q4"}}
    say(tmp_path / "base", "bfloat16", **{"transformers.js_config": others})
    write_adapter(tmp_path / "base", tmp_path / "adapter")
    merged(srcfast, tmp_path / "base", tmp_path / "out", "model.dtype=float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["transformers.js_config"]) == ("float32", others)


def test_a_base_in_4_bits_becomes_whole_and_no_longer_says_that_it_is_quantised(
    srcfast: Srcfast, tmp_path: Path
) -> None:
    whole = write_base(tmp_path / "base", "llava", lambda name, tensor: tensor.to(torch.bfloat16), "bfloat16")
    tensors, expected = {}, {}
    for name, tensor in whole.items():
        expected[name] = tensor
        if name.endswith("_proj.weight") and "language_model" in name:
            state = nf4_state_dict(quantised := nf4_quantize(tensor))
            tensors |= {name: state.pop("")} | {f"{name}.{key}": part.clone() for key, part in state.items()}
            expected[name] = nf4_dequantize(quantised).to(torch.bfloat16)
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    say(tmp_path / "base", "bfloat16", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    changes = write_adapter(tmp_path / "base", tmp_path / "adapter")
    assert_merged(merged(srcfast, tmp_path / "base", tmp_path / "out"), expected, changes)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    done = srcfast(
        "merge",
        "--model",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "x",
        "quantize=nf4",
    )
    assert done.exit_code == 2 and not (tmp_path / "x").exists()
