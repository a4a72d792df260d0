"""What a finished run comes to: `summary.json` out of the manifest's entries, and the samples that its page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from srcfast.data.in_order import InOrder
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.world.oracle import verify_sample

GALLERY = 12  # samples shown on the page


def summary_of(
    manifest: Mapping[str, Mapping[str, Any]], headroom: Sequence[Mapping[str, Any]], rejected: int
) -> dict[str, Any]:
    """`summary.json`: what every stage found, and how long it took.

    Args:
        manifest: stage -> its entry.
        headroom: entries of `measure_headroom`, one a round and set, with what the next model recovers.
        rejected: number of samples that were set aside.
    """

    def of_stages(kind: str, key: str) -> dict[str, Any]:
        ends = f"/{kind}"
        return {name.removesuffix(ends): stage[key] for name, stage in manifest.items() if name.endswith(ends)}

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
    """`gallery.json`: some of a round's samples with all candidates, scores and the oracle's judgement.

    Args:
        iteration: the round.
        pairs: its preferences; the first samples that have one are shown.
        samples: by id.
        candidates: by sample id, read as far as they are shown.
        score_rows: of these candidates, read likewise.
        image_names: the fields by which a sample's image is found.
    """
    first_of: dict[str, Preference] = {}
    for pair in pairs:
        if len(first_of) == GALLERY:
            break
        first_of.setdefault(pair.sample_id, pair)
    scores = InOrder((row["sample_id"], row["scores"]) for row in score_rows)
    return [
        {"sample_id": sample_id, "iteration": iteration, **image_names(samples[sample_id])}
        | _shown(pair, samples[sample_id], candidates.get(sample_id) or [], scores.get(sample_id) or [])
        for sample_id, pair in first_of.items()
    ]


def _shown(pair: Preference, sample: Sample, own: Sequence[Candidate], scores: Sequence[float]) -> dict[str, Any]:
    places = {candidate.id: index for index, candidate in enumerate(own)}
    return {
        "question": sample.question,
        "gold": sample.answer,
        "candidates": [_shown_candidate(sample, one, score) for one, score in zip(own, scores, strict=True)],
        "chosen": places[pair.extra["chosen_id"]],
        "rejected": places[pair.extra["rejected_id"]],
        "confidence": pair.confidence,
    }


def _shown_candidate(sample: Sample, candidate: Candidate, score: float) -> dict[str, Any]:
    judgement = verify_sample(sample, parse_response(candidate.text))
    shown: dict[str, Any] = {"text": candidate.text, "answer": candidate.answer, "score": score}
    if judgement is not None:
        shown["case"] = judgement.case
        shown["claims"] = [[c[0], c[1], c[2]] for c in judgement.claims]
    return shown
