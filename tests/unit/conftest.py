"""Small models and images for all unit tests, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers.made_rows import WORDS
from helpers.seeds import fresh_rng
from helpers.small_scorer import small_tokenizer, write_text_model
from PIL import Image
from typer.testing import CliRunner


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `LlavaForConditionalGeneration` directory with random weights."""
    from srcfast.recipes.base_checkpoint import new_lvlm, train_tokenizer

    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([WORDS] * 4, 320)
    new_lvlm(directory, tokenizer, hidden_size=64, num_layers=2, vision_layers=1, seed=3)
    return directory


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of odd sizes: a.png, b.png, c.png."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(11)
    for name, size in (("a", (72, 72)), ("b", (91, 50)), ("c", (33, 120))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"{name}.png")
    return root


@pytest.fixture
def srcfast() -> Callable[..., Result]:
    """`srcfast(*words)`: the command line; `.output` holds stdout and stderr."""
    from srcfast.cli.app import app

    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A checkpoint's directory and transformers' model of it."""
    from helpers.small_lvlm import write_small_lvlm

    directory = tmp_path_factory.mktemp("small_lvlm")
    return directory, write_small_lvlm(directory)


@pytest.fixture(scope="session")
def exact(written: tuple[Path, object]):
    """The model in fp64."""
    from helpers.small_lvlm import SmallLVLM

    return SmallLVLM(written[0], torch.float64)


@pytest.fixture(scope="session")
def single(written: tuple[Path, object]):
    """The model in fp32."""
    from helpers.small_lvlm import SmallLVLM

    return SmallLVLM(written[0], torch.float32)


@pytest.fixture(scope="session")
def scorer_directory(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("scorer"), small_tokenizer())


@pytest.fixture
def rng() -> np.random.Generator:
    return fresh_rng()
