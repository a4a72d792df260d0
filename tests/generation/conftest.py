import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A checkpoint's directory and transformers' model of it."""
    from small_lvlm import write_small_lvlm

    directory = tmp_path_factory.mktemp("small_lvlm")
    return directory, write_small_lvlm(directory)


@pytest.fixture(scope="session")
def exact(written: tuple[Path, object]):
    """The model in fp64."""
    from small_lvlm import SmallLVLM

    return SmallLVLM(written[0], torch.float64)


@pytest.fixture(scope="session")
def single(written: tuple[Path, object]):
    """The model in fp32."""
    from small_lvlm import SmallLVLM

    return SmallLVLM(written[0], torch.float32)
