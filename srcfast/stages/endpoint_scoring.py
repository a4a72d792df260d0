"""Stage 3 by a language model behind an endpoint: it compares every sample's candidates instead of an R-Scorer.

Rank 0 asks, and the others wait. All answers are in a log, by the content of the request: a stopped stage asks only what is
missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.data.records import Candidate, Sample
from srcfast.data.verdicts import Shares
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget, Limit
from srcfast.endpoint.client import Endpoint
from srcfast.errors import ConfigError, SrcfastError
from srcfast.run.progress import StageProgress, track
from srcfast.stages.endpoint_verdicts import Verdicts, ask_verdicts
from srcfast.stages.free_answers import judge_endpoint
from srcfast.stages.judged_pairs import RunPair
from srcfast.stages.scoring import expand_row
from srcfast_kernels.pairwise_verdict import verdict_scores

TIMEOUT = 120.0  # seconds until an attempt counts as failed


def check_endpoints(config: Config) -> None:
    """Check what a run asks endpoints for, before their addresses are written anywhere, and long before they are asked.

    Raises:
        ConfigError: an address or the key can't be used, or a stage needs ratings or comparisons that an endpoint does not give.
    """
    if config.evaluation.judge_endpoint is not None:
        judge_endpoint(config)
    if config.scorer.endpoint is None or not config.iterations:
        return
    scoring_endpoint(config)
    if samples := config.evaluation.headroom_samples:
        expected = "expected 0 with scorer.endpoint, whose requests are for the rounds' scores alone"
        raise ConfigError(f"evaluation.headroom_samples: {expected}, found {samples}. Fix: set it to 0")
    if config.curation.pairing == "score" and (least := config.curation.min_rating):
        expected = "0 with scorer.endpoint, which rates no candidate alone"
        raise ConfigError(f"curation.min_rating: expected {expected}, found {least}. Fix: set it to 0")


def scoring_endpoint(config: Config) -> Endpoint:
    """Return the server of `scorer.endpoint`. Raises ConfigError."""
    settings = config.scorer
    url, model = settings.endpoint or "", settings.endpoint_model or ""
    return Endpoint.from_environment(url, model, TIMEOUT, "scorer.endpoint")


def scores_by_endpoint(
    config: Config,
    samples: Sequence[Sample],
    groups: Iterable[tuple[str, Sequence[Candidate]]],
    log_file: Path,
    progress: StageProgress,
    write: Callable[[list[dict[str, Any]]], object],
) -> dict[str, Any]:
    """Ask the endpoint of `scorer.endpoint` for all pairs of each sample's candidates, in both orders, on rank 0.

    Args:
        groups: sample ids with their candidates; those of other samples are passed over.
        log_file: of the answers.
        write: called on rank 0 with the rows, those of `scored_rows` without `alone`.

    Returns:
        On every rank what the manifest says: verdicts that are missing by reason, sources of the others, tokens.

    Raises:
        SrcfastError: the limit of tokens is reached, or verdicts are missing that the same command may get.
    """

    def work() -> dict[str, Any]:
        rows, report = _ask(config, samples, groups, log_file, progress)
        write(rows)
        return report

    return distributed.run_long_on_rank_zero(work)


def _ask(
    config: Config,
    samples: Sequence[Sample],
    groups: Iterable[tuple[str, Sequence[Candidate]]],
    log_file: Path,
    progress: StageProgress,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    settings = config.scorer
    server = scoring_endpoint(config)
    by_id = {sample.id: sample for sample in samples}
    judged = [(by_id[name], list(group)) for name, group in groups if name in by_id]
    texts = [list(dict.fromkeys(candidate.text for candidate in group)) for _, group in judged]
    indices = [(n, i, j) for n, distinct in enumerate(texts) for i, j in combinations(range(len(distinct)), 2)]
    pairs = [RunPair(judged[n][0], texts[n][i], texts[n][j], "random", None) for n, i, j in indices]
    verdicts = Verdicts()
    log = AnswerLog(log_file)
    limits = [Limit("tokens", settings.endpoint_tokens)] if settings.endpoint_tokens else []
    budget = Budget(limits, log.prompt_tokens, log.completion_tokens)
    spent = budget.prompt_tokens + budget.completion_tokens
    try:
        with track("verdicts", 2 * len(pairs), "verdicts", quiet=config.quiet) as asking:
            asking.on_advance = distributed.heartbeat
            if pairs:
                limit, concurrency = settings.endpoint_max_tokens, settings.endpoint_concurrency
                ask_verdicts(server, pairs, limit, log, budget, concurrency, asking, verdicts, settings.reference)
    finally:
        log.close()
    reasons = Counter(verdicts.reasons.values())
    if unanswered := reasons["unanswered"]:
        raise SrcfastError(f"{unanswered} verdicts were not answered. Fix: the same command asks them again")
    if pairs and not verdicts.shares:
        fix = "raise scorer.endpoint_max_tokens for a model that thinks first, or take another model"
        raise SrcfastError(f"scorer.endpoint: expected a verdict on some pair, found none: {dict(reasons)}. Fix: {fix}")
    of_samples: list[dict[tuple[int, int], tuple[Shares, Shares]]] = [{} for _ in judged]
    for index, (n, i, j) in enumerate(indices):
        there, back = (verdicts.shares.get((index, order)) for order in (0, 1))
        if there is not None and back is not None:
            of_samples[n][i, j] = there, back
    rows = [
        score_row(sample, group, distinct, given)
        for (sample, group), distinct, given in zip(judged, texts, of_samples, strict=True)
    ]
    tokens = budget.prompt_tokens + budget.completion_tokens - spent
    progress.advance(len(judged), tokens=tokens)
    return rows, {"without_verdict": dict(reasons), "sources": dict(verdicts.sources), "tokens": tokens}


def score_row(
    sample: Sample,
    candidates: Sequence[Candidate],
    texts: Sequence[str],
    given: Mapping[tuple[int, int], tuple[Shares, Shares]],
) -> dict[str, Any]:
    """Compute a row of scores from verdicts, by the formulas that are an R-Scorer's, too.

    Args:
        texts: the candidates' distinct texts, n.
        given: of pairs (i, j) of them, i < j, the shares with i first and those with j first; others have no weight.
    """
    n = len(texts)
    p, compared = torch.full((n, n), 0.5, dtype=torch.float64), torch.zeros(n, n, dtype=torch.bool)
    flips = ties = 0
    for (i, j), (there, back) in given.items():
        p[i, j], p[j, i] = (shares[0] + 0.5 * shares[1] for shares in (there, back))
        compared[i, j] = compared[j, i] = True
        says = [int(np.argmax(shares)) - 1 for shares in (there, back)]  # -1 the first, 0 a tie, 1 the second
        flips += says[0] * says[1] > 0
        ties += says.count(0)
    output = verdict_scores(p, compared)
    result = {
        "scores": output.scores.numpy(),
        "win_probability": output.win_probability.numpy(),
        "confidence": output.confidence.numpy(),
        "raw": p.numpy(),
        "flip_rate": flips / len(given) if given else 0.0,
        "tie_rate": ties / (2 * len(given)) if given else 0.0,
        "pairs": len(given),
        "verdicts": 2 * len(given),
    }
    return expand_row(sample, candidates, texts, result)
