"""Images are encoded without a wait for the device, and as transformers encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_cuda
import torch
from helpers.small_checkpoints import random_image, text_config, write_lvlm
from transformers import LlavaNextModel

from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.vision import TiledSight


def images() -> dict[str, Any]:
    """Of several shapes, and so of several numbers of tiles in LLaVA-NeXT."""
    rng = np.random.default_rng(0)
    return {f"image-{n}": random_image(rng, 30 + 23 * n, 60 - 11 * n) for n in range(4)}


def test_tiles_are_put_together_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lvlm(tmp_path, kind="llava_next")
    model = load_lvlm(tmp_path)
    ours = model.encode_images(list(images().values()))
    monkeypatch.setattr(TiledSight, "pack_image_features", LlavaNextModel.pack_image_features)
    theirs = model.encode_images(list(images().values()))
    assert len({len(one) for one in ours}) > 1
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.simulated
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("kind", "tower"), [("llava", "clip"), ("llava", "siglip"), ("llava_next", "clip")])
def test_images_are_encoded_without_a_wait(tmp_path: Path, kind: str, tower: str, offload: bool) -> None:
    write_lvlm(tmp_path, kind=kind, tower=tower, text=text_config(hidden_size=32, head_dim=8))
    found = {}
    for device in ("cuda", "cpu"):
        model = load_lvlm(tmp_path, device=device)
        if offload:
            model.vision.to_host()
        features = ImageFeatures(model, images().__getitem__, batch_size=3)
        with simulated_cuda.recording() as record:
            found[device] = features(images())
        assert not record.waits and not record.pageable_copies and not record.event_waits, record.text()
    for key, value in found["cuda"].items():
        torch.testing.assert_close(simulated_cuda.host(value), found["cpu"][key], rtol=1e-4, atol=1e-4)
