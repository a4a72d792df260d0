"""Ranks that need a name of the Hub: one downloads, all have the same commit, and no rank waits for one that has failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.hub_server import Hub, use_hub
from helpers.rank_processes import run_ranks, values_of

from srcfast import distributed
from srcfast.hub.names import HubName
from srcfast.hub.pins import commits_of


def fetch_on(folder: Path) -> Any:
    """One rank's work: the stand-in's address is in a file."""
    url, repository = (folder / "hub.txt").read_text().split()
    with pytest.MonkeyPatch.context() as patch:
        use_hub(Hub(url), folder / "home", patch, token=f"rank-{distributed.rank()}")
        return commits_of([HubName("model", repository)], folder / "run", quiet=True)


def test_rank_zero_downloads_for_all(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub.txt").write_text(f"{hub.url} someone/model")
    expected = {"someone/model@main": hub.models["someone/model"].branches["main"]}
    assert values_of(run_ranks(2, fetch_on, tmp_path)) == [expected, expected]
    assert {*hub.tokens} == {"Bearer rank-0"} and len(hub.paths("GET", "/model.safetensors")) == 1


def test_where_rank_zero_fails_the_others_end_with_its_error(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub.txt").write_text(f"{hub.url} someone/none")
    first, second = run_ranks(2, fetch_on, tmp_path)
    assert "someone/none@main: expected a reply" in str(first["error"])
    assert "rank 0 has failed" in str(second["error"]) and "status 404" in str(second["error"])
