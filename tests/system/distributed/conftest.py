from collections.abc import Iterator

import pytest
from helpers.rank_runs import RankServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """What starts ranks of the command line as torchrun does, without an import for each."""
    server = RankServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
