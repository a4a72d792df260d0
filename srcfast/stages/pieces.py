"""The stages that run a model over samples one by one, in pieces that are kept: see `run.chunks`.

Each returns its parts; their rows, in order, are what the stage writes. A batch or a forest never reaches from one piece into the
next, and images are encoded anew in each: what was computed beside a sample moves its numbers by rounding, and must not depend
on which rank did what before. Pieces that decode share memory (`decoding_memory`), of whose contents nothing reaches the next.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

from srcfast.config.settings import CandidatesConfig
from srcfast.data.forest import Forest
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.models import ImageFeatures
from srcfast.models.scorer import Scorer
from srcfast.models.sharding import keep_in_step
from srcfast.run.chunks import BATCHES, Done, Parts, work_through
from srcfast.run.progress import Track
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.candidates import decoding_memory, generate_candidates
from srcfast.stages.dpo import reference_logprobs, response_logprobs
from srcfast.stages.evaluation import Prediction, answer_greedily, predict
from srcfast.stages.rationale import PromptEncoder, image_keys
from srcfast.stages.scoring import BLOCK, Mode, scored_rows

PAIRS = 256  # preference pairs a piece, or requests for a log-probability

DependsOn = Callable[[], Mapping[str, Any]]
Groups = Iterator[tuple[str, list[Candidate]]]


def candidates_in_pieces(
    place: Path,
    depends_on: DependsOn,
    model: Any,
    samples: Sequence[Sample],
    settings: CandidatesConfig,
    *,
    features: ImageFeatures,
    seed: int,
    batch_size: int,
    progress: Track,
    graphs: bool = True,
) -> Parts:
    """`generate_candidates`, as rows of candidates."""

    def work(piece: Sequence[Sample]) -> Done:
        features.forget()
        found = generate_candidates(
            model,
            piece,
            settings,
            features=features,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
            graphs=graphs,
            memory=memory,
        )
        return [candidate.to_json() for own in found for candidate in own], {}

    with decoding_memory(model) as memory:
        parts = work_through(place, samples, BATCHES * batch_size, depends_on, work, progress, in_step_with(model))
    features.forget()  # no stage uses these
    return parts


def scores_in_pieces(
    place: Path,
    depends_on: DependsOn,
    scorer: Scorer,
    samples: Sequence[Sample],
    candidates: Callable[[], Groups],
    token_budget: int,
    mode: Mode,
    progress: Track,
    adaptive: AdaptivePairs | None = None,
) -> Parts:
    """`scored_rows` in the order of the candidates; the parts' counts are `adaptive`'s.

    Args:
        candidates: reads (sample id, its candidates), from the beginning each time. They are read twice: once for what there
            is, once to judge it, a piece at a time.
        progress: told how many samples have candidates.

    Raises:
        InputError: a candidate that can't be read, or a sample's candidates are not one after the other.
    """
    known = {sample.id: sample for sample in samples}
    digest, judged = hashlib.sha256(), []
    for sample_id, own in candidates():
        if sample_id in known:
            judged.append(known[sample_id])
            digest.update(json.dumps([(one.id, one.text) for one in own]).encode())
    progress.expect(len(judged))
    groups = candidates()

    def work(piece: Sequence[Sample]) -> Done:
        counted = None if adaptive is None else replace(adaptive, counts=Counter())
        own = _next_of(groups, {sample.id for sample in piece})
        rows = list(scored_rows(scorer, piece, own, token_budget, mode, progress, counted))
        return rows, {} if counted is None else counted.counts

    def on_candidates() -> Mapping[str, Any]:
        return {**depends_on(), "candidates": digest.hexdigest()}

    return work_through(place, judged, 4 * BLOCK, on_candidates, work, progress)


def _next_of(groups: Groups, wanted: set[str]) -> dict[str, list[Candidate]]:
    """The next candidates of these samples, of which none was passed over yet; others' on the way are other ranks' work."""
    found: dict[str, list[Candidate]] = {}
    while len(found) < len(wanted):
        sample_id, own = next(groups)
        if sample_id in wanted:
            found[sample_id] = own
    return found


def answers_in_pieces(
    place: Path,
    depends_on: DependsOn,
    model: Any,
    samples: Sequence[Sample],
    *,
    features: ImageFeatures,
    max_new_tokens: int,
    batch_size: int,
    progress: Track,
    graphs: bool = True,
) -> Parts:
    """`answer_greedily`, as rows {id, text}; `predictions_of` reads them."""

    def work(piece: Sequence[Sample]) -> Done:
        features.forget()
        found = answer_greedily(model, piece, features, max_new_tokens, batch_size, progress, graphs, memory)
        return [{"id": one.sample.id, "text": one.text} for one in found], {}

    with decoding_memory(model) as memory:
        parts = work_through(place, samples, BATCHES * batch_size, depends_on, work, progress, in_step_with(model))
    features.forget()
    return parts


def predictions_of(samples: Sequence[Sample], answers: Parts) -> Iterator[Prediction]:
    """The samples' answers, parsed and judged as they are read, one at a time."""
    return (predict(sample, row["text"]) for sample, row in zip(samples, answers.rows(), strict=True))


