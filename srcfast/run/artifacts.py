"""What a run's stages have written, read back by the stages behind them: see `run.directory` for the places."""

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
    """Records by round and kind, read as they are asked for.

    Args:
        directory: the run's.
        samples: all of the run's samples by id.
    """

    directory: RunDirectory
    samples: Mapping[str, Sample]

    def shards(self, iteration: int, kind: str) -> Path:
        """Folder of a round's "candidates", "scores" or "preferences"."""
        return self.directory.iteration(iteration) / kind

    def candidates(self, iteration: int) -> InOrder[list[Candidate]]:
        """A round's candidates by sample id."""
        rows = read_shards(self.shards(iteration, "candidates"))
        return samples_in_order(
            Candidate.from_json(row, file=file, line=line, image_root=Path()) for file, line, row in rows
        )

    def candidates_in(self, place: Path, parts: ChunkFiles) -> InOrder[list[Candidate]]:
        """Candidates of finished pieces under `place` that are not in shards yet, by sample id."""
        rows = parts.rows()
        return samples_in_order(Candidate.from_json(row, file=place, line=None, image_root=Path()) for row in rows)

    def scores(self, iteration: int) -> Iterator[dict[str, Any]]:
        """A round's score rows."""
        return read_scores(self.shards(iteration, "scores"))

    def preferences(self, iteration: int) -> list[Preference]:
        """A round's pairs with their references."""
        return read_pairs(self.shards(iteration, "preferences"), self.samples)

    def predictions(self, model: str, dataset: str, split: str) -> Path:
        """A model's predictions on an evaluation set, without the file's ending."""
        return self.directory.path / "predictions" / model / f"{dataset}-{split}"

    def aligned(self, model: str, dataset: str, split: str, samples: Sequence[Sample]) -> list[bool]:
        """Whether the model's greedy answer to each of these samples of a set is right and aligned, from its predictions."""
        found = read_aligned(f"{self.predictions(model, dataset, split)}.jsonl")
        return [found[sample.id] for sample in samples]
