"""Steps of rationale fine-tuning: srcfast against TRL's SFTTrainer, from the same adapter, on the same batches.

The loss is that of the responses' tokens alone, averaged over a batch's tokens; both must give the same.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from srcfast_benchmarks.candidates import read_samples
from srcfast_benchmarks.dpo_step import (
    SHAPES,
    in_file_order,
    load_policy,
    prepare,
    settings_of,
    trl_trainer,
)
from srcfast_benchmarks.harness import Shape
from srcfast_benchmarks.stage_harness import StageBenchmark, Watch, main


def srcfast(shape: Shape, folder: Path, device: str, watch: Watch, *, checkpointing: int = 0) -> None:
    from srcfast.data.rationale_pairs import build_raps
    from srcfast.models import ImageFeatures
    from srcfast.stages.prompts import image_loader
    from srcfast.stages.rationale import fine_tune_rationale

    model = load_policy(shape, folder, device)
    samples = in_file_order(read_samples(folder), shape)
    raps, dropped = build_raps(samples)
    assert not dropped, dropped
    watch.start()
    fine_tune_rationale(
        model,
        raps,
        settings_of(shape, checkpointing),
        features=ImageFeatures(model, image_loader(samples)),
        on_step=lambda metrics: watch.lap(shape["batch"], metrics["tokens"], metrics["loss"]),
    )


def trl(shape: Shape, folder: Path, device: str, watch: Watch, **options: Any) -> None:
    from trl import SFTConfig, SFTTrainer

    from srcfast.data.rationale_pairs import build_raps

    rows = [
        {
            "images": [str(sample.image_root / name) for name in sample.images],
            "prompt": [{"role": "user", "content": sample.question}],
            "completion": [{"role": "assistant", "content": response}],
        }
        for sample, response in build_raps(read_samples(folder))[0]
    ]
    trl_trainer(shape, folder, device, watch, SFTTrainer, SFTConfig, rows, completion_only_loss=True, **options).train()


BENCHMARK = StageBenchmark(
    name="rationale_step",
    unit="samples",
    shapes=SHAPES,
    prepare=prepare,
    implementations={
        "TRL": trl,
        "TRL, no checkpointing": partial(trl, gradient_checkpointing=False),
        "srcfast": srcfast,
        "srcfast, checkpointing": partial(srcfast, checkpointing=1),  # every layer recomputed, as TRL does by default
    },
    headline="srcfast",
    warm_up=2,
    tolerance=1e-4,
)

if __name__ == "__main__":
    main(BENCHMARK)