def in_step_with(model: Any) -> Callable[[], None]:
    """What a rank does that has no piece left: nothing, unless the model's layers are shared out over the ranks."""
    return partial(keep_in_step, model.decoder)


def references_in_pieces(place: Path, depends_on: DependsOn, progress: Track) -> Callable[..., list[Preference]]:
    """What stands in for `reference_logprobs`: the same, in pieces; each call has a folder of its own under `place`."""
    calls = count()

    def logprobs(
        model: Any,
        preferences: Sequence[Preference],
        *,
        reference_hash: str,
        token_budget: int,
        features: ImageFeatures,
        on_forest: Callable[[Forest], None] | None = None,
    ) -> list[Preference]:
        def work(piece: Sequence[Preference]) -> Done:
            features.forget()
            done = reference_logprobs(
                model,
                piece,
                reference_hash=reference_hash,
                token_budget=token_budget,
                features=features,
                on_forest=on_forest,
            )
            return [
                {"chosen": one.reference_chosen_logprob, "rejected": one.reference_rejected_logprob} for one in done
            ], {}

        beside = in_step_with(model)
        parts = work_through(place / str(next(calls)), preferences, PAIRS, depends_on, work, progress, beside)
        return [
            replace(
                pair,
                reference_chosen_logprob=row["chosen"],
                reference_rejected_logprob=row["rejected"],
                extra={**pair.extra, "reference_hash": reference_hash},
            )
            for pair, row in zip(preferences, parts.rows(), strict=True)
        ]

    return logprobs


def logprobs_in_pieces(
    place: Path,
    depends_on: DependsOn,
    model: Any,
    requests: Sequence[Sample],
    *,
    features: ImageFeatures,
    token_budget: int,
    progress: Track,
) -> Parts:
    """`response_logprobs` of the requests' answers, each after its question; `logprobs_of` reads them.

    Answers to the same prompt share it within a piece, and pieces are cut where the same prompts follow each other.

    Raises:
        InputError: a prompt that does not fit the model, before any is computed; it names the request.
    """
    encode = PromptEncoder(model)
    for one in requests:
        encode(one, one.question, one.id)

    def work(piece: Sequence[Sample]) -> Done:
        features.forget()
        items = [
            (encode(one, one.question, one.id), image_keys(one), model.encode_response(one.answer)) for one in piece
        ]
        found = response_logprobs(
            model,
            items,
            token_budget=token_budget,
            features=features,
            on_forest=lambda forest: progress.advance(
                sum(len(tree.segments) - 1 for tree in forest.trees), tokens=forest.num_tokens
            ),
        )
        return [{"logprob": value, "tokens": tokens} for value, tokens in found], {}

    ordered = [requests[index] for index in _same_prompts_together(requests)]
    return work_through(place, ordered, PAIRS, depends_on, work, progress, in_step_with(model))


def logprobs_of(requests: Sequence[Sample], logprobs: Parts) -> list[dict[str, Any]]:
    """The requests' rows {logprob, tokens}, in the requests' order."""
    rows = zip(_same_prompts_together(requests), logprobs.rows(), strict=True)
    return [row for _, row in sorted(rows, key=itemgetter(0))]


def _same_prompts_together(requests: Sequence[Sample]) -> list[int]:
    """The requests' numbers by images and question: each image, too, is then encoded in few pieces."""
    return sorted(range(len(requests)), key=lambda index: (requests[index].images, requests[index].question))
