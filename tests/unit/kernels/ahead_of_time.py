"""Compile every kernel for GPUs that needn't be there, and read registers, spills and shared memory from the cubin.

    python tests/unit/kernels/ahead_of_time.py

writes resources.json, the table that test_ahead_of_time.py compares kernels with. The cases are what the launchers choose for the
shapes that models have.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srcfast_kernels.dropout import BLOCK as DROPOUT_BLOCK
from srcfast_kernels.dropout import dropout_kernel, threshold
from srcfast_kernels.gather_rows import COPIES, TILE, backward_warps, gather_rows_backward_kernel, gather_rows_kernel
from srcfast_kernels.linear_logprob import BLOCK as LOGPROB_BLOCK
from srcfast_kernels.linear_logprob import READ_BEHIND, logprob_rows_kernel
from srcfast_kernels.linear_logprob_tiled import tile_backward_kernel, tile_forward_kernel, tiles_of
from srcfast_kernels.nf4 import BLOCK as NF4_BLOCK
from srcfast_kernels.nf4 import NESTED_BLOCKSIZE, QUANTIZED_VALUES, nf4_dequantize_kernel, nf4_quantize_kernel
from srcfast_kernels.pairwise_verdict import LAUNCH as VERDICT_LAUNCH
from srcfast_kernels.pairwise_verdict import pairwise_verdict_kernel
from srcfast_kernels.rms_norm import rms_norm_backward_kernel, rms_norm_kernel, warps_of
from srcfast_kernels.rope import HEADS, rope_kernel
from srcfast_kernels.swiglu import BLOCK as SWIGLU_BLOCK
from srcfast_kernels.swiglu import swiglu_backward_kernel, swiglu_kernel
from srcfast_kernels.weighted_dpo import BLOCK as DPO_BLOCK
from srcfast_kernels.weighted_dpo import token_dpo_kernel

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # and the shared memory that a block may take, bytes
DIVISIBLE = [["tt.divisibility", 16]]  # what Triton finds of aligned pointers and of sizes that are multiples of 16


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments, and all that is constant; a pointer to nothing is a constant None."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def cases(architecture: int) -> Iterator[Case]:
    """Yield all kernels in all variants, as launched on sm_`architecture`."""
    yield from _logprob_cases()
    yield from _tiled_cases(architecture)
    for loss_type in ("sigmoid", "ipo", "hinge"):
        types = {name: "*fp32" for name in token_dpo_kernel.arg_names if name.endswith("_ptr")}
        types |= {"order_ptr": "*i64", "starts_ptr": "*i64", "arrived_ptr": "*i32", "pairs": "i32"}
        constants = {"BETA": 0.1, "LOSS_TYPE": loss_type, "ACC": tl.float32, "BLOCK": DPO_BLOCK}
        yield Case(f"token_dpo {loss_type}", token_dpo_kernel, types, constants, {"num_warps": 4})
    yield from _verdict_cases()
    yield from _nf4_cases()
    yield from _layer_cases()
    yield from _gather_cases()


def _logprob_cases() -> Iterator[Case]:
    variants = {"values": None, "frozen": "bf16", "trained": "fp32"}  # and the type of the residual that is written
    for (variant, residual), bias, capped in product(variants.items(), (False, True), (False, True)):
        types = {
            "logits_ptr": "*fp32",
            "targets_ptr": "*i64",
            "logps_ptr": "*fp32",
            "residual_ptr": f"*{residual or 'fp32'}",
        }
        types |= dict.fromkeys(("logits_stride", "residual_stride", "vocabulary", "ignore_index"), "i32")
        types |= ({"bias_ptr": "*bf16"} if bias else {}) | (
            {"coefficient_ptr": "*fp32"} if variant == "trained" else {}
        )
        constants = {
            "LOGIT_SCALE": 0.5 if capped else 1.0,
            "SOFTCAP": 30.0 if capped else 0.0,
            "HAS_BIAS": bias,
            "HAS_COEFFICIENT": variant == "trained",
            "WRITE_RESIDUAL": residual is not None,
            "ACC": tl.float32,
            "BLOCK": LOGPROB_BLOCK,
            "READ_BEHIND": READ_BEHIND,
        } | {name: None for name in ("bias_ptr", "coefficient_ptr") if name not in types}
        name = f"logprob_rows {variant}{' bias' if bias else ''}{' capped' if capped else ''}"
        yield Case(name, logprob_rows_kernel, types, constants, {"num_warps": 8})


def _tiled_cases(architecture: int) -> Iterator[Case]:
    for kernel, name, capped in product(
        (tile_forward_kernel, tile_backward_kernel), ("bf16", "fp16", "fp32"), (False, True)
    ):
        tiles = tiles_of(torch.float32 if name == "fp32" else torch.bfloat16, architecture)
        types = {"hidden_ptr": f"*{name}", "weight_ptr": f"*{name}", "targets_ptr": "*i64"}
        types |= {
            argument: "*fp32" for argument in kernel.arg_names if argument.endswith("_ptr") and argument not in types
        }
        types |= dict.fromkeys(("num_rows", "vocabulary", "size", "split_columns"), "i32")
        constants: dict[str, Any] = {
            "LOGIT_SCALE": 0.5 if capped else 1.0,
            "SOFTCAP": 30.0 if capped else 0.0,
            "HAS_BIAS": capped,
        }
        constants |= {"WHOLE": True, "ACC": tl.float32, "PRECISION": "ieee"}
        constants |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
        if not capped:
            del types["bias_ptr"]
            constants["bias_ptr"] = None
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        direction = kernel.__name__.removesuffix("_kernel")
        yield Case(f"{direction} {name}{' bias capped' if capped else ''}", kernel, types, constants, options)


def _nf4_cases() -> Iterator[Case]:
    for dtype, double_quant in product(("bf16", "fp16", "fp32"), (True, False)):
        types = {"packed_ptr": "*u8", "codes_ptr": "*fp32", "absmax_ptr": "*u8" if double_quant else "*fp32"}
        types |= {"scale_codes_ptr": "*fp32", "weight_ptr": f"*{dtype}", "num_bytes": "i32", "num_values": "i32"}
        constants: dict[str, Any] = {
            "DOUBLE_QUANT": double_quant,
            "HALF_BLOCKSIZE": 32,
            "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE,
        }
        nested = ("nested_absmax_ptr", "offset_ptr")
        types |= dict.fromkeys(nested, "*fp32") if double_quant else {}
        constants |= {} if double_quant else dict.fromkeys(nested)
        options = {"num_warps": 4, "enable_fp_fusion": False}
        name = f"nf4_dequantize {dtype}{' double' if double_quant else ''}"
        yield Case(name, nf4_dequantize_kernel, types, constants | {"BLOCK": NF4_BLOCK}, options)
    for dtype, blocksize in product(("bf16", "fp16", "fp32"), (64, 4096)):
        types = {"weight_ptr": f"*{dtype}", "packed_ptr": "*u8", "num_values": "i32"}
        types |= dict.fromkeys(("middles_ptr", "absmax_ptr"), "*fp32")
        constants = {"BLOCKSIZE": blocksize, "BLOCKS": QUANTIZED_VALUES // blocksize}
        yield Case(f"nf4_quantize {dtype} {blocksize}", nf4_quantize_kernel, types, constants, {"num_warps": 8})


def _verdict_cases() -> Iterator[Case]:
    for dtype, candidates, batched in product(("bf16", "fp16"), (8, 64), (False, True)):
        types = dict.fromkeys(("values_ptr", "p_ptr", "q_ptr", "u_ptr", "scores_ptr"), "*fp32")
        types |= dict.fromkeys(("hidden_ptr", "weight_ptr"), f"*{dtype}") | dict.fromkeys(
            ("first_ptr", "second_ptr"), "*i64"
        )
        types |= dict.fromkeys(("hidden_size", "hidden_stride", "num_pairs", "num_verdicts", "candidates"), "i32")
        constants = {"HAS_SAMPLES": batched, "SOFTCAP": 0.0, "ACC": tl.float32, "VERDICTS": 4, "CANDIDATES": candidates}
        constants |= {name: value for name, value in VERDICT_LAUNCH.items() if name != "num_warps"}
        if batched:
            types["sample_ids_ptr"] = "*i64"
        else:
            constants["sample_ids_ptr"] = None
        name = f"pairwise_verdict {dtype} {candidates}{' batched' if batched else ''}"
        yield Case(name, pairwise_verdict_kernel, types, constants, {"num_warps": VERDICT_LAUNCH["num_warps"]})


def _layer_cases() -> Iterator[Case]:
    for block in (1024, 2048, 4096, 8192):
        shared = {"ACC": tl.float32, "BLOCK": block}
        types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16", "inverse_ptr": "*fp32", "size": "i32"}
        options = {"num_warps": warps_of(block)}
        yield Case(f"rms_norm {block}", rms_norm_kernel, types, {"EPS": 1e-6} | shared, options)
        for trained in (False, True):
            types = dict.fromkeys(("gradient_ptr", "x_ptr", "weight_ptr", "grad_x_ptr"), "*bf16") | {
                "inverse_ptr": "*fp32"
            }
            types |= dict.fromkeys(("rows", "size", "rows_a_program"), "i32")
            types |= {"grad_weight_ptr": "*fp32"} if trained else {}
            constants = {"NEEDS_WEIGHT": trained} | shared | ({} if trained else {"grad_weight_ptr": None})
            name = f"rms_norm_backward {block}{' trained' if trained else ''}"
            yield Case(name, rms_norm_backward_kernel, types, constants, options)
    for half, direction in product((32, 64, 128), (1.0, -1.0)):
        types = dict.fromkeys(("x_ptr", "cos_ptr", "sin_ptr", "out_ptr"), "*bf16")
        types |= dict.fromkeys(("token_stride", "head_stride", "heads", "half"), "i32")
        constants = {"DIRECTION": direction, "ACC": tl.float32, "BLOCK_HEADS": HEADS, "BLOCK_HALF": half}
        yield Case(f"rope {half}{' back' if direction < 0 else ''}", rope_kernel, types, constants, {"num_warps": 2})
    for name, kernel, more in (
        ("swiglu", swiglu_kernel, {}),
        ("swiglu_backward", swiglu_backward_kernel, {"AGAIN": False}),
        ("swiglu_backward again", swiglu_backward_kernel, {"AGAIN": True}),
    ):
        constants = {"ACC": tl.float32, "BLOCK": SWIGLU_BLOCK} | more
        types = {
            argument: "i32" if argument == "count" else "*bf16"
            for argument in kernel.arg_names
            if argument not in constants
        }
        yield Case(name, kernel, types, constants, {})
    for dtype in ("bf16", "fp32"):
        types = {"x_ptr": f"*{dtype}", "keys_ptr": "*i64", "out_ptr": f"*{dtype}", "size": "i32", "layer": "i32"}
        constants = {"THRESHOLD": threshold(0.1), "SCALE": 1 / 0.9, "ACC": tl.float32, "BLOCK": DROPOUT_BLOCK}
        yield Case(f"dropout {dtype}", dropout_kernel, types, constants, {})


def _gather_cases() -> Iterator[Case]:
    pointers = [name for name in gather_rows_kernel.arg_names + gather_rows_backward_kernel.arg_names if "_ptr" in name]
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("index_ptr", "starts_ptr", "places_ptr"), "*i32")
    types |= dict.fromkeys(("keys_stride", "values_stride", "num_rows", "row_size"), "i32")
    for block in (128, 256, 512, 1024):  # columns: of rows from two heads of 64 on
        constants = {"ROWS": TILE // block, "BLOCK": block}
        yield _gather_case(gather_rows_kernel, types, constants, 4)
        constants = {"ACC": tl.float32, "COPIES": COPIES, "BLOCK": block}
        yield _gather_case(gather_rows_backward_kernel, types, constants, backward_warps(block))


def _gather_case(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Case:
    name = f"{kernel.__name__.removesuffix('_kernel')} {constants['BLOCK']}"
    arguments = {argument: kind for argument, kind in types.items() if argument in kernel.arg_names}
    return Case(name, kernel, arguments, constants, {"num_warps": warps})


def compile_case(case: Case, architecture: int) -> dict[str, int]:
    """Return registers a thread, bytes spilled a thread, and bytes of shared memory a block, for sm_`architecture`."""
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = {
        (index,): DIVISIBLE
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith(("stride", "size", "vocabulary", "num_bytes", "num_values", "count"))
    }
    source = ASTSource(case.kernel, signature, case.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        printed = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def resources(architecture: int) -> dict[str, dict[str, int]]:
    """Compile every case for one architecture; by name what `compile_case` returns."""
    return {case.name: compile_case(case, architecture) for case in cases(architecture)}


if __name__ == "__main__":
    table = {str(architecture): resources(architecture) for architecture in ARCHITECTURES}
    TABLE.write_text(json.dumps({"triton": triton.__version__} | table, indent=1) + "\n", encoding="utf-8")
