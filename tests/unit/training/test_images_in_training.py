"""A training on images goes on bit for bit in 16 bits, too, where what is encoded beside an image moves its embeddings.

On a GPU where it is deterministic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import Sample
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.lora import lora_parameters
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.world.samples import world_samples

# Three steps an epoch; the images of the second epoch were encoded in the first, in other company.
SETTINGS = TrainingConfig(
    epochs=2,
    micro_batch_size=4,
    token_budget=2048,
    learning_rate=0.001,
    loader_workers=0,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
)


class Killed(Exception):
    pass


def trained(
    samples: list[Sample], dtype: torch.dtype, directory: Path, until: int = 99, device: str = "cpu"
) -> torch.Tensor:
    """The adapter after a training that begins, or goes on, with nothing in memory; it dies before step `until`."""
    model = load_lvlm("embedded", dtype=dtype, device=device, lora=LoRAConfig(r=4, alpha=8.0))
    pairs, _ = build_raps(samples, "tagged")

    def before(metrics: dict[str, Any]) -> None:
        if metrics["step"] + 1 == until:
            raise Killed

    fine_tune_rationale(
        model,
        pairs,
        SETTINGS.seeded(0, deterministic=device == "cuda"),
        features=ImageFeatures(model, image_loader(samples)),
        on_step=before,
        checkpoints=TrainingCheckpoints(directory, {}, steps=1),
    )
    return torch.cat([parameter.detach().flatten().cpu() for parameter in lora_parameters(model)])


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_bit_for_bit_in_the_second_epoch(tmp_path: Path, dtype: torch.dtype, device: str) -> None:
    samples = world_samples("train", 12, 3, image_dir=tmp_path / "images")
    undisturbed = trained(samples, dtype, tmp_path / "undisturbed", device=device)
    with pytest.raises(Killed):
        trained(samples, dtype, tmp_path / "stopped", until=5, device=device)
    assert torch.equal(trained(samples, dtype, tmp_path / "stopped", device=device), undisturbed)
