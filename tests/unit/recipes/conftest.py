"""A base of a few steps for the tests of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from srcfast.recipes.families_base import Recipe, train_base
from srcfast.recipes.language import Stage

SMALL = Recipe(
    vocabulary_size=600,
    hidden_size=32,
    num_layers=1,
    vision_size=32,
    vision_layers=1,
    samples={"world": 12, "clips": 12, "easy_vqa": 12},
    weights={"world": 0.4, "clips": 0.3, "easy_vqa": 0.3},
    tower_epochs=1,
    tower_batch_size=8,
    language=Stage(3, 1, 2, 2, 2, 1e-3),
    reasoning=Stage(2, 1, 1, 2, 2, 1e-3),
    validation_samples=2,
)


@pytest.fixture
def small() -> Recipe:
    return SMALL


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of a few steps, trained without a stop."""
    directory = tmp_path_factory.mktemp("base")
    train_base(directory, SMALL)
    return directory
