"""Write a run's results: `summary.json` from the manifest's entries, `gallery.json` from a round's pairs, and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import write_json, write_shards
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.report.gallery import image_names
from srcfast.report.page import write_report
from srcfast.stages.calibration_run import CalibrationRun
from srcfast.stages.headroom import with_next
from srcfast.world.oracle import verify_sample

GALLERY = 12  # samples in `gallery.json`


def write_preferences(run: CalibrationRun, iteration: int, pairs: Sequence[Preference]) -> None:
    """Write a round's pairs, and replace `gallery.json` by some of them."""
    write_shards(run.artifacts.shards(iteration, "preferences"), (pair.to_json() for pair in pairs))
    candidates, scores = run.artifacts.candidates(iteration), run.artifacts.scores(iteration)
    names = partial(image_names, run=run.directory.path, output=Path(run.config.output))
    gallery = gallery_of(iteration, pairs, run.samples, candidates, scores, names)
    write_json(run.directory.path / "gallery.json", gallery)


def write_summary(run: CalibrationRun) -> None:
    """Write `summary.json` from the manifest, with the share of the headroom that the next model recovers, and the page."""
    manifest, headroom = run.directory.manifest(), []
    samples_of = {(dataset.name, dataset.split): samples for dataset, samples in run.headroom_sets()}
    entries = [e for name, stage in manifest.items() if name.endswith("/headroom") for e in stage["entries"]]
    for entry in entries:
        name, split = entry["dataset"], entry["split"]
        after = run.artifacts.aligned(f"iteration-{entry['iteration']}", name, split, samples_of[name, split])
        headroom.append(with_next(entry, after))
    write_json(run.directory.summary_file, summary_of(manifest, headroom, run.num_rejected))
    write_report(run.directory.path)


def summary_of(
    manifest: Mapping[str, Mapping[str, Any]], headroom: Sequence[Mapping[str, Any]], rejected: int
) -> dict[str, Any]:
    """Build `summary.json`: the results of each stage, and the time it took in seconds.

    Args:
        manifest: entry of each stage, by name.
        headroom: entries of `measure_headroom`, one per round and dataset, with the share that the next model recovers.
        rejected: number of rejected records.
    """

    def of_stages(kind: str, key: str) -> dict[str, Any]:
        suffix = f"/{kind}"
        return {name.removesuffix(suffix): stage[key] for name, stage in manifest.items() if name.endswith(suffix)}

    return {
        "evaluations": [entry for entries in of_stages("evaluation", "entries").values() for entry in entries],
        "headroom": list(headroom),
        "funnel": of_stages("preferences", "funnel"),
        "diversity": of_stages("candidates", "diversity"),
        "adaptive": {
            name.partition("/")[0]: stage["adaptive"] for name, stage in manifest.items() if "adaptive" in stage
        },
        "rejected": rejected,
        "stages": [
            {
                "name": name,
                "seconds": stage["seconds"],
                "tokens_per_second": stage["tokens"] / max(stage["seconds"], 1e-9),
                "memory": stage.get("memory"),
            }
            for name, stage in manifest.items()
        ],
        "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in manifest.values()),
        "seconds": sum(stage["seconds"] for stage in manifest.values()),
    }


def gallery_of(
    iteration: int,
    pairs: Sequence[Preference],
    samples: Mapping[str, Sample],
    candidates: InOrder[list[Candidate]],
    score_rows: Iterable[Mapping[str, Any]],
    image_names: Callable[[Sample], Mapping[str, str | None]],
) -> list[dict[str, Any]]:
    """Build `gallery.json`: some of a round's samples with all candidates, scores and the oracle's verification.

    Args:
        iteration: number of the round.
        pairs: preferences of the round; the gallery has the first GALLERY samples of these.
        samples: samples by id.
        candidates: candidates by sample id; read only as far as needed.
        score_rows: the R-Scorer's rows of these candidates; read only as far as needed.
        image_names: returns the fields that name a sample's image.
    """
    first_of: dict[str, Preference] = {}
    for pair in pairs:
        if len(first_of) == GALLERY:
            break
        first_of.setdefault(pair.sample_id, pair)
    scores = InOrder((row["sample_id"], row["scores"]) for row in score_rows)
    return [
        {"sample_id": sample_id, "iteration": iteration, **image_names(samples[sample_id])}
        | _entry(pair, samples[sample_id], candidates.get(sample_id) or [], scores.get(sample_id) or [])
        for sample_id, pair in first_of.items()
    ]


def _entry(
    pair: Preference, sample: Sample, candidates: Sequence[Candidate], scores: Sequence[float]
) -> dict[str, Any]:
    """Build the entry of a sample; `chosen` and `rejected` are indices of candidates."""
    index_of = {candidate.id: index for index, candidate in enumerate(candidates)}
    return {
        "question": sample.question,
        "gold": sample.answer,
        "candidates": [
            _candidate_entry(sample, candidate, score) for candidate, score in zip(candidates, scores, strict=True)
        ],
        "chosen": index_of[pair.extra["chosen_id"]],
        "rejected": index_of[pair.extra["rejected_id"]],
        "confidence": pair.confidence,
    }


def _candidate_entry(sample: Sample, candidate: Candidate, score: float) -> dict[str, Any]:
    """Build the entry of a candidate, with the oracle's verdict on each claim if the oracle can verify the sample."""
    verification = verify_sample(sample, parse_response(candidate.text))
    entry: dict[str, Any] = {"text": candidate.text, "answer": candidate.answer, "score": score}
    if verification is not None:
        entry["case"] = verification.case
        entry["claims"] = [list(claim) for claim in verification.claims]
    return entry
