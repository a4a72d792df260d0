"""First contact, every operation's benchmark at one shape: srcfast's implementations first, then its peers.

All implementations run in one process, which saves starting others. `srcfast bench --device cuda` runs all shapes, each
implementation in a process.
"""

from __future__ import annotations

import importlib
import os
from functools import partial
from typing import Any

from srcfast_benchmarks import BENCHMARKS, harness
from srcfast_benchmarks.contact_part import Case, Cases
from srcfast_benchmarks.contact_results import Context
from srcfast_benchmarks.harness import Benchmark, Shape, measure

# Index into the benchmark's list of shapes for a GPU; the last shape where the benchmark is not listed here.
HEADLINES = {"nf4": 1, "nf4_linear": 1, "forest_attention": 0}
# Small enough for Triton's interpreter.
TINY: dict[str, Shape] = {
    "linear_logprob": {"rows": 5, "hidden_size": 8, "vocabulary": 33, "dtype": "float32"},
    "weighted_dpo": {"pairs": 2, "tokens": 3, "hidden_size": 8, "vocabulary": 33, "dtype": "float32"},
    "pairwise_verdict": {"samples": 2, "candidates": 3, "hidden_size": 8, "dtype": "float32"},
    "nf4": {"out": 8, "in": 64, "dtype": "float32"},
    "nf4_linear": {"rows": 3, "in": 64, "out": 8, "dtype": "float32"},
    "lora_linear": {"tokens": 5, "hidden_size": 16, "rank": 2, "dtype": "float32"},
    "lora_mlp": {"tokens": 5, "hidden_size": 16, "intermediate_size": 24, "rank": 2, "dtype": "float32"},
    "rms_norm": {"tokens": 5, "hidden_size": 16, "dtype": "float32"},
    "rope": {"tokens": 5, "heads": 2, "head_size": 8, "dtype": "float32"},
    "swiglu": {"tokens": 5, "intermediate_size": 16, "dtype": "float32"},
    "forest_attention": {
        "trees": 2, "prompt": 7, "children": 2, "response": 3, "heads": 2, "head_size": 8, "dtype": "float32"
    },
}  # fmt: skip


def cases(context: Context) -> Cases:
    """One case for each operation but packing, which runs on the host."""
    if context.simulated:
        os.environ.pop("SRCFAST_KERNELS", None)  # Triton's kernels, through its interpreter
        harness.LEAST_SECONDS = 0.0
    harness.GPU_MILLISECONDS = 100
    return {name: partial(operation, name) for name in BENCHMARKS if name != "packing"}


def operation(name: str, case: Case) -> dict[str, Any]:
    """Measure times and memory of all implementations at one shape. A peer that fails is stored with its error."""
    benchmark: Benchmark = importlib.import_module(f"srcfast_benchmarks.{name}").BENCHMARK
    shape = TINY[name] if case.context.tiny else benchmark.shapes["cuda"][HEADLINES.get(name, -1)]
    first = next(iter(benchmark.implementations))
    order = sorted(benchmark.implementations, key=lambda impl: (not impl.startswith("srcfast"), impl != first))
    results: dict[str, dict[str, Any]] = {}
    for impl in order:
        try:
            results[impl] = measure(benchmark, impl, shape, "times", "cuda")
            if "left_out" not in results[impl]:
                results[impl] |= measure(benchmark, impl, shape, "memory", "cuda")
        except Exception as error:
            results[impl] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            if impl == "srcfast":
                raise
        # `ways`: the key in stored results.
        case.store(shape=shape, ways=results, first=first, limits=benchmark.limits)
    return {}
