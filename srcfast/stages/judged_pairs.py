"""Choose pairs of a run's candidates that a person or another model is to judge."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from srcfast.config.load import load_config
from srcfast.data.jsonl import is_complete
from srcfast.data.records import Candidate, Sample, first_of_texts
from srcfast.errors import InputError
from srcfast.run.artifacts import RunArtifacts
from srcfast.run.directory import RunDirectory
from srcfast.stages.datasets import read_training_samples, training_sets

Chosen = Literal["unsure", "random"]


@dataclass(frozen=True)
class Judged:
    """A sample's distinct candidates, in order, and what the run's R-Scorer says of them.

    Attributes:
        win: q [n, n]; None where the R-Scorer has no scores of them.
        confidence: u [n, n], above 0 for pairs that it compared.
    """

    sample: Sample
    texts: list[str]
    win: np.ndarray | None = None
    confidence: np.ndarray | None = None


@dataclass(frozen=True)
class RunPair:
    """Two candidates in the order in which they are shown.

    Attributes:
        chosen: why: the R-Scorer was unsure, or at random.
        scorer: its share of a win of the first; None where it has not compared them.
    """

    sample: Sample
    first: str
    second: str
    chosen: Chosen
    scorer: float | None


def same_side(leads: Iterable[tuple[float | None, float]]) -> dict[str, Any]:
    """Count in how many pairs the R-Scorer is on a judge's side.

    Args:
        leads: the R-Scorer's share of a win of the first, None where it has not compared the pair; and by how much the first
            leads with the judge, 0 where neither does.

    Returns:
        pairs: those that both decide; same_side: the share of them, None without one; a share of 1/2 is on neither side.
    """
    same = [lead * (share - 0.5) > 0 for share, lead in leads if share is not None and lead]
    return {"pairs": len(same), "same_side": sum(same) / len(same) if same else None}


def read_judged(directory: Path) -> list[Judged]:
    """Read the candidates of a run's last round, their samples with complete references, and scores where the run has them.

    Raises:
        InputError: the directory is no run with candidates, or its data no longer have a sample.
    """
    if not (directory / "config.yaml").is_file():
        raise InputError(file=directory, expected="a run's directory, with config.yaml", found="none")
    config = load_config(directory / "config.yaml")
    sets = tuple(dataset.replace(reference="complete") for dataset in training_sets(config, "calibration"))
    samples = read_training_samples(sets, config, Path(config.output) / "images", [], "calibration")
    artifacts = RunArtifacts(RunDirectory(directory), {sample.id: sample for sample in samples})
    rounds = range(config.iterations, 0, -1)
    round_ = next((number for number in rounds if is_complete(artifacts.shards(number, "candidates"))), None)
    if round_ is None:
        fix = "run `srcfast calibrate` until a round has written candidates"
        raise InputError(file=directory, expected="candidates of a round", found="none", fix=fix)
    is_scored = is_complete(artifacts.shards(round_, "scores"))
    rows = {row["sample_id"]: row for row in artifacts.scores(round_)} if is_scored else {}
    judged = []
    for sample_id, group in artifacts.candidates(round_).rest():
        if (sample := artifacts.samples.get(sample_id)) is None:
            expected, fix = "a sample of the run's data", "restore the data that the run was made of"
            raise InputError(
                file=directory, sample_id=sample_id, field="sample_id", expected=expected, found=sample_id, fix=fix
            )
        judged.append(judged_of(sample, group, rows.get(sample_id)))
    return judged


def judged_of(sample: Sample, candidates: Sequence[Candidate], row: Mapping[str, Any] | None) -> Judged:
    """Take a sample's distinct texts and what a row of scores says of them. Raises InputError: it is of other candidates."""
    first_of = first_of_texts(candidates)
    texts = list(first_of)
    if row is None or "win_probability" not in row:
        return Judged(sample, texts)
    if row["candidate_ids"] != [candidate.id for candidate in candidates]:
        expected, fix = "scores of these candidates", "score them anew"
        raise InputError(
            sample_id=sample.id, field="candidate_ids", expected=expected, found=row["candidate_ids"], fix=fix
        )
    grid = np.ix_(list(first_of.values()), list(first_of.values()))
    win, confidence = (np.array(row[name], dtype=np.float64)[grid] for name in ("win_probability", "confidence"))
    return Judged(sample, texts, win, confidence)


def choose_pairs(judged: Sequence[Judged], count: int, seed: int) -> list[RunPair]:
    """Choose up to `count` pairs: half of those of which the R-Scorer is least sure, the others at random.

    Of a sample at most one pair counts as least sure, among those that the R-Scorer compared; of confidence 0 are those that it
    did not. At random: each pair of distinct texts of a sample is as likely as any other. Pairs stand in random order, and the
    candidates within each.
    """
    rng = Random(f"pairs/{seed}")
    unsure: list[tuple[float, int, int, int]] = []
    for index, each in enumerate(judged):
        if each.confidence is not None:
            above = np.triu_indices(len(each.texts), 1)
            order = [(float(each.confidence[i, j]), index, int(i), int(j)) for i, j in zip(*above, strict=True)]
            unsure += sorted(pair for pair in order if pair[0] > 0.0)[:1]
    chosen: dict[tuple[int, int, int], Chosen] = {pair[1:]: "unsure" for pair in sorted(unsure)[: count // 2]}
    ends = list(accumulate(len(each.texts) * (len(each.texts) - 1) // 2 for each in judged))
    total = ends[-1] if ends else 0
    for number in rng.sample(range(total), min(total, count)):
        if len(chosen) >= count:
            break
        index = bisect_right(ends, number)
        n = len(judged[index].texts)
        rows, columns = np.triu_indices(n, 1)
        within = number - (ends[index] - n * (n - 1) // 2)
        chosen.setdefault((index, int(rows[within]), int(columns[within])), "random")
    pairs = []
    for (index, i, j), why in rng.sample(sorted(chosen.items()), len(chosen)):
        first, second = (i, j) if rng.random() < 0.5 else (j, i)
        each = judged[index]
        compared = each.win is not None and each.confidence is not None and each.confidence[i, j] > 0.0
        win = float(each.win[first, second]) if compared and each.win is not None else None
        pairs.append(RunPair(each.sample, each.texts[first], each.texts[second], why, win))
    return pairs
