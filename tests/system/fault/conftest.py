"""One undisturbed run gives the truth; a server that has everything imported forks the disturbed ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import ADAPTERS, STAGES, Server, finished_stages, result_of


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("fault"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing befell."""
    output = tmp_path_factory.mktemp("undisturbed")
    attempt = server.run(output)
    assert attempt.status == 0, attempt.said
    assert tuple(finished_stages(output / "small")) == STAGES
    for adapter in ADAPTERS:
        assert (output / "small" / adapter / "adapter_model.safetensors").stat().st_size > 10_000
    return output / "small"


@pytest.fixture(scope="session")
def truth(undisturbed: Path) -> dict[str, Any]:
    return result_of(undisturbed)
