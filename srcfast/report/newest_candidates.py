"""Find a run's newest candidates with their scores, among files that another process is writing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import parse_object, regular

MAX_SAMPLES = 4
MAX_CANDIDATES = 16  # of a sample
MAX_BYTES = 64 << 20  # of candidates that are searched for those of the newest scores


@dataclass(frozen=True)
class ScoredText:
    """A candidate: its text, and its score once it has one."""

    text: str
    score: float | None


@dataclass(frozen=True)
class SampleCandidates:
    """A sample's candidates, by descending score where they have scores, else as they were generated."""

    sample_id: str
    candidates: list[ScoredText]


def newest_candidates(run: Path) -> tuple[int, list[SampleCandidates]]:
    """Return the newest round with candidates, and those of the samples that were scored last, or else generated last.

    Files that vanish, can't be read or hold something else are passed over. Round 0: there are no candidates.

    Args:
        run: the run's directory.
    """
    folders = [*run.glob("iteration-*"), *(run / "checkpoint").glob("iteration-*")]
    numbers = {int(digits) for folder in folders if (digits := folder.name.removeprefix("iteration-")).isdecimal()}
    for number in sorted(numbers, reverse=True):
        if _files(run, number, "candidates"):
            return number, _of_round(run, number)
    return 0, []


def _of_round(run: Path, number: int) -> list[SampleCandidates]:
    """Return the newest candidates of a round."""
    files = _files(run, number, "candidates")
    scores = dict[str, dict[str, float]]()
    if score_files := _files(run, number, "scores"):
        for row in deque(_rows(score_files[-1]), maxlen=MAX_SAMPLES):
            scores |= _scores(row)
    if scores:
        texts = _texts_of(files, set(scores))
    else:
        texts = dict(list(_texts(_rows(files[-1])).items())[-MAX_SAMPLES:])
    return [
        SampleCandidates(
            sample,
            sorted(
                (ScoredText(text, scores.get(sample, {}).get(name)) for name, text in of_sample[:MAX_CANDIDATES]),
                key=lambda one: -(one.score or 0.0),
            ),
        )
        for sample, of_sample in reversed(texts.items())
    ]


def _files(run: Path, number: int, kind: str) -> list[Path]:
    """List a round's files of a kind, the newest last: those of the finished stage, or else its chunks."""
    for folder in (run / f"iteration-{number}" / kind, run / "checkpoint" / f"iteration-{number}" / kind):
        files = []
        for file in folder.glob("[0-9]*.jsonl"):
            try:
                files.append((file.stat().st_mtime_ns, file))
            except OSError:  # removed since it was listed
                continue
        if files:
            return [file for _, file in sorted(files)]
    return []


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that are whole; none of one that can't be read."""
    try:
        with open(regular(file), "rb") as opened:
            for line in opened:
                try:
                    yield parse_object(line)
                except ValueError:
                    continue
    except (OSError, ValueError):
        return


def _scores(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return {sample id: {candidate id: score}} of a score row; nothing of any other row, such as a chunk's head."""
    sample, names, scores = row.get("sample_id"), row.get("candidate_ids"), row.get("scores")
    if not (isinstance(sample, str) and isinstance(names, list) and isinstance(scores, list)):
        return {}
    pairs = zip(names, scores, strict=False)
    return {sample: {str(name): score for name, score in pairs if type(score) is float or score in (0, 1)}}


def _texts(rows: Iterator[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Return (id, text) of the candidates among rows, by sample id."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        sample, name, text = row.get("sample_id"), row.get("id"), row.get("text")
        if isinstance(sample, str) and isinstance(name, str) and isinstance(text, str):
            texts.setdefault(sample, []).append((name, text))
    return texts


def _texts_of(files: list[Path], samples: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the candidates of some samples, from as many bytes of the newest files as MAX_BYTES."""
    texts: dict[str, list[tuple[str, str]]] = {}
    searched = 0
    for file in reversed(files):
        texts |= _texts(row for row in _rows(file) if isinstance(name := row.get("sample_id"), str) and name in samples)
        try:
            searched += file.stat().st_size
        except OSError:
            continue
        if texts.keys() >= samples or searched > MAX_BYTES:
            break
    return texts
