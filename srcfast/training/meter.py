"""Throughput, MFU and peak memory of training steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from srcfast.data.forest import Forest
from srcfast.memory.flops import attended_of, peak_flops, training_flops
from srcfast.memory.model_sizes import Shapes
from srcfast.run.progress import peak_rss_bytes


class StepMeter:
    """Throughput, MFU and peak memory of training steps.

    tokens_per_second counts the wall clock from one step's numbers to the next one's. mfu is model FLOPs utilisation

        MFU = necessary FLOPs of the step / (seconds of the step * FLOPs a second that the device can do)

    with the necessary FLOPs of `srcfast.memory.flops.training_flops` (nothing recomputed, no padding), an adapter's
    parameters as they are, and those of a base that is trained itself as a third: 6 FLOPs a weight and token in place of 4.
    The rate is `peak_flops`, the data sheet's or a measured one. peak_memory_bytes is the most that was allocated on the GPU,
    on a CPU the process's most resident memory. What can't be known is None.

    Args:
        model: with a `decoder`.
        head_rows: how many rows of a forest meet the head; default: all tokens below the roots.
    """

    def __init__(self, model: Any, head_rows: Callable[[Forest], int] | None = None) -> None:
        weights = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        adapters = sum(parameter.numel() for name, parameter in weights if ".lora_" in name)
        base = sum(parameter.numel() for name, parameter in weights if ".layers." in name and ".lora_" not in name)
        self.adapter_parameters = adapters + base // 3
        self.head_rows = head_rows or tokens_below_roots
        self.device = weights[0][1].device
        config = getattr(model.decoder, "config", None)
        self.shapes = None if config is None else Shapes.of(config)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # a measurement draws numbers
            self.rate = peak_flops(self.device, model.decoder.head_weight.dtype)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._last = time.perf_counter()

    def measure(self, metrics: dict[str, Any], forests: Sequence[Forest]) -> dict[str, Any]:
        """The metrics of a step whose numbers are just here, with what is measured of it."""
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        flops = self._flops(forests)
        return metrics | {
            "tokens_per_second": metrics["tokens"] / seconds,
            "mfu": None if flops is None else flops / seconds / self.rate,
            "peak_memory_bytes": self._peak_memory(),
        }

    def _flops(self, forests: Sequence[Forest]) -> float | None:
        if self.shapes is None:
            return None
        total = 0.0
        for forest in forests:
            host = forest.host or forest
            lengths, paths = host.cu_seqlens_q.diff().tolist(), host.cu_seqlens_k.diff().tolist()
            attended = sum(attended_of(path - own, own) for own, path in zip(lengths, paths, strict=True))
            total += training_flops(
                self.shapes, host.num_tokens, attended, self.head_rows(host), self.adapter_parameters
            )
        return total

    def _peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_rss_bytes()


def tokens_below_roots(forest: Forest) -> int:
    """Tokens below the roots: each has its log-probability."""
    return forest.num_tokens - sum(tree.segments[0].tokens.size for tree in forest.trees)
