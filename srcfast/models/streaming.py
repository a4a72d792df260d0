"""Weights on their way from a checkpoint's files: cast, quantised and put on the device one by one.

transformers reads, renames, merges and splits the tensors of the files. What it makes of them, a parameter at a time, it hands to
quantisers (`HfQuantizer`); this one puts each where it stays. So the host holds what remains there and one parameter, beside the
files' pages, which the system drops where it needs memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from srcfast.errors import InputError
from srcfast.models.checkpoint import check_finite
from srcfast.models.experts import NF4Experts, expert_parameters, replace_experts
from srcfast.models.quantized import NF4Linear, plain_linears
from srcfast.models.transformers_decoder import text_model

METHOD = "srcfast"  # its name in transformers


@register_quantization_config(METHOD)
class Streaming(QuantizationConfigMixin):
    """How a checkpoint's weights are read, and what was found of them.

    Args:
        path: of the checkpoint.
        device: where the weights go.
        nf4: whether the linears of the language model's blocks are quantised.
        shard: whether the weights return to the host, those in 4 bits as rows that can be sharded.

    Attributes:
        checked: names of the parameters that were seen to be finite.
        error: what was raised first: transformers goes on, and words an error of its own.
    """

    def __init__(self, path: Path, device: str | torch.device, nf4: bool, shard: bool = False) -> None:
        self.quant_method: Any = METHOD
        self.path, self.device, self.nf4, self.shard = path, torch.device(device), nf4, shard
        self.checked: set[str] = set()
        self.error: Exception | None = None

    @contextmanager
    def reading(self, config: Any) -> Iterator[dict[str, Any]]:
        """Yield `from_pretrained`'s arguments, raise what was raised while it read, and leave no trace in the model's config."""
        needed = self.nf4 or self.device.type != "cpu"
        try:
            yield {"quantization_config": self} if needed else {}
        except Exception as error:
            raise self.error or error from None
        finally:
            if getattr(config, "quantization_config", None) is self:
                del config.quantization_config
        if self.error is not None:
            raise self.error


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    """Quantises the blocks' linears, and moves all other parameters of the model's dtype."""

    is_serializable = is_trainable = False

    def __init__(self, quantization_config: Streaming, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.settings = quantization_config
        self.linears: set[str] = set()  # names of their weights
        self.experts: set[str] = set()  # names of parameters of several experts
        self.quantised: dict[str, NF4Linear] = {}
        self.quantised_experts: dict[str, NF4Experts] = {}
        self.dtype: torch.dtype | None = None

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **options: Any) -> None:
        self.dtype = dtype
        if self.settings.nf4:
            layers = text_model(model).layers
            blocks = {id(linear.weight) for linear in plain_linears(layers)}
            experts = {id(getattr(module, name)) for module, name in expert_parameters(layers)}
            self.linears = {name for name, parameter in model.named_parameters() if id(parameter) in blocks}
            self.experts = {name for name, parameter in model.named_parameters() if id(parameter) in experts}

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Return whether a parameter passes through `convert`: others are of another dtype than the model's."""
        return (
            param_name in self.linears | self.experts or model.get_parameter_or_buffer(param_name).dtype == self.dtype
        )

    def get_quantize_ops(self) -> ConversionOps:
        return _Convert(self)

    def store(self, model: Any, name: str, value: Tensor) -> Tensor:
        """Check a weight and return it on its device; of one to quantise, its codes.

        Raises:
            InputError: it is not finite, or of another shape than the model's.
        """
        check_finite(value, self.settings.path, name)
        self.settings.checked.add(name)
        if (shape := model.get_parameter_or_buffer(name).shape) != value.shape:
            expected, found = f"no mismatched tensors, shape {list(shape)}", list(value.shape)
            raise InputError(file=self.settings.path, field=name, expected=expected, found=found)
        if name in self.experts:
            self.quantised_experts[name] = self._quantise_experts(value)
            return self.quantised_experts[name].flat
        if name not in self.linears:
            return value if self.settings.shard else value.to(self.settings.device)
        small = self.quantised[name] = self._quantise(model.get_submodule(name.rpartition(".")[0]), value)
        if small.flat is not None:
            return small.flat
        assert small.weight is not None
        return small.weight.packed

    def _quantise(self, linear: Any, value: Tensor) -> NF4Linear:
        """Return a linear's weight in 4 bits."""
        small = NF4Linear(linear.in_features, linear.out_features, False, self.settings.shard)
        small.set_weight(value.detach().to(self.settings.device))
        return small

    def _quantise_experts(self, value: Tensor) -> NF4Experts:
        """Return experts' weights in 4 bits."""
        small = NF4Experts(value, self.settings.device)
        return small.to("cpu") if self.settings.shard else small

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        for name in self.experts:
            module, _, last = name.rpartition(".")
            parent = model.get_submodule(module)
            small = self.quantised_experts.get(name) or self._quantise_experts(getattr(parent, last))
            replace_experts(parent, last, small)
            self.settings.checked.add(f"{name}.flat")
        for name in self.linears:
            module = name.rpartition(".")[0]
            parent, _, last = module.rpartition(".")
            linear = model.get_submodule(module)
            # Not there: made beside one that is not quantised, or missing, which the report says.
            small = self.quantised.get(name) or self._quantise(linear, linear.weight)
            small.bias = linear.bias
            self.settings.checked.add(f"{module}.flat")  # words of codes, which need not be numbers
            setattr(model.get_submodule(parent), last, small)
        # From here on it is a model like any other.
        del model.hf_quantizer, model.config.quantization_config, model.quantization_method
        for part in model.modules():
            if hasattr(part, "config"):
                part.config._is_quantized = False
        model.is_quantized = False


class _Convert(ConversionOps):
    """What transformers calls with each parameter, or with several that it made of one tensor."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: Mapping[str, Any], model: Any = None, **options: Any) -> dict[str, nn.Parameter]:  # type: ignore[override]
        values = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        try:
            stored = {name: self.quantizer.store(model, name, value) for name, value in values.items()}
        except Exception as error:
            self.quantizer.settings.error = self.quantizer.settings.error or error
            raise
        return {name: nn.Parameter(value, requires_grad=False) for name, value in stored.items()}
