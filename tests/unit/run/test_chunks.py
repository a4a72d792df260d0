"""Pieces of work: kept, continued, shared out; the same bytes whoever did them and however often they were stopped."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.counted_work import CountedWork, merged
from helpers.rank_processes import run_ranks, values_of, wait_until_ended

from srcfast import distributed
from srcfast.errors import Interrupted
from srcfast.run.chunks import ChunkResult, Chunks, remove_chunks, run_chunks
from srcfast.run.progress import StageProgress
from srcfast.run.signals import listening


def undisturbed(folder: Path) -> bytes:
    return merged(CountedWork(folder / "whole")(), folder / "whole-shards")


def test_rows_and_counts_come_in_the_order_of_the_items(tmp_path: Path) -> None:
    work = CountedWork(tmp_path / "parts")
    parts = work()
    assert work.given == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [row["id"] for row in parts.rows()] == [value for value in range(11) for _ in range(2)]
    assert parts.counts() == {"numbers": 11, "thirds": 1.0}
    assert (work.progress.done, work.progress.tokens) == (11, 110)


def test_work_that_failed_goes_on_with_the_piece_that_it_failed_at(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        CountedWork(tmp_path / "parts", fails_at=1)()
    again = CountedWork(tmp_path / "parts")
    parts = again()
    assert again.given == [[4, 5, 6, 7], [8, 9, 10]]
    assert (again.progress.done, again.progress.tokens) == (11, 110)  # what was done before counts
    assert parts.counts()["numbers"] == 11
    assert merged(parts, tmp_path / "shards") == undisturbed(tmp_path)


def test_all_pieces_of_before_count_in_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        CountedWork(tmp_path / "parts", fails_at=2)()
    again = CountedWork(tmp_path / "parts")
    resumed: list[tuple[int, int]] = []
    again.progress.resume = lambda n, tokens, seconds: resumed.append((n, tokens))  # type: ignore[method-assign]
    again()
    assert (again.given, resumed) == ([[8, 9, 10]], [(8, 80)])
    assert (again.progress.done, again.progress.tokens) == (3, 30)  # of this process


def test_a_signal_stops_it_behind_the_piece_under_way(tmp_path: Path) -> None:
    work = CountedWork(tmp_path / "parts")
    piece = work.piece

    def signalled(numbers: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return piece(numbers)

    work.piece = signalled  # type: ignore[method-assign]
    with listening(), pytest.raises(Interrupted, match="after chunk 1 of 3"):
        work()
    again = CountedWork(tmp_path / "parts")
    assert merged(again(), tmp_path / "shards") == undisturbed(tmp_path)
    assert again.given == [[4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("place", ["head", "rows", "end"])
def test_a_damaged_part_is_done_again_with_a_warning(tmp_path: Path, place: str) -> None:
    CountedWork(tmp_path / "parts")()
    file = tmp_path / "parts" / "00001.jsonl"
    content = bytearray(file.read_bytes())
    if place == "end":
        content = content[:-20]
    else:
        at = content.index(b'"tokens": 4') + 10 if place == "head" else content.index(b'"square"') + 10
        content[at] ^= 1  # another digit
    file.write_bytes(content)
    again = CountedWork(tmp_path / "parts")
    with pytest.warns(RuntimeWarning, match=r"00001.jsonl: .*done again"):
        parts = again()
    assert again.given == [[4, 5, 6, 7]]
    assert merged(parts, tmp_path / "shards") == undisturbed(tmp_path)


def test_parts_of_other_settings_are_done_again_with_a_warning(tmp_path: Path) -> None:
    CountedWork(tmp_path / "parts", seed=1)()
    again = CountedWork(tmp_path / "parts", seed=2)
    with pytest.warns(RuntimeWarning, match="one of others"):
        again()
    assert len(again.given) == 3


def test_a_second_time_nothing_is_done_and_nobody_warned(tmp_path: Path) -> None:
    CountedWork(tmp_path / "parts")()
    again = CountedWork(tmp_path / "parts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merged(again(), tmp_path / "shards") == undisturbed(tmp_path)
    assert again.given == []
    remove_chunks(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def count_over_ranks(folder: Path) -> Any:
    work = CountedWork(folder / "parts")
    parts = work()
    numbers = [row["id"] for row in parts.rows()]  # each rank reads what all have done
    distributed.barrier()  # rank 0 holds the store that the others ask
    return {"given": work.given, "numbers": numbers, "done": work.progress.done, "tokens": work.progress.tokens}


def fail_on_one_rank(folder: Path) -> Any:
    distributed.end_startup_timeout()  # from here on the timeout counts
    work = CountedWork(folder / "parts", fails_at=0 if distributed.rank() else None)
    if distributed.is_rank_zero():  # slow enough to leave the other rank a piece
        piece = work.piece

        def slow(numbers: Any) -> Any:
            wait_until_ended(folder, 1)
            return piece(numbers)

        work.piece = slow  # type: ignore[method-assign]
    work()


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_piece_is_done_by_one_rank_and_all_see_all(tmp_path: Path, ranks: int) -> None:
    found = values_of(run_ranks(ranks, count_over_ranks, tmp_path))
    given = [piece for one in found for piece in one["given"]]
    assert sorted(given) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]  # 4 ranks: one gets none
    assert all(one["numbers"] == [value for value in range(11) for _ in range(2)] for one in found)
    assert all((one["done"], one["tokens"]) == (11, 110) for one in found)  # own pieces and others'
    again = CountedWork(tmp_path / "parts")
    assert merged(again(), tmp_path / "shards") == undisturbed(tmp_path)
    assert again.given == []  # 1 rank takes over what several have done


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    found = run_ranks(2, fail_on_one_rank, tmp_path, timedelta(seconds=4))
    assert all(one["exit"] != 0 for one in found)
    assert "no more" in found[1]["error"]
    again = CountedWork(tmp_path / "parts")
    assert merged(again(), tmp_path / "shards") == undisturbed(tmp_path)


def test_items_of_one_id_and_other_content_are_done_again(tmp_path: Path) -> None:
    """And only the chunk that holds the changed item."""

    @dataclass(frozen=True)
    class Item:
        id: int
        text: str = "as it was"

        def to_json(self) -> dict[str, Any]:
            return {"id": self.id, "text": self.text}

    def run(items: list[Item]) -> list[list[int]]:
        given: list[list[int]] = []

        def work(chunk: Sequence[Item]) -> ChunkResult:
            given.append([item.id for item in chunk])
            return [{"id": item.id, "text": item.text} for item in chunk], {"items": len(chunk)}

        chunks = Chunks(tmp_path, lambda: {"seed": 1}, StageProgress("items", 5, quiet=True))
        files = run_chunks(chunks, items, 2, work)
        assert list(files.rows()) == [item.to_json() for item in items]
        assert files.counts() == {"items": 5}
        return given

    items = [Item(number) for number in range(5)]
    assert run(items) == [[0, 1], [2, 3], [4]]
    assert run(items) == []
    with pytest.warns(RuntimeWarning, match="00001.jsonl: expected a chunk of these samples"):
        assert run([*items[:3], Item(3, "changed"), items[4]]) == [[2, 3]]
