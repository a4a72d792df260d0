"""Throughput, MFU and peak memory of training steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from srcfast.data.forest import Forest
from srcfast.memory.flops import attended_in, peak_flops, training_flops
from srcfast.memory.model_sizes import decoder_shapes
from srcfast.models.protocols import HasDecoder
from srcfast.run.progress import peak_rss_bytes


class StepMeter:
    """Throughput, MFU and peak memory of training steps.

    tokens_per_second is measured by the wall clock between the reports of two steps. mfu is model FLOPs utilisation,

        MFU = necessary FLOPs of the step / (seconds of the step * peak FLOPs a second of the device)

    with the necessary FLOPs of `srcfast.memory.flops.training_flops` (nothing recomputed, no padding). Parameters of a base
    that is trained itself are added to the adapter's as a third, for they take 6 FLOPs a weight and token where 4 are counted.
    Projector and vision tower are not counted, with adapters or without.
    The peak rate is `peak_flops`, of the data sheet or measured. peak_memory_bytes is the peak of memory allocated on the GPU,
    on a CPU the peak resident memory of the process. A number that can't be known is None.

    Args:
        model: that is trained.
        head_rows: how many rows of a forest the head is applied to.
    """

    def __init__(self, model: HasDecoder, head_rows: Callable[[Forest], int]) -> None:
        weights = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        of_decoder = [(name, parameter) for name, parameter in weights if not name.startswith("vision.")]
        adapters = sum(parameter.numel() for name, parameter in of_decoder if ".lora_" in name)
        base = sum(parameter.numel() for name, parameter in weights if ".layers." in name and ".lora_" not in name)
        self.adapter_parameters = adapters + base // 3
        self.head_rows = head_rows
        self.device = weights[0][1].device
        self.shapes = decoder_shapes(model.decoder) if hasattr(model.decoder, "config") else None
        with torch.random.fork_rng(
            [self.device] if self.device.type == "cuda" else []
        ):  # a measured rate draws random numbers
            self.rate = peak_flops(self.device, model.decoder.head_weight.dtype)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._last = time.perf_counter()

    def measure(self, metrics: dict[str, Any], forests: Sequence[Forest]) -> dict[str, Any]:
        """Return a step's metrics with throughput, MFU and peak memory; called as soon as the numbers are read."""
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        flops = self._flops(forests)
        on_gpu = self.device.type == "cuda"
        return metrics | {
            "tokens_per_second": metrics["tokens"] / seconds,
            "mfu": None if flops is None else flops / seconds / self.rate,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_rss_bytes(),
        }

    def _flops(self, forests: Sequence[Forest]) -> float | None:
        if self.shapes is None:
            return None
        total = 0.0
        for forest in forests:
            host = forest.host or forest
            head_rows = self.head_rows(host)
            total += training_flops(self.shapes, host.num_tokens, attended_in(host), head_rows, self.adapter_parameters)
        return total
