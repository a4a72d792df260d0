"""The seed of every random draw of a test: that of the run, which pytest prints first, and the test's name."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch

VARIABLE = "SRCFAST_TEST_SEED"  # another number gives each test other inputs


def run_seed() -> int:
    """The run's seed: that of the environment variable, else 0."""
    return int(os.environ.get(VARIABLE, "0"))


def seed_everything(name: str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch by the run's seed and a test's name."""
    digest = hashlib.sha256(f"{run_seed()}/{name}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def fresh_rng() -> np.random.Generator:
    """A generator whose numbers follow from the test's seed."""
    return np.random.default_rng(random.getrandbits(64))
