"""A sound checkpoint and adapter of a few thousand weights, images, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

WORDS = "the red green blue circle square is left of right how many what color two three yes no see think answer"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `LlavaForConditionalGeneration` directory with random weights; copy it before changing it."""
    from srcfast.recipes.base_checkpoint import new_lvlm, train_tokenizer

    directory = tmp_path_factory.mktemp("model")
    new_lvlm(directory, train_tokenizer([WORDS] * 4, 320), hidden_size=32, num_layers=1, vision_layers=1, seed=3)
    return directory


@pytest.fixture(scope="session")
def sound_adapter(sound_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the sound model."""
    from srcfast.config.settings import LoRAConfig
    from srcfast.models import load_lvlm
    from srcfast.models.lora import adapters, save_adapter

    directory, model = tmp_path_factory.mktemp("adapter"), load_lvlm(sound_model, lora=LoRAConfig(r=2, alpha=32.0))
    for layer in adapters(model).values():
        torch.nn.init.constant_(layer.lora_B, 0.01)  # one that changes nothing is refused
    save_adapter(model, directory)
    return directory


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a.png."""
    root = tmp_path / "images"
    root.mkdir()
    pixels = np.random.default_rng(11).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "a.png")
    return root


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """A file that is there only if a bomb went off."""
    return tmp_path / "witness"


@pytest.fixture
def srcfast() -> Callable[..., Result]:
    """`srcfast(*words)`: the command line; `.output` holds stdout and stderr."""
    from srcfast.cli.app import app

    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])
