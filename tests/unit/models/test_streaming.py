"""Weights are quantised as they are read: to the same codes, by transformers' own conversions, and never all in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES
from helpers.family_models import FamilyModels
from helpers.live_tensors import LiveTensors
from helpers.shrunk_models import shrunk_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from srcfast.models.experts import NF4Experts
from srcfast.models.pretrained import load_pretrained
from srcfast.models.quantized import NF4Linear
from srcfast_kernels import nf4_quantize

GetFamily = Callable[[str], FamilyModels]


def linears(model: Any, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: part for name, part in model.decoder.layers.named_modules() if isinstance(part, kind)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_codes_and_other_weights_are_those_of_the_whole_model(name: str, dtype: torch.dtype, family: GetFamily) -> None:
    models = family(name)
    whole, small = models.load(dtype=dtype), models.load(dtype=dtype, quantize="nf4")
    expected, found = linears(whole, nn.Linear), linears(small, NF4Linear)
    assert found.keys() == expected.keys() and not linears(small, nn.Linear) and len(found) >= 4 * 4
    for key, linear in expected.items():
        weight = nf4_quantize(linear.weight)
        assert torch.equal(found[key].weight.packed, weight.packed) and torch.equal(
            found[key].weight.absmax, weight.absmax
        )
        assert found[key].weight.dtype == dtype
        assert linear.bias is None or torch.equal(found[key].bias, linear.bias)
    quantised = {f"decoder.layers.{key}.weight" for key in expected}
    ours, theirs = dict(small.named_parameters()), dict(whole.named_parameters())
    experts = {
        f"decoder.layers.{key}" for key, part in small.decoder.layers.named_modules() if isinstance(part, NF4Experts)
    }
    assert len(experts) == 2 * len(list({key.rpartition(".")[0] for key in experts}))
    assert ours.keys() == (theirs.keys() - quantised - experts) | {f"{key}.flat" for key in experts}
    for key in experts:
        for number, matrix in enumerate(theirs[key]):
            found_weight = small.get_submodule(key)[number].weight
            assert torch.equal(found_weight.packed, nf4_quantize(matrix).packed) and found_weight.dtype == dtype
    same = ours.keys() & theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in same)
    config = small.decoder._whole[0].config
    assert not hasattr(config, "quantization_config") and not getattr(config, "_is_quantized", False)


def test_a_model_in_four_bits_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads make is not seen here
    shrunk_model("Qwen2.5-VL-7B").to(torch.bfloat16).save_pretrained(tmp_path)
    peaks, stored = {}, {}
    for quantize in (None, "nf4"):
        config = AutoConfig.from_pretrained(tmp_path)
        with LiveTensors() as live:
            model = load_pretrained(AutoModelForImageTextToText, tmp_path, config, torch.float32, quantize=quantize)
        peaks[quantize] = live.peak
        stored[quantize] = sum(parameter.nbytes for parameter in model.parameters())
        stored[quantize] += sum(part.weight.num_bytes for part in model.modules() if isinstance(part, NF4Linear))
    largest = 704 * 256  # weights of a linear of the feed-forward
    assert peaks[None] >= stored[None] > 4 * stored["nf4"] > 0
    # One weight at a time: in fp32, and what quantising it takes for a moment.
    assert peaks["nf4"] < stored["nf4"] + 32 * largest < 0.5 * peaks[None]
