"""Each family's checkpoint is written and loaded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from helpers.family_models import FamilyModels


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyModels]:
    """`family(name)`; its models are never changed."""
    return cache(lambda name: FamilyModels(name, tmp_path_factory.mktemp(name)))
