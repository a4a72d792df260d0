"""`kill -9` at every point of writing and at random moments, then the same command again: the same files as undisturbed."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import STAGES, Server, assert_same, finished_stages


def kill_through(server: Server, output: Path, kind: str, every: int) -> list[str]:
    """Kill at each point once, in one run that is continued each time, until it is done; returns the points."""
    seen: list[str] = []
    for _ in range(2000):
        attempt = server.run(output, {"kind": kind, "seen": seen, "every": every})
        if attempt.status == 0:
            return seen
        assert attempt.status == -signal.SIGKILL, attempt.said
        seen += attempt.points
    raise AssertionError(f"not done after {len(seen)} kills")


def test_two_undisturbed_runs_give_the_same_files(server: Server, truth: dict[str, Any], tmp_path: Path) -> None:
    assert server.run(tmp_path).status == 0
    assert_same(tmp_path / "small", truth)


@pytest.mark.parametrize("kind, every", [("kill", 47), ("tear", 13)])
def test_some_kills_at_points_of_writing_lose_nothing(
    server: Server, truth: dict[str, Any], tmp_path: Path, kind: str, every: int
) -> None:
    points = kill_through(server, tmp_path, kind, every)
    assert len(points) >= 2
    assert_same(tmp_path / "small", truth)


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["kill", "tear"])
def test_a_kill_at_every_point_of_writing_loses_nothing(
    server: Server, truth: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    points = kill_through(server, tmp_path, kind, every=1)
    print(f"{len(points)} kills, {kind}")
    assert len(points) >= (100 if kind == "kill" else 40)
    assert_same(tmp_path / "small", truth)


def strike_stages(
    server: Server, output: Path, stages: Iterable[str], seconds: dict[str, float], number: int, strikes: int
) -> Counter[str]:
    """A signal at so many random moments of each stage, in one run that is continued each time; returns the stages struck.

    Args:
        seconds: that each stage takes undisturbed.
    """
    rng, struck = random.Random(number), Counter[str]()
    expected = -number if number == signal.SIGKILL else 128 + number
    for stage in stages:
        for _ in range(strikes):
            moment = {"stage": stage, "after": rng.random() * seconds[stage], "signal": int(number)}
            attempt = server.run(output, {"kind": "moment", **moment})
            if attempt.status == 0:  # the signal came behind the last boundary of all
                break
            assert attempt.status == expected, attempt.said
            assert number == signal.SIGKILL or "The same command continues" in attempt.said
            struck[next((one for one in STAGES if one not in finished_stages(output / "small")), "page")] += 1
    assert server.run(output).status == 0
    return struck


def seconds_of(run: Path) -> dict[str, float]:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return {name: stage["seconds"] for name, stage in manifest.items()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_at_some_random_moments_lose_nothing(
    server: Server, undisturbed: Path, truth: dict[str, Any], tmp_path: Path, number: int
) -> None:
    stages = ("rationale", "iteration-1/candidates")
    assert strike_stages(server, tmp_path, stages, seconds_of(undisturbed), number, strikes=1)
    assert_same(tmp_path / "small", truth)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_at_random_moments_of_every_stage_lose_nothing(
    server: Server, undisturbed: Path, truth: dict[str, Any], tmp_path: Path, number: int
) -> None:
    struck = strike_stages(server, tmp_path, STAGES, seconds_of(undisturbed), number, strikes=4)
    assert_same(tmp_path / "small", truth)
    print(f"{struck.total()} signals {number}: {dict(struck)}")
    assert struck.total() >= 30 and len(struck) >= len(STAGES) - 1, struck
