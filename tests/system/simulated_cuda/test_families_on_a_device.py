"""Calibrations of other families by the general backbone on a simulated device: as on the CPU, in whole weights and 4 bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.families import FAMILIES
from helpers.taught_family import TaughtFamily, rows

pytestmark = pytest.mark.simulated


def losses(run: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


CASES = [
    ("qwen3_vl", "nf4"),
    ("internvl", "none"),
    ("gemma4_vision", "nf4"),  # a window, two-way images, soft-capped logits, heads of two sizes
]
# The simulated device has no depthwise convolution, by which recurrent mixers begin.
RECURRENT = ("qwen3_5", "qwen3_5_moe", "lfm2", "lfm2_vl", "lfm3_vl")
ALL = [(name, quantize) for name in FAMILIES if name not in RECURRENT for quantize in ("nf4", "none")]


@pytest.mark.parametrize(
    ("name", "quantize"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL if case not in CASES)],
)
def test_a_calibration_on_a_device_is_that_of_the_cpu(name: str, quantize: str, tmp_path: Path) -> None:
    taught = TaughtFamily(name, tmp_path)
    runs = [
        taught.calibrate(device, f"model.device={device}", f"model.quantize={quantize}") for device in ("cpu", "cuda")
    ]
    pairs = [rows(run / "iteration-1" / "preferences") for run in runs]
    assert len(pairs[0]) > 2
    assert [(pair["sample_id"], pair["chosen"], pair["rejected"]) for pair in pairs[1]] == [
        (pair["sample_id"], pair["chosen"], pair["rejected"]) for pair in pairs[0]
    ]
    expected = losses(runs[0])
    assert len(expected) > 4
    # fp32, whose sums have another order on each device; steps of Adam make the differences larger.
    np.testing.assert_allclose(losses(runs[1]), expected, rtol=1e-3)
