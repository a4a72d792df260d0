import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # products of these sizes gain nothing from more


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()
