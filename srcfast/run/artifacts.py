"""Read what a run's earlier stages have written; `run.directory` has the paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.in_order import InOrder, samples_in_order
from srcfast.data.jsonl import read_shards
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.data.stage_rows import read_aligned, read_pairs, read_scores
from srcfast.run.chunks import ChunkFiles
from srcfast.run.directory import RunDirectory


@dataclass(frozen=True)
class RunArtifacts:
    """Readers of a run's records, by iteration and kind; records are read when they are needed.

    Args:
        directory: of the run.
        samples: all samples of the run, by id.
    """

    directory: RunDirectory
    samples: Mapping[str, Sample]

    def shards(self, iteration: int, kind: str) -> Path:
        """Return the directory of an iteration's "candidates", "scores" or "preferences"."""
        return self.directory.iteration(iteration) / kind

    def candidates(self, iteration: int) -> InOrder[list[Candidate]]:
        """Read an iteration's candidates, by sample id."""
        rows = read_shards(self.shards(iteration, "candidates"))
        return samples_in_order(Candidate.from_json(row, file=file, line=line) for file, line, row in rows)

    def candidates_in(self, directory: Path, chunks: ChunkFiles) -> InOrder[list[Candidate]]:
        """Read candidates, by sample id, from finished chunks in `directory`, before they are written as shards."""
        rows = chunks.rows()
        return samples_in_order(Candidate.from_json(row, file=directory, line=None) for row in rows)

    def scores(self, iteration: int) -> Iterator[dict[str, Any]]:
        """Read an iteration's score rows."""
        return read_scores(self.shards(iteration, "scores"))

    def preferences(self, iteration: int) -> list[Preference]:
        """Read an iteration's preference pairs with their reference log-probabilities."""
        return read_pairs(self.shards(iteration, "preferences"), self.samples)

    def predictions(self, model: str, dataset: str, split: str) -> Path:
        """Return the path of a model's predictions on an evaluation set, without its suffix."""
        return self.directory.path / "predictions" / model / f"{dataset}-{split}"

    def aligned(self, model: str, dataset: str, split: str, samples: Sequence[Sample]) -> list[bool]:
        """Return for each sample whether the model's greedy answer is right and aligned, from its stored predictions."""
        aligned = read_aligned(f"{self.predictions(model, dataset, split)}.jsonl")
        return [aligned[sample.id] for sample in samples]
