"""First contact, the same DPO steps by srcfast and by TRL with PEFT and bitsandbytes, where they are installed.

These are the implementations of `dpo_step` at its shapes for a GPU, with fewer steps: one checkpoint on disk, the same pairs and
adapter.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

from srcfast_benchmarks import dpo_step
from srcfast_benchmarks.contact_model import TINY_LVLM
from srcfast_benchmarks.contact_part import Case, Cases, LeftOut
from srcfast_benchmarks.contact_results import Context
from srcfast_benchmarks.harness import Shape
from srcfast_benchmarks.stage_harness import Watch

IMPLEMENTATIONS = ("TRL", "srcfast", "srcfast, references computed")
STEPS, WARM_UP = 4, 1
NEEDS = {"none": ("trl", "peft"), "nf4": ("trl", "peft", "bitsandbytes")}


def cases(context: Context) -> Cases:
    quantised = ("none",) if context.tiny else ("nf4", "none")
    return {f"{quantize}, {impl}": partial(step, quantize, impl) for quantize in quantised for impl in IMPLEMENTATIONS}


def step(quantize: str, impl: str, case: Case) -> dict[str, Any]:
    """Run the steps by one implementation. Raises LeftOut where a peer is not installed: srcfast alone compares with nothing."""
    missing = [name for name in NEEDS[quantize] if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOut(f"not installed: {', '.join(missing)}")
    shape = shape_of(case.context, quantize)
    folder = case.context.work / "peers"
    if not (folder / "pairs.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        dpo_step.prepare(shape, folder, "cuda")
    watch = Watch("cuda")
    dpo_step.BENCHMARK.implementations[impl](shape, folder, "cuda", watch)
    rounds = watch.rounds[WARM_UP:]  # srcfast reports a step while the next one runs: their sum is right, not each
    return {
        "shape": shape,
        "pairs_per_second": sum(one["units"] for one in rounds) / sum(one["seconds"] for one in rounds),
        "extra_mebibytes": watch.extra_mebibytes(),
        "losses": [one["value"] for one in watch.rounds],
    }


def shape_of(context: Context, quantize: str) -> Shape:
    if context.tiny:
        dpo_step.MODELS["tiny"], dpo_step.RESPONSES["tiny"], dpo_step.BUDGETS["tiny"] = TINY_LVLM, (7, 9), 2048
        return {"model": "tiny", "batch": 4, "steps": 3, "r": 4, "quantize": quantize, "dtype": "bfloat16"}
    shape = next(one for one in dpo_step.SHAPES["cuda"] if one["quantize"] == quantize)
    return shape | {"steps": STEPS}
