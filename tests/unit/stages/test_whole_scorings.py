"""Score rows by settings in combination, against comparisons that are each run as a text of its own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.plain_scoring import contenders, plain_row
from helpers.plain_training import name_of, pairwise_cases

from srcfast.config.settings import ScorerConfig
from srcfast.data.in_order import InOrder
from srcfast.data.records import Candidate, Sample
from srcfast.models import scorer as scorer_module
from srcfast.models.scorer import Scorer, load_scorer, reference_text
from srcfast.run.chunks import Chunks
from srcfast.run.progress import StageProgress
from srcfast.stages import scoring
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.scoring import score_candidates, scores_in_chunks

CASES = pairwise_cases(
    {
        "verdict": ("choice", "graded"),
        "mode": ("pairwise", "independent"),
        "pairs": ("all", "adaptive"),
        "adaptive_margin": (0.0, 0.02, 1.0),
        "adaptive_contenders": (1, 2),
        "adaptive_confidence": (0.0, 0.003, 1.0),  # never, at times, and always wider
        "adaptive_audit": (0.0, 0.5, 1.0),
        "cpu_tokens": (0, 4096),
        "block": (1, 3, 64),
        "reference": ("facts", "rationale", "answer"),
    },
    seed=4,
)
WORDS = "red blue green gold none first second tie So it is".split()


@pytest.fixture(scope="module")
def scorers(scorer_directory: Path) -> dict[str, Scorer]:
    return {form: load_scorer(scorer_directory, verdict_form=form) for form in ("choice", "graded")}  # type: ignore[arg-type]


def world(reference: str) -> tuple[list[Sample], dict[str, list[Candidate]]]:
    """Six samples of one to seven candidates; some have one text twice, and some texts begin alike."""
    rng = np.random.default_rng(12)
    samples, groups = [], {}
    for number, count in enumerate((1, 2, 7, 3, 5, 6)):
        name = f"s{number}"
        facts = ("It is red.", "So it is.") if reference == "facts" else ()
        rationale = "It is red." if reference == "rationale" else None
        samples.append(Sample(name, (), "Which?", "red", rationale, facts))
        texts = [
            " ".join(["So it is", *rng.choice(WORDS, rng.integers(1, 5))][int(rng.integers(2)) :]) for _ in range(count)
        ]
        if number == 4:
            texts[3] = texts[0]
        groups[name] = [Candidate(f"{name}#{k}", name, text, "", "", -1.0) for k, text in enumerate(texts)]
    return samples, groups


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rows_are_those_of_comparisons_one_by_one(
    case: dict[str, Any], scorers: dict[str, Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dict(case)
    samples, groups = world(case.pop("reference"))
    monkeypatch.setattr(scoring, "BLOCK", case.pop("block"))
    monkeypatch.setattr(scorer_module, "CPU_TOKENS", case.pop("cpu_tokens"))  # 0: forests as small as the largest tree
    settings = ScorerConfig(**case)
    scorer, adaptive = scorers[settings.verdict].eval(), AdaptivePairs.of(settings)
    rows = score_candidates(scorer, samples, groups, 10_000, settings.mode, adaptive=adaptive)
    short = None
    if settings.pairs == "adaptive":
        short = {
            name: getattr(settings, f"adaptive_{name}") for name in ("margin", "contenders", "confidence", "audit")
        }
    assert [row["sample_id"] for row in rows] == [sample.id for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        reference = reference_text(sample.question, sample.answer, sample.facts, sample.rationale)
        texts = [candidate.text for candidate in groups[sample.id]]
        expected = plain_row(scorer, sample.id, reference, texts, settings.mode, short)
        assert row["candidate_ids"] == [candidate.id for candidate in groups[sample.id]]
        for name in ("pairs", "verdicts"):
            assert row[name] == expected[name], name
        for name in ("scores", "win_probability", "confidence", "raw", "alone", "flip_rate", "tie_rate"):
            # fp32. A score is a quotient of confidences, which may be small.
            tolerance = 1e-3 if name == "scores" else 2e-5
            np.testing.assert_allclose(row[name], expected[name], atol=tolerance, err_msg=f"{sample.id}, {name}")


def test_contenders_on_the_margin_and_ties_on_purpose() -> None:
    """Ratings of eighths: one within the margin exactly counts, and of equal ones the first is the better."""
    ratings = np.array([0.5, 0.75, 0.25, 0.75, 0.625, 0.25])
    for margin, count, chosen in (
        (0.0, 1, [1, 5]),
        (0.0, 2, [1, 2, 3, 5]),
        (0.125, 3, [1, 2, 3, 4, 5]),
        (0.125, 2, [1, 2, 3, 5]),
        (0.25, 4, [0, 1, 2, 3, 4, 5]),
    ):
        settings = ScorerConfig(pairs="adaptive", adaptive_margin=margin, adaptive_contenders=count)
        assert contenders(ratings.tolist(), margin, count) == chosen
        pairs = AdaptivePairs(settings).pairs(ratings)
        assert pairs == [(i, j) for i in chosen for j in chosen if i != j]
    assert [AdaptivePairs(ScorerConfig(adaptive_contenders=2)).is_short(n) for n in (4, 5)] == [False, True]


def test_the_agreement_of_two_rounds_is_measured_by_the_tournament_s_scores() -> None:
    adaptive = AdaptivePairs(ScorerConfig(pairs="adaptive"))
    adaptive.compare(np.array([0.9, 0.2, 0.5, 0.4]), np.array([0.7, 0.3, 0.8, 0.1]))  # best 0, worst 1
    adaptive.compare(np.array([0.1, 0.6]), np.array([0.2, 0.9]))  # as in the tournament
    adaptive.count(6, 12, 100, 400)
    adaptive.count(12, 12, 300, 400)
    report = adaptive.report()
    expected = {
        "samples": 2,
        "pairs_share": 18 / 24,
        "tokens_share": 400 / 800,
        "audited": 2,
        "same_best": 0.5,
        "same_worst": 0.5,
        "same_pair": 0.5,
        "best_shortfall": (0.8 - 0.7) / 2,
        "worst_shortfall": (0.3 - 0.1) / 2,
    }
    assert report == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("changed", ["text", "id", "order", "nothing"])
def test_chunks_of_other_candidates_are_scored_again(changed: str, scorers: dict[str, Scorer], tmp_path: Path) -> None:
    samples, groups = world("answer")

    def score(of: dict[str, list[Candidate]]) -> tuple[list[dict[str, Any]], int]:
        progress, run = StageProgress("scores", 6, quiet=True), []
        with pytest.MonkeyPatch.context() as patch:
            rows_of = scoring.scored_rows
            patch.setattr(scoring, "scored_rows", lambda *given: run.append(1) or rows_of(*given))
            files = scores_in_chunks(
                Chunks(tmp_path, dict, progress),
                scorers["choice"],
                samples,
                lambda: InOrder(of.items()),
                ScorerConfig(),
            )
        return list(files.rows()), len(run)

    before, first = score(groups)
    other = {name: list(group) for name, group in groups.items()}
    if changed == "text":
        other["s3"][1] = replace(other["s3"][1], text="So it is gold")
    elif changed == "id":
        other["s3"][1] = replace(other["s3"][1], id="another")
    elif changed == "order":
        other["s3"] = other["s3"][::-1]
    context = nullcontext() if changed == "nothing" else pytest.warns(RuntimeWarning, match="one of others")
    with context:
        after, again = score(other)
    assert (first, again) == (1, int(changed != "nothing"))
    assert (after == before) == (changed == "nothing")
