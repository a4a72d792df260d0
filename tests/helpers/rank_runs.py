"""The small calibration on several ranks, of which a fault befalls one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.attempts_server import LIMIT
from helpers.small_run import Server

BATCHES_OF_ONE = ("candidates.batch_size=1", "evaluation.batch_size=1")


@dataclass(frozen=True)
class RankAttempt:
    """How the ranks ended: their exit statuses (negative: the signal), what each said, and `seconds`, see `ranks_server`."""

    statuses: list[int]
    said: list[str]
    seconds: float | None


class RankServer(Server):
    """The process that forks the ranks, see `ranks_server`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, program="ranks_server")

    def srcfast(self, ranks: int, folder: Path, words: Sequence[str], limit: float = LIMIT, **more: Any) -> RankAttempt:
        """The command line once on so many ranks; `more`: the request's, see `ranks_server`.

        Args:
            folder: of a log for each rank.
            words: of the command line.
            limit: seconds after which ranks that are still there are killed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        logs = [folder / f"log-{rank}.txt" for rank in range(ranks)]
        request = {"words": list(words), "ranks": ranks, "logs": [str(log) for log in logs], "limit": limit}
        answer = self.ask(request | more)
        said = [log.read_text(encoding="utf-8") for log in logs]
        return RankAttempt(answer["statuses"], said, answer["seconds"])

    def run_ranks(
        self, ranks: int, output: Path, timeout: int = 600, limit: float = LIMIT, **fault: Any
    ) -> RankAttempt:
        """`srcfast calibrate` once on so many ranks, into this directory; `fault`: the request's, see `ranks_server`.

        Args:
            timeout: `distributed.timeout_seconds`.
            limit: seconds after which ranks that are still there are killed.
        """
        words = ["calibrate", str(self.config), f"output={output}", f"distributed.timeout_seconds={timeout}"]
        if fault:
            fault["fault"] |= {"inside": str(output / "small")}
        return self.srcfast(ranks, output, [*words, *BATCHES_OF_ONE], limit, small_pieces=True, **fault)
