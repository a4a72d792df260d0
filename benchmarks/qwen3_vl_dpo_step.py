"""DPO steps of a Qwen3-VL, on the general backbone: otherwise `dpo_step`, TRL's DPOTrainer on the same checkpoint included.

TRL takes the images through the checkpoint's own Qwen3VLProcessor (without its part for videos), as its documentation has it.
"""

from __future__ import annotations

from dataclasses import replace

from srcfast_benchmarks import dpo_step
from srcfast_benchmarks.stage_harness import main

SHAPES = {"cpu": [shape | {"model": "Qwen3-VL 6M", "steps": 8} for shape in dpo_step.SHAPES["cpu"]]}
BENCHMARK = replace(dpo_step.BENCHMARK, name="qwen3_vl_dpo_step", shapes=SHAPES)

if __name__ == "__main__":
    main(BENCHMARK)
