"""A running stand-in of the Hub, and a small repository on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import FILES, SECRET, Hub, Repository, hub_server, use_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which this process's huggingface_hub uses, with an empty cache and a token."""
    with hub_server() as running:
        use_hub(running, tmp_path / "home", monkeypatch, SECRET)
        running.models["someone/model"] = Repository()
        running.models["someone/model"].commit(FILES)
        yield running
