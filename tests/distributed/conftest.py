import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in ("distributed", "training", "fault"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

from rank_runs import RankServer  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """What starts ranks of the command line as torchrun does, without an import for each."""
    server = RankServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
