"""A stage's work in pieces that are kept: shared out over the ranks, stopped and continued without a difference in the result.

The items are cut into pieces of one size, whatever the number of ranks. A rank takes the next piece, works on it alone and
writes its rows to a file of its own; a piece whose file is there and whole is not done again. What a piece gives depends on
its items and the settings alone, so the rows in the pieces' order are the same, byte for byte, whoever did which piece and
however often the run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from srcfast import distributed
from srcfast.data.jsonl import json_hash, parse_object, read_jsonl, regular, replacing
from srcfast.run.progress import StageProgress
from srcfast.run.signals import at_boundaries, pending, stop_if_pending

BATCHES = 8  # of a batch that is refilled as its members end, a piece has so many: at its end the batch runs dry


class Record(Protocol):
    """A sample or a preference."""

    def to_json(self) -> dict[str, Any]: ...


DependsOn = Callable[[], Mapping[str, Any]]
Item = TypeVar("Item", bound=Record)
ChunkResult = tuple[list[dict[str, Any]], Mapping[str, float]]  # a piece's rows, and counts that add up over the pieces

_lists = 0  # work lists that this process has begun; the same on all ranks


@dataclass(frozen=True)
class ChunkFiles:
    """The finished pieces' files, in the order of the items."""

    files: tuple[Path, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, read one at a time."""
        for file in self.files:
            rows = read_jsonl(file)
            next(rows)  # the head
            yield from (row for _, row in rows)

    def counts(self) -> Counter[str]:
        """The pieces' counts, added up in their order."""
        total: Counter[str] = Counter()
        for file in self.files:
            total.update(_head(file)["counts"])
        return total


@dataclass(frozen=True)
class Chunks:
    """Where a stage stores its finished chunks, and what they depend on beside their items.

    Args:
        directory: of the chunks' files `00000.jsonl`, ...: a head with fingerprint and checksum, then the rows.
        depends_on: returns what the rows depend on beside the items, as JSON values (settings, hashes of weights); called
            on rank 0 alone.
        progress: of the stage; the work advances it by its items and tokens, `run_chunks` by what was done before and by
            what other ranks do.
    """

    directory: Path
    depends_on: DependsOn
    progress: StageProgress

    def below(self, name: str) -> Chunks:
        """Return the same with the chunks in a directory below this one."""
        return replace(self, directory=self.directory / name)


def run_chunks(
    chunks: Chunks,
    items: Sequence[Item],
    size: int,
    work: Callable[[Sequence[Item]], ChunkResult],
    meanwhile: Callable[[], None] = lambda: None,
) -> ChunkFiles:
    """Do all items piece by piece, together with the other ranks; returns when all pieces are done.

    Every rank calls this alike, and sees the same files. The caller removes `place` once it has used the rows (`forget`).

    Args:
        chunks: see there.
        items: in the order of the rows.
        size: items a chunk; the last may have fewer.
        work: returns rows and counts of one chunk. Nothing may carry over from one chunk to the next. A rank's chunks come
            in ascending order.
        meanwhile: called on each rank that takes no more pieces, returns when no rank has one left: where ranks need each
            other to compute.

    Raises:
        Interrupted: a signal asked to stop; what was begun has been finished and kept.
        SrcfastError: another rank has failed.
    """
    global _lists
    _lists += 1
    place, progress = chunks.directory, chunks.progress
    pieces = [items[start : start + size] for start in range(0, len(items), size)]
    files = tuple(place / f"{number:05d}.jsonl" for number in range(len(pieces)))
    prints, left = distributed.run_on_rank_zero(lambda: _begin(files, pieces, chunks.depends_on()))
    waiting = set(left)
    if before := [_head(file) for number, file in enumerate(files) if number not in waiting]:
        took = sum(head["seconds"] for head in before)
        progress.resume(sum(head["items"] for head in before), sum(head["tokens"] for head in before), took)
    progress.on_advance = distributed.heartbeat
    done_last = f"all of {len(files)} parts that were left to it"
    with at_boundaries():
        while (turn := distributed.next_index(f"{place}/{_lists}")) < len(left):
            number = left[turn]
            began, done, tokens = time.perf_counter(), progress.done, progress.tokens
            rows, counts = work(pieces[number])
            head = {
                "fingerprint": prints[number],
                "items": progress.done - done,
                "counts": dict(counts),
                "tokens": progress.tokens - tokens,
                "seconds": (time.perf_counter() - began) / distributed.world_size(),
            }
            _write(files[number], head, rows)
            waiting.discard(number)
            _hear_of_others(files, waiting, progress)
            if pending():
                done_last = f"part {number + 1} of {len(files)}"
                break
        meanwhile()  # the others, asked too or not, still have theirs to finish
        stop_if_pending(done_last)
    distributed.barrier_with_heartbeat()
    _hear_of_others(files, waiting, progress)
    return ChunkFiles(files)


def remove_chunks(place: Path) -> None:
    """Remove the pieces' files, on rank 0, once what was made of them is on disk."""
    if distributed.is_rank_zero():
        shutil.rmtree(place, ignore_errors=True)


def _begin(
    files: Sequence[Path], pieces: Sequence[Sequence[Record]], depends_on: Mapping[str, Any]
) -> tuple[list[str], list[int]]:
    """The pieces' fingerprints, and the numbers of those that are still to be done."""
    prints, left = [], []
    settings = json.dumps(depends_on, sort_keys=True, default=str)
    for number, (file, piece) in enumerate(zip(files, pieces, strict=True)):
        digest = hashlib.sha256(settings.encode())
        for item in piece:
            digest.update(json.dumps(item.to_json(), sort_keys=True, default=str).encode())
        prints.append(digest.hexdigest())
        if fault := _fault(file, prints[-1]):
            left.append(number)
            file.unlink(missing_ok=True)
            if fault != "missing":
                warnings.warn(f"{file}: {fault}; this part of the stage is done again", RuntimeWarning, stacklevel=2)
    return prints, left


def _fault(file: Path, fingerprint: str) -> str:
    """Why the file can't be used; empty if it can."""
    try:
        with open(regular(file), "rb") as opened:
            head, digest = parse_object(opened.readline()), hashlib.sha256()
            for line in opened:
                digest.update(line)
        whole = digest.hexdigest() == head["sha256"] and _checksum(head) == head["head_sha256"]
        same = head["fingerprint"] == fingerprint
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"expected a finished part, found {error!r}"
    if not whole:
        return "expected the contents that its checksum names, found others"
    return "" if same else "expected a part of these samples under these settings, found one of others"


def _write(file: Path, head: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    body = b"".join(json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n" for row in rows)
    head |= {"sha256": hashlib.sha256(body).hexdigest()}
    head |= {"head_sha256": _checksum(head)}
    with replacing(file) as opened:
        opened.write(json.dumps(head).encode() + b"\n")
        opened.write(body)


def _checksum(head: Mapping[str, Any]) -> str:
    return json_hash({key: value for key, value in head.items() if key != "head_sha256"})


def _head(file: Path) -> dict[str, Any]:
    return next(read_jsonl(file))[1]


def _hear_of_others(files: Sequence[Path], waiting: set[int], progress: StageProgress) -> None:
    """Add what other ranks have finished since."""
    for number in sorted(number for number in waiting if files[number].is_file()):
        head = _head(files[number])
        progress.advance(head["items"], tokens=head["tokens"])
        waiting.discard(number)
