"""A work list over numbers, whose work says which pieces it was given; and the bytes that its parts come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import write_shards
from srcfast.run.chunks import ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.run.progress import StageProgress


@dataclass(frozen=True)
class Number:
    value: int

    def to_json(self) -> dict[str, Any]:
        return {"id": self.value}


class CountedWork:
    """Squares of the numbers 0 to 10 in pieces of 4, two rows a number; `fails_at` raises once it comes to that piece."""

    def __init__(self, place: Path, seed: int = 1, fails_at: int | None = None) -> None:
        self.place, self.seed, self.fails_at = place, seed, fails_at
        self.given: list[list[int]] = []
        self.progress = StageProgress("numbers", 11, quiet=True)

    def __call__(self) -> ChunkFiles:
        numbers = [Number(value) for value in range(11)]
        return run_chunks(Chunks(self.place, lambda: {"seed": self.seed}, self.progress), numbers, 4, self.piece)

    def piece(self, numbers: Sequence[Number]) -> ChunkResult:
        if len(self.given) == self.fails_at:
            raise RuntimeError("no more")
        self.given.append([number.value for number in numbers])
        self.progress.advance(len(numbers), tokens=10 * len(numbers))
        rows = [{"id": n.value, "square": n.value**2 + k / 3, "word": "é"} for n in numbers for k in range(2)]
        return rows, {"numbers": len(numbers), "thirds": 1 / 3}


def merged(parts: ChunkFiles, folder: Path) -> bytes:
    """The shards' bytes, one after the other."""
    write_shards(folder, parts.rows(), shard_size=5)
    return b"".join(shard.read_bytes() for shard in sorted(folder.glob("*.jsonl")))
