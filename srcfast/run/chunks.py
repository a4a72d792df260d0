"""A stage's work in chunks that are saved one by one, so that ranks share it, and a stopped stage continues.

The items are cut into chunks of one size, whatever the number of ranks. A rank takes the next chunk, computes it alone and
writes its rows to one file; a chunk whose file is complete is not computed again. The rows of a chunk depend on its items and
the settings alone. So the rows of all chunks, in order, are the same byte for byte, whichever rank computed which chunk and
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

BATCHES = 8  # batches a chunk: a batch is refilled as its members end, but at a chunk's end there is nothing to refill it with


class Record(Protocol):
    """A sample or a preference, whose JSON identifies it in a chunk's fingerprint."""

    def to_json(self) -> dict[str, Any]: ...


DependsOn = Callable[[], Mapping[str, Any]]
Item = TypeVar("Item", bound=Record)
ChunkResult = tuple[
    list[dict[str, Any]], Mapping[str, float]
]  # a chunk's rows, and counts that are added up over the chunks

_num_runs = 0  # calls of run_chunks in this process, the same on all ranks: each call has a shared counter


@dataclass(frozen=True)
class ChunkFiles:
    """The files of the finished chunks, in the order of the items."""

    files: tuple[Path, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, one at a time."""
        for file in self.files:
            rows = read_jsonl(file)
            next(rows)  # the first line is the head
            yield from (row for _, row in rows)

    def counts(self) -> Counter[str]:
        """Add up the chunks' counts, in order."""
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
    """Compute all items chunk by chunk, together with the other ranks, and return when all chunks are finished.

    Every rank calls this with the same arguments, and sees the same files. The caller removes the files with `remove_chunks`
    once it has used the rows.

    Args:
        chunks: see there.
        items: in the order of the rows.
        size: items a chunk; the last may have fewer.
        work: returns rows and counts of one chunk. Nothing may carry over from one chunk to the next. A rank's chunks come
            in ascending order.
        meanwhile: called on each rank that takes no more chunks; returns when no rank has one left. For models whose layers
            are sharded, where ranks need each other to compute.

    Raises:
        Interrupted: a signal asked to stop; the chunk that was being computed has been finished and saved.
        SrcfastError: another rank has failed.
    """
    global _num_runs
    _num_runs += 1
    directory, progress = chunks.directory, chunks.progress
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    files = tuple(directory / f"{index:05d}.jsonl" for index in range(len(batches)))
    fingerprints, to_do = distributed.run_on_rank_zero(lambda: _prepare(files, batches, chunks.depends_on()))
    unfinished = set(to_do)  # on any rank, as far as this rank knows
    if heads := [_head(file) for index, file in enumerate(files) if index not in unfinished]:
        progress.resume(*(sum(head[name] for head in heads) for name in ("items", "tokens", "seconds")))
    progress.on_advance = distributed.heartbeat
    last_step = f"all of the {len(files)} chunks that it could take"
    with at_boundaries():
        while (turn := distributed.next_index(f"{directory}/{_num_runs}")) < len(to_do):
            index = to_do[turn]
            _write(files[index], *_compute(work, batches[index], progress, fingerprints[index]))
            unfinished.discard(index)
            _advance_by_other_ranks(files, unfinished, progress)
            if pending():
                last_step = f"chunk {index + 1} of {len(files)}"
                break
        meanwhile()  # other ranks may still compute their last chunk, whether they have received a signal or not
        stop_if_pending(last_step)
    distributed.barrier_with_heartbeat()
    _advance_by_other_ranks(files, unfinished, progress)
    return ChunkFiles(files)


def remove_chunks(directory: Path) -> None:
    """Remove a stage's chunks and checkpoints, on rank 0; called once the stage's result is on disk."""
    if distributed.is_rank_zero():
        shutil.rmtree(directory, ignore_errors=True)


def _prepare(
    files: Sequence[Path], batches: Sequence[Sequence[Record]], depends_on: Mapping[str, Any]
) -> tuple[list[str], list[int]]:
    """Return the chunks' fingerprints and the indices of the unfinished ones; remove files that can't be used."""
    fingerprints, to_do = [], []
    settings = json.dumps(depends_on, sort_keys=True, default=str)
    for index, (file, batch) in enumerate(zip(files, batches, strict=True)):
        digest = hashlib.sha256(settings.encode())
        for item in batch:
            digest.update(json.dumps(item.to_json(), sort_keys=True, default=str).encode())
        fingerprints.append(digest.hexdigest())
        if fault := _fault(file, fingerprints[-1]):
            to_do.append(index)
            file.unlink(missing_ok=True)
            if fault != "missing":
                warnings.warn(f"{file}: {fault}; this chunk of the stage is done again", RuntimeWarning, stacklevel=2)
    return fingerprints, to_do


def _compute(
    work: Callable[[Sequence[Item]], ChunkResult], batch: Sequence[Item], progress: StageProgress, fingerprint: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute one chunk and return its head and rows. The head's items and tokens are those by which `work` advances."""
    began, done, tokens = time.perf_counter(), progress.done, progress.tokens
    rows, counts = work(batch)
    head = {
        "fingerprint": fingerprint,
        "items": progress.done - done,
        "counts": dict(counts),
        "tokens": progress.tokens - tokens,
        "seconds": (time.perf_counter() - began) / distributed.world_size(),  # as all ranks compute at the same time
    }
    return head, rows


def _fault(file: Path, fingerprint: str) -> str:
    """Return why a chunk's file can't be used; empty: it can."""
    try:
        with open(regular(file), "rb") as opened:
            head, digest = parse_object(opened.readline()), hashlib.sha256()
            for line in opened:
                digest.update(line)
        is_intact = digest.hexdigest() == head["sha256"] and _checksum(head) == head["head_sha256"]
        is_current = head["fingerprint"] == fingerprint
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"expected a finished chunk, found {error!r}"
    if not is_intact:
        return "expected the contents that its checksum names, found others"
    return "" if is_current else "expected a chunk of these samples under these settings, found one of others"


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


def _advance_by_other_ranks(files: Sequence[Path], unfinished: set[int], progress: StageProgress) -> None:
    """Advance the progress by the chunks that other ranks have finished, and remove them from `unfinished`."""
    for index in sorted(index for index in unfinished if files[index].is_file()):
        head = _head(files[index])
        progress.advance(head["items"], tokens=head["tokens"])
        unfinished.discard(index)
