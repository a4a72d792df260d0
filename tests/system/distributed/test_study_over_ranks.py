"""A study of two arms on two ranks gives the figures that one rank gives; stages in common are run once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.rank_runs import RankServer
from helpers.small_run import write_study

from srcfast.run.directory import RunDirectory

# Batches of one: each rank has some of the candidates and of the evaluation.
SINGLE = {"candidates": {"batch_size": 1}, "evaluation": {"batch_size": 1}}


def run(server: RankServer, ranks: int, folder: Path) -> dict[str, object]:
    """Run the study on so many ranks, and return its summary without what depends on time."""
    folder.mkdir()
    arms = {"rationale": {"settings": SINGLE | {"iterations": 0}}, "src": {"settings": SINGLE}}
    study = write_study(folder, arms, resamples=100, differences=["src - rationale"])
    attempt = server.srcfast(ranks, folder / "logs", ["study", str(study), "--output", str(folder / "result")])
    assert attempt.statuses == [0] * ranks, "\n".join(attempt.said)[-4000:]
    summary = json.loads((folder / "result" / "summary.json").read_text())
    return {name: summary[name] for name in ("arms", "differences")}


def figures(value: object) -> list[float]:
    """List the numbers of a summary in order, without seconds."""
    if isinstance(value, dict):
        return [x for name, each in value.items() if "seconds" not in name for x in figures(each)]
    if isinstance(value, list):
        return [x for each in value for x in figures(each)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_a_study_on_ranks_gives_what_one_rank_gives(server: RankServer, tmp_path: Path) -> None:
    alone, together = (run(server, ranks, tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(figures(alone)) > 20
    # On other ranks gradients are summed in another order: weights differ by rounding, answers to these three questions do not.
    assert figures(together) == pytest.approx(figures(alone), abs=1e-6)
    runs = [RunDirectory(tmp_path / "2" / "small" / f"{arm}-0").manifest() for arm in ("rationale", "src")]
    assert all(runs[0][stage] == runs[1][stage] for stage in ("base/evaluation", "rationale", "rationale/evaluation"))
