"""Candidates of a Qwen3-VL, on the general backbone: otherwise `candidates`, transformers' `generate` included."""

from __future__ import annotations

from dataclasses import replace

from srcfast_benchmarks import candidates
from srcfast_benchmarks.stage_harness import main

SHAPES = {"cpu": [shape | {"model": "Qwen3-VL 6M"} for shape in candidates.SHAPES["cpu"]]}
BENCHMARK = replace(candidates.BENCHMARK, name="qwen3_vl_candidates", shapes=SHAPES)

if __name__ == "__main__":
    main(BENCHMARK)
