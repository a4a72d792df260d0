"""What adapters on projector and tower cost a step of the demo's stage 1 on the embedded base: the table in docs/models.md.

`PYTHONPATH=tests python -m helpers.vision_adapter_cost` prints it. A row is one process: 128 questions, three epochs in batches
of 8, without the first, in which images are encoded. FLOPs are those of all products, forward and backward.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.rationale_pairs import build_raps
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.lora import lora_parameters
from srcfast.stages.prompts import image_keys, image_loader
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.world.samples import world_samples

SETTINGS: tuple[tuple[bool, int], ...] = ((False, 0), (True, 0), (True, 1), (True, 2), (True, 4))
LOOP = TrainingConfig(micro_batch_size=8, gradient_accumulation_steps=1, learning_rate=2e-3, activation_checkpointing=0)
STEPS, EPOCHS = 16, 3


def linear_flops(x: Sequence[int], weight: Sequence[int], *more: object, **output: object) -> int:
    """Of oneDNN's linear, which PyTorch does not count: x [..., in], weight [out, in]."""
    return 2 * prod(x) * weight[0]


def row_of(projector: bool, layers: int) -> str:
    """A row of the table: settings, trained weights, FLOPs and processor time of a step, bytes stored of an image."""
    torch.set_num_threads(1)
    model = load_lvlm("embedded", lora=LoRAConfig(r=16, alpha=32.0, projector=projector, tower_layers=layers))
    trained = sum(parameter.numel() for parameter in lora_parameters(model))
    with tempfile.TemporaryDirectory() as folder:
        samples = world_samples("train", 8 * STEPS, 0, image_dir=Path(folder))
        features = ImageFeatures(model, image_loader(samples))
        raps, _ = build_raps(samples)
        times, works = [time.process_time()], [0]
        fine_tune_rationale(
            model,
            raps,
            LOOP.replace(epochs=EPOCHS),
            features=features,
            on_step=lambda _: times.append(time.process_time()),
        )
        counted = {torch.ops.mkldnn._linear_pointwise: linear_flops}
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            fine_tune_rationale(
                model, raps, LOOP, features=features, on_step=lambda _: works.append(counter.get_total_flops())
            )
        (key,) = image_keys(samples[0])
        stored = features([key])[key].nbytes
    seconds = median(after - before for before, after in zip(times[STEPS:], times[STEPS + 1 :], strict=False))
    work = (works[-1] - works[0]) / STEPS / 1e9
    switch = str(projector).lower()
    return f"| {switch} | {layers} | {trained:,} | {work:.2f} | {seconds:.3f} | {stored:,} |"


def table() -> str:
    """The whole table; each row by a process, one after the other."""
    rows = [
        "| `projector` | `tower_layers` | trained weights | GFLOP a step | processor seconds a step | bytes stored of an image |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for projector, layers in SETTINGS:
        command = [sys.executable, "-m", "helpers.vision_adapter_cost", str(int(projector)), str(layers)]
        rows.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return "\n".join(rows)


if __name__ == "__main__":
    print(row_of(bool(int(sys.argv[1])), int(sys.argv[2])) if sys.argv[1:] else table())
