"""Write a run's results: `summary.json` from the manifest's entries, `gallery.json` from a round's pairs, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import write_json, write_shards
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.report.gallery import image_names
from srcfast.report.manifest_summary import summary_of
from srcfast.report.page import write_report
from srcfast.stages.calibration_run import CalibrationRun
from srcfast.stages.curation import TRUE
from srcfast.stages.headroom import with_next
from srcfast.world.verification import verify_sample

GALLERY = 12  # samples in `gallery.json`


def write_preferences(run: CalibrationRun, iteration: int, pairs: Sequence[Preference]) -> None:
    """Write a round's pairs, and replace `gallery.json` by some of them."""
    write_shards(run.artifacts.shards(iteration, "preferences"), (pair.to_json() for pair in pairs))
    write_json(run.directory.path / "gallery.json", _gallery(run, iteration, pairs))


def write_summary(run: CalibrationRun) -> None:
    """Write `summary.json` from the manifest, with the share of the headroom that the next model recovers, and the page."""
    summary = summary_of(run.directory.manifest())
    samples_of = {(dataset.name, dataset.split): samples for dataset, samples in run.headroom_sets()}
    for index, entry in enumerate(summary["headroom"]):
        name, split = entry["dataset"], entry["split"]
        after = run.artifacts.aligned(f"iteration-{entry['iteration']}", name, split, samples_of[name, split])
        summary["headroom"][index] = with_next(entry, after)
    summary["rejected"] = run.num_rejected
    write_json(run.directory.summary_file, summary)
    write_report(run.directory.path, {sample.image_root for sample in run.samples.values()})


def _gallery(run: CalibrationRun, iteration: int, pairs: Sequence[Preference]) -> list[dict[str, Any]]:
    """Build `gallery.json`: the first GALLERY samples of the pairs, with candidates, scores and the oracle's verification."""
    first_of: dict[str, Preference] = {}
    for pair in pairs:
        if len(first_of) == GALLERY:
            break
        if not pair.extra["chosen_id"].endswith(TRUE):  # the sample's rationale is no candidate
            first_of.setdefault(pair.sample_id, pair)
    candidates = run.artifacts.candidates(iteration)  # both are read only as far as needed
    scores = InOrder((row["sample_id"], row["scores"]) for row in run.artifacts.scores(iteration))
    return [
        {"sample_id": name, "iteration": iteration}
        | image_names(run.samples[name], run.directory.path, Path(run.config.output))
        | _entry(pair, run.samples[name], candidates.get(name) or [], scores.get(name) or [])
        for name, pair in first_of.items()
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
