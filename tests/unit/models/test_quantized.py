"""A decoder in 4 bits: the same as one of the dequantised weights, under an adapter too, and as bitsandbytes writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_checkpoints import assert_close, lvlm_logits, random_image, random_tokens, write_lvlm
from safetensors.torch import load_file, save_file
from torch import Tensor

from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError
from srcfast.models import LVLM, load_lvlm
from srcfast.models.lora import lora_parameters
from srcfast.models.lvlm import save_lvlm
from srcfast.models.quantized import NF4Linear
from srcfast_kernels import nf4_dequantize, nf4_quantize
from srcfast_kernels.nf4 import nf4_state_dict

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def in_a_decoder(name: str) -> bool:
    return "language_model" in name and name.rpartition(".")[0].endswith(LINEARS) and name.endswith(".weight")


def dequantised(directory: Path, target: Path) -> LVLM:
    """The checkpoint with every decoder's linear quantised and dequantised, loaded as whole weights."""
    model = load_lvlm(directory)
    for name, part in model.decoder.named_modules():
        if name.endswith(LINEARS):
            part.weight.data = nf4_dequantize(nf4_quantize(part.weight.data))
    save_lvlm(model, target)
    return load_lvlm(target, lora=LoRAConfig(r=3, alpha=32.0).seeded(1))


def logits(model: LVLM) -> Tensor:
    rng = np.random.default_rng(0)
    return lvlm_logits(model, "Which is red?", [random_image(rng, 30, 20)], random_tokens(rng, 6))


def test_a_model_in_four_bits_equals_one_of_the_dequantised_weights(tmp_path: Path) -> None:
    write_lvlm(tmp_path / "whole")
    whole = dequantised(tmp_path / "whole", tmp_path / "dequantised")
    small = load_lvlm(tmp_path / "whole", quantize="nf4", lora=LoRAConfig(r=3, alpha=32.0).seeded(1))
    quantised = [part for part in small.modules() if isinstance(part, NF4Linear)]
    assert len(quantised) == len(LINEARS) * small.decoder.config.num_layers
    results = []
    for model in (small, whole):
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter += 0.01 * torch.arange(parameter.numel()).view(parameter.shape).cos()
        embeddings = torch.randn(9, model.decoder.config.hidden_size, generator=torch.Generator().manual_seed(2))
        forest = Forest.of([Tree((Segment(np.arange(9)),))])
        model.decoder(embeddings, forest.positions, forest_attend(forest)).square().sum().backward()
        gradients = [parameter.grad for parameter in lora_parameters(model)]
        results.append((logits(model), gradients))
    assert_close(results[0][0], results[1][0], 1e-5)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert ours is not None and theirs is not None
        assert_close(ours, theirs, 1e-5)


def test_a_checkpoint_of_bitsandbytes_is_taken_over_or_dequantised(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    write_lvlm(tmp_path)
    expected = logits(load_lvlm(tmp_path, quantize="nf4"))
    file = tmp_path / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if in_a_decoder(name):
            packed, state = functional.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
            tensors |= {name: packed} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(logits(load_lvlm(tmp_path, quantize="nf4")), expected)
    assert_close(logits(load_lvlm(tmp_path)), expected, 1e-5)
    broken = next(name for name in tensors if name.endswith(".nested_absmax"))
    save_file({n: t for n, t in tensors.items() if n != broken.replace("nested_", "")}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"_proj\.weight.*NF4.*missing: absmax"):
        load_lvlm(tmp_path, quantize="nf4")


def test_a_quantised_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if in_a_decoder(name))
    state = nf4_state_dict(nf4_quantize(torch.randn(3, 5)))
    tensors |= {name: state.pop("")} | {f"{name}.{key}": part for key, part in state.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"_proj\.weight.*\[3, 5\]"):
        load_lvlm(tmp_path, quantize="nf4")


def test_scales_are_never_cast_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    model = load_lvlm(tmp_path, quantize="nf4", dtype=torch.bfloat16)
    before = logits(model)
    scales = [part.weight.nested_absmax.clone() for part in model.modules() if isinstance(part, NF4Linear)]
    model.to(torch.bfloat16).to("cpu")
    for part, scale in zip((p for p in model.modules() if isinstance(p, NF4Linear)), scales, strict=True):
        assert part.weight.nested_absmax.dtype == torch.float32 and torch.equal(part.weight.nested_absmax, scale)
    assert torch.equal(logits(model), before) and before.dtype == torch.bfloat16
    with pytest.raises(InputError, match="'quantize'.*fp4"):
        load_lvlm(tmp_path, quantize="fp4")
    with pytest.raises(InputError, match="save its adapter"):
        save_lvlm(model, tmp_path / "out")
