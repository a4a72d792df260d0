"""One of four ranks is killed, stopped or fails: the others end by an error that names it, and the same command continues.

Two runs on four ranks give the same files byte for byte, although pieces of work go to whoever is free; so do runs that were
killed in between, and those whose stages in pieces were continued on another number of ranks.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.rank_runs import RankAttempt, RankServer
from helpers.small_run import STAGES, assert_same, finished_stages, result_of
from safetensors.numpy import load_file

RANKS = 4
TIMEOUT = 8  # least seconds that a rank waits for another
SLACK = 120.0  # seconds in which the processes then end, on a machine that is busy
# Stages in pieces before the preference tuning: which rank did what changes no byte. Training's sums do, by rounding.
ANY_RANKS = ("rationale/evaluation", "iteration-1/candidates", "iteration-1/headroom", "iteration-1/scores")
ROUND = ("candidates", "scores", "preferences")


@pytest.fixture(scope="module")
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def together(rank_server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on four ranks that nothing befell."""
    output = tmp_path_factory.mktemp("together")
    done(rank_server, RANKS, output)
    assert tuple(finished_stages(output / "small")) == STAGES
    return output / "small"


@pytest.fixture(scope="module")
def timeout(together: Path) -> int:
    """Seconds that a rank waits for another: as long as half a run takes on this machine, as busy as it is."""
    return max(TIMEOUT, round(sum(seconds_of(together).values()) / 2))


@pytest.fixture(scope="module")
def truth(together: Path) -> dict[str, Any]:
    return result_of(together)


def done(server: RankServer, ranks: int, output: Path) -> None:
    attempt = server.run_ranks(ranks, output)
    assert attempt.statuses == [0] * ranks, "\n".join(attempt.said)


def after_stage_1(run: Path, output: Path) -> Path:
    """A copy of the run as it was before its round."""
    copy = output / run.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "iteration-1")
    entries = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({name: entries[name] for name in STAGES[:3]}), encoding="utf-8")
    return copy


def adapter_of(run: Path, adapter: str) -> np.ndarray:
    tensors = load_file(run / adapter / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def assert_others_end(attempt: RankAttempt, victim: int, timeout: int, always_named: bool) -> None:
    """By themselves and in time, with an error that names the rank or, unless it is always named, its closed connection."""
    assert attempt.seconds is not None and attempt.seconds < timeout + SLACK, attempt
    for rank, (status, said) in enumerate(zip(attempt.statuses, attempt.said, strict=True)):
        if rank == victim:
            continue
        assert status == 1, f"rank {rank}, status {status}: {said}"
        named = said.rpartition("timed out waiting for ")[2].partition(":")[0]  # `rank 1, 3`
        words = said.rpartition("timed out waiting for ")[2].lower()
        heard = not always_named and ("connection" in words or "reset by peer" in words)
        assert str(victim) in named.removeprefix("rank ").split(", ") or heard, f"rank {rank}: {said}"


def strike_ranks(
    server: RankServer,
    output: Path,
    stages: Iterable[str],
    seconds: dict[str, float],
    strikes: int,
    seed: int,
    timeout: int,
    behind: int = 0,
) -> Counter[str]:
    """One rank is killed at so many random moments of each stage; then the run is finished. Returns the stages struck.

    Each second time the others are left to themselves, else stopped as torchrun does it.

    Args:
        seconds: that each stage takes undisturbed.
        timeout: seconds that a rank waits for another where no agent ends it.
        behind: units of its work that a stage has done before any moment.
    """
    rng, struck = random.Random(seed), Counter[str]()
    for stage in stages:
        for strike in range(strikes):
            agent = strike % 2 == 1
            ranks, victim = RANKS, rng.randrange(RANKS)
            if agent and stage in ANY_RANKS:
                ranks = rng.choice((2, 3))
                victim = rng.randrange(ranks)
            after = rng.random() * seconds[stage]
            fault = {"kind": "moment", "stage": stage, "after": after, "behind": behind, "signal": signal.SIGKILL}
            attempt = server.run_ranks(
                ranks, output, 600 if agent else timeout, victim=victim, fault=fault, agent=agent
            )
            assert attempt.statuses[victim] == -signal.SIGKILL, "\n".join(attempt.said)
            if agent:
                assert attempt.seconds is not None and attempt.seconds < SLACK, attempt
            else:
                assert_others_end(attempt, victim, timeout, always_named=False)
            struck[next(one for one in STAGES if one not in finished_stages(output / "small"))] += 1
    done(server, RANKS, output)
    return struck


def seconds_of(run: Path) -> dict[str, float]:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return {name: stage["seconds"] for name, stage in manifest.items()}


@pytest.mark.slow
def test_one_of_four_ranks_killed_at_a_random_moment_loses_nothing(
    rank_server: RankServer, truth: dict[str, Any], timeout: int, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    # In the midst of a training of 36 steps, so that it goes on from a checkpoint.
    seconds, options = {"rationale": 0.2}, {"strikes": 1, "seed": seed, "timeout": timeout, "behind": 9}
    struck = strike_ranks(rank_server, tmp_path, ["rationale"], seconds, **options)
    assert struck == {"rationale": 1}
    assert_same(tmp_path / "small", truth)


@pytest.mark.fault
def test_one_of_four_ranks_killed_at_random_moments_of_every_stage_loses_nothing(
    rank_server: RankServer, together: Path, truth: dict[str, Any], timeout: int, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    seconds = seconds_of(together)
    struck = strike_ranks(rank_server, tmp_path, STAGES, seconds, strikes=2, seed=seed, timeout=timeout)
    assert_same(tmp_path / "small", truth)
    assert struck == dict.fromkeys(STAGES, 2)  # no stage is entered as finished without the rank that was killed


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGUSR1], ids=["hangs", "raises"])
@pytest.mark.parametrize("stage", ["rationale", "iteration-1/candidates"])
def test_one_of_four_ranks_that_hangs_or_raises_ends_the_others(
    rank_server: RankServer, together: Path, timeout: int, tmp_path: Path, stage: str, how: signal.Signals
) -> None:
    if stage != "rationale":
        after_stage_1(together, tmp_path)
    victim = random.randrange(RANKS)
    after = random.random() * min(seconds_of(together)[stage], timeout / 2)
    fault = {"kind": "moment", "stage": stage, "after": after}
    attempt = rank_server.run_ranks(RANKS, tmp_path, timeout, victim=victim, fault=fault | {"signal": how})
    assert attempt.statuses[victim] == (-signal.SIGKILL if how == signal.SIGSTOP else 1), "\n".join(attempt.said)
    assert stage not in finished_stages(tmp_path / "small")
    assert_others_end(attempt, victim, timeout, always_named=how == signal.SIGSTOP)
    if how == signal.SIGUSR1:
        assert "RankFailed: a rank that fails" in attempt.said[victim]


@pytest.mark.slow
def test_one_rank_gives_the_round_of_four_from_the_same_adapter(
    rank_server: RankServer, together: Path, truth: dict[str, Any], tmp_path: Path
) -> None:
    run = after_stage_1(together, tmp_path)
    done(rank_server, 1, tmp_path)
    names = [name for name in truth if name.split("/")[:1] == ["iteration-1"] and name.split("/")[1] in ROUND]
    assert len(names) >= 6
    own = result_of(run)
    assert [name for name in names if own[name] != truth[name]] == []
    # fp32; AdamW divides by the gradient's size, which enlarges what sums in another order leave.
    one, four = (adapter_of(path, "iteration-1/adapter") for path in (run, together))
    np.testing.assert_allclose(one, four, rtol=1e-3, atol=1e-5)
