"""Adaptive pairs: the second round compares who may be best or worst; what is left out and what it costs is counted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import candidates_of, sample, world

from srcfast.config.load import load_config
from srcfast.config.settings import CurationConfig, ScorerConfig
from srcfast.errors import ConfigError
from srcfast.models.scorer import ALONE, load_scorer
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.curation import curate
from srcfast.stages.scoring import score_candidates


@pytest.fixture(scope="module")
def scorer(scorer_directory):
    return load_scorer(scorer_directory)


def test_the_near_best_and_the_near_worst_are_compared_with_each_other_in_both_orders():
    ratings = np.array([0.5, 0.9, 0.1, 0.85, 0.6, 0.12])
    assert AdaptivePairs(ScorerConfig(adaptive_margin=0.1, adaptive_contenders=2)).pairs(ratings) == [
        (i, j) for i in (1, 2, 3, 5) for j in (1, 2, 3, 5) if i != j
    ]
    assert AdaptivePairs(ScorerConfig(adaptive_margin=0.01, adaptive_contenders=2)).pairs(ratings) == [(1, 2), (2, 1)]
    assert AdaptivePairs(ScorerConfig(adaptive_margin=1.0, adaptive_contenders=1)).pairs(ratings) == [(1, 2), (2, 1)]


def test_finalists_are_as_many_of_the_highest_and_of_the_lowest_however_far_apart():
    ratings = np.array([0.5, 0.9, 0.1, 0.55, 0.6, 0.3, 0.12])
    pairs = AdaptivePairs(ScorerConfig(finalists=2, adaptive_margin=0.0)).pairs(ratings)
    assert pairs == [(i, j) for i in (1, 2, 4, 6) for j in (1, 2, 4, 6) if i != j]
    assert [AdaptivePairs(ScorerConfig(finalists=2)).is_short(n) for n in (4, 5)] == [False, True]


def test_with_likelihood_as_prior_the_highest_finalists_are_those_of_the_highest_posterior():
    ratings, logprobs = np.array([0.8, 0.4, 0.2, 0.1, 0.05, 0.0]), np.array([-30.0, -20.0, -1.0, -2.0, 0.0, -25.0])
    # log rating + 0.1 log pi: -3.2, -2.9, -1.7, -2.5, -3.0, and of a rating of 0 the smallest
    pairs = AdaptivePairs(ScorerConfig(finalists=2, likelihood_weight=0.1)).pairs(ratings, logprobs=logprobs)
    assert {i for pair in pairs for i in pair} == {2, 3, 4, 5}  # the lowest are by rating alone
    without = AdaptivePairs(ScorerConfig(finalists=2)).pairs(ratings, logprobs=logprobs)
    assert {i for pair in without for i in pair} == {0, 1, 4, 5}


def test_the_candidate_of_the_highest_posterior_is_compared_though_it_is_rated_lowest():
    adaptive = AdaptivePairs(ScorerConfig(finalists=1, likelihood_weight=100.0))
    assert adaptive.pairs(np.array([0.3, 0.2, 0.1]), logprobs=np.array([-9.0, -8.0, -1.0])) == [(1, 2), (2, 1)]


def test_scoring_gives_each_text_the_log_probability_of_its_first_candidate(scorer):
    samples, groups = world(34, [9])
    first, *others = groups[samples[0].id]
    by_rating = np.argsort(score_candidates(scorer, samples, groups, 100_000)[0]["alone"], kind="stable").tolist()
    likeliest = by_rating[len(by_rating) // 2]  # of a middling rating
    spread = [replace(c, logprob=-1.0 if n == likeliest else -500.0) for n, c in enumerate((first, *others))]
    again = replace(spread[by_rating[0]], id="again", logprob=0.0)  # a text that has been, likelier
    adaptive = AdaptivePairs(ScorerConfig(finalists=1, likelihood_weight=10.0, adaptive_audit=0.0))
    row = score_candidates(scorer, samples, {samples[0].id: [*spread, again]}, 100_000, adaptive=adaptive)[0]
    compared = np.flatnonzero((np.array(row["raw"])[:-1, :-1] != 0.5).any(0)).tolist()
    assert compared == sorted({likeliest, by_rating[0]})


def test_a_weight_of_likelihood_wants_finalists():
    with pytest.raises(ConfigError, match="likelihood_weight: expected 0 without finalists, found 0.1"):
        load_config(None, ["scorer.likelihood_weight=0.1"])


def test_of_many_candidates_the_finalists_alone_are_compared(scorer):
    samples, groups = world(34, [9, 4])
    adaptive = AdaptivePairs.of(load_config(None, ["scorer.finalists=2", "scorer.adaptive_audit=0"]).scorer)
    rows = score_candidates(scorer, samples, groups, 100_000, adaptive=adaptive)
    by_rating = np.argsort(rows[0]["alone"], kind="stable").tolist()
    compared = np.array(rows[0]["raw"]) != 0.5
    assert sorted({*by_rating[:2], *by_rating[-2:]}) == np.flatnonzero(compared.any(0)).tolist()
    assert [row["verdicts"] for row in rows] == [4 * 3, 4 * 3]


@settings(max_examples=100, deadline=None)
@given(
    ratings=st.lists(st.floats(0, 1, allow_subnormal=False), min_size=3, max_size=9),
    margin=st.sampled_from([0.0, 0.1, 1.0]),
    contenders=st.integers(1, 4),
)
def test_best_and_worst_rated_are_always_compared_and_never_one_with_itself(ratings, margin, contenders):
    pairs = AdaptivePairs(ScorerConfig(adaptive_margin=margin, adaptive_contenders=contenders)).pairs(np.array(ratings))
    assert pairs and len(set(pairs)) == len(pairs)
    assert all(i != j and (j, i) in pairs for i, j in pairs)
    compared = {i for pair in pairs for i in pair}
    assert 2 <= len(compared) <= 2 * contenders
    assert max(ratings) == max(ratings[i] for i in compared) and min(ratings) == min(ratings[i] for i in compared)


def test_rows_hold_the_judged_pairs_as_the_tournament_has_them_and_nothing_of_the_others(scorer):
    samples, groups = world(31, [6, 7, 2, 1])
    adaptive = AdaptivePairs(ScorerConfig(adaptive_margin=0.05, adaptive_contenders=2, adaptive_audit=0.0))
    rows = score_candidates(scorer, samples, groups, 100_000, adaptive=adaptive)
    for row, full in zip(rows, score_candidates(scorer, samples, groups, 100_000), strict=True):
        n = len(row["scores"])
        assert row["alone"] == pytest.approx(full["alone"], abs=1e-5)  # fp32, packed otherwise
        chosen = (
            adaptive.pairs(np.array(row["alone"])) if n > 4 else [(i, j) for i in range(n) for j in range(n) if i != j]
        )
        raw, u = np.array(row["raw"]), np.array(row["confidence"])
        for i in range(n):
            for j in range(n):
                if (i, j) in chosen:
                    assert raw[i, j] == pytest.approx(full["raw"][i][j], abs=1e-5)
                    assert u[i, j] == pytest.approx(full["confidence"][i][j], abs=1e-4)
                else:
                    assert raw[i, j] == 0.5 and u[i, j] == 0.0 and row["win_probability"][i][j] == 0.5
        assert row["verdicts"] == len(chosen) and row["pairs"] == len(chosen) // 2
        if n > 1:
            assert all(0.0 <= rate <= 1.0 for rate in (row["flip_rate"], row["tie_rate"]))
    report = adaptive.report()
    judged = sum(row["verdicts"] for row in rows)
    assert report["pairs_share"] == pytest.approx(judged / (30 + 42 + 2)) and report["samples"] == 3
    assert report["audited"] == 0 and report["same_best"] is None
    assert rows == score_candidates(
        scorer,
        samples,
        groups,
        100_000,
        adaptive=AdaptivePairs(ScorerConfig(adaptive_margin=0.05, adaptive_contenders=2, adaptive_audit=0.0)),
    )


def test_tokens_are_counted_over_both_rounds(scorer):
    samples, groups = world(32, [8])
    ran = []

    class Progress:
        def advance(self, count, tokens=0):
            ran.append(tokens)

    adaptive = AdaptivePairs(ScorerConfig(adaptive_margin=0.0, adaptive_contenders=1, adaptive_audit=0.0))
    score_candidates(scorer, samples, groups, 100_000, progress=Progress(), adaptive=adaptive)
    score_candidates(scorer, samples, groups, 100_000, progress=Progress())
    assert adaptive.counts["tokens"] == ran[0] and adaptive.counts["all_tokens"] == ran[1]
    assert ran[0] < 0.6 * ran[1]


def test_the_wider_pairs_are_of_twice_as_many_contenders_whatever_the_margin():
    ratings = np.array([0.5, 0.9, 0.1, 0.85, 0.6, 0.12])
    adaptive = AdaptivePairs(ScorerConfig(adaptive_margin=0.0, adaptive_contenders=1))
    assert adaptive.pairs(ratings) == [(1, 2), (2, 1)]
    assert adaptive.pairs(ratings, wider=True) == [(i, j) for i in (1, 2, 3, 5) for j in (1, 2, 3, 5) if i != j]


def test_the_best_is_uncertain_by_the_confidence_between_the_two_that_score_best_among_the_compared():
    adaptive = AdaptivePairs(ScorerConfig(adaptive_confidence=0.3))
    scores, u = np.array([0.9, 0.4, 0.7, 0.8]), np.zeros((4, 4))
    u[0, 2] = u[2, 0] = 0.3
    u[0, 3] = u[3, 0] = 0.29
    assert not adaptive.is_uncertain(scores, u, [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)])  # 3 was not compared
    assert adaptive.is_uncertain(scores, u, [(0, 3), (3, 0), (0, 2), (2, 0), (2, 3), (3, 2)])


@pytest.mark.parametrize("audit", [0.0, 1.0])
def test_samples_whose_best_is_uncertain_get_a_third_round_and_are_counted(scorer, audit):
    samples, groups = world(35, [9, 8, 9, 3, 7, 9])
    words = {"adaptive_margin": 0.0, "adaptive_contenders": 1, "adaptive_audit": audit}
    ran = []

    class Progress:
        def advance(self, count, tokens=0):
            ran.append(tokens)

    narrow = score_candidates(
        scorer, samples, groups, 100_000, adaptive=AdaptivePairs(ScorerConfig(**words | {"adaptive_audit": 0.0}))
    )
    between = [float(np.max(row["confidence"])) for row in narrow]  # of the two that were compared
    threshold = sorted(between)[3] + 1e-4  # fp32: far from what rounding moves
    wider = [u < threshold for u in between]
    assert 4 <= sum(wider) < 6
    adaptive = AdaptivePairs(ScorerConfig(**words, adaptive_confidence=threshold))
    rows = score_candidates(scorer, samples, groups, 100_000, progress=Progress(), adaptive=adaptive)
    report = adaptive.report()
    assert report["widened"] == pytest.approx(sum(wider) / 6) and report["samples"] == 6
    # Four of a sample's candidates are compared in place of two, or all three.
    verdicts = [(6 if k == 3 else 12) if wide else 2 for k, wide in enumerate(wider)]
    assert report["pairs_share"] == pytest.approx(sum(verdicts) / (72 + 56 + 72 + 6 + 42 + 72))
    if audit:
        assert report["audited"] == 6
    else:
        assert [row["verdicts"] for row in rows] == verdicts and adaptive.counts["tokens"] == ran[
            0
        ]  # over three rounds


def test_an_audited_sample_is_judged_in_full_and_compared(scorer):
    samples, groups = world(33, [6, 5])
    adaptive = AdaptivePairs(ScorerConfig(adaptive_margin=0.0, adaptive_contenders=1, adaptive_audit=1.0))
    rows = score_candidates(scorer, samples, groups, 100_000, adaptive=adaptive)
    full = score_candidates(scorer, samples, groups, 100_000)
    same, lost = [], []
    for row, whole in zip(rows, full, strict=True):
        assert row["scores"] == pytest.approx(whole["scores"], abs=1e-4) and row["verdicts"] == whole["verdicts"]
        (i, j), _ = adaptive.pairs(np.array(row["alone"]))
        # Of one pair the winner is best and the loser worst, whatever their scores in the tournament are.
        scores, q = np.array(whole["scores"]), np.array(whole["win_probability"])[i, j]
        best, worst = (i, j) if q > 0.5 else (j, i)
        same.append((scores[best] == scores.max(), scores[worst] == scores.min()))
        lost.append((scores.max() - scores[best], scores[worst] - scores.min()))
    report = adaptive.report()
    assert report["audited"] == 2 and report["same_pair"] == pytest.approx(np.mean([all(both) for both in same]))
    assert (report["same_best"], report["same_worst"]) == pytest.approx(tuple(np.mean(same, axis=0)))
    assert (report["best_shortfall"], report["worst_shortfall"]) == pytest.approx(
        tuple(np.mean(lost, axis=0)), abs=1e-4
    )
    assert report["pairs_share"] == pytest.approx(4 / 50)  # without the audit's own


def test_the_audit_draws_by_id_and_at_its_share():
    drawn = [AdaptivePairs(ScorerConfig(adaptive_audit=0.1)).is_audited(f"s{k}") for k in range(2000)]
    assert 150 < sum(drawn) < 250  # 3.7 standard deviations of 2,000 draws at 0.1
    assert drawn == [AdaptivePairs(ScorerConfig(adaptive_audit=0.1)).is_audited(f"s{k}") for k in range(2000)]


def test_curation_takes_adaptive_rows_and_its_mean_confidence_is_of_judged_pairs(scorer):
    texts = [f"<see> There is a {word} circle. </see> <answer> red </answer>" for word in "abcdefg"]
    candidates = {"s0": candidates_of("s0", texts)}
    rows = score_candidates(
        scorer,
        [sample(0)],
        candidates,
        100_000,
        adaptive=AdaptivePairs(ScorerConfig(adaptive_margin=0.0, adaptive_contenders=2, adaptive_audit=0.0)),
    )
    settings_ = CurationConfig(min_margin=0.0, min_confidence=0.0, max_length_ratio=100.0)
    pairs, funnel = curate([sample(0)], candidates, rows, settings_)
    u = np.array(rows[0]["confidence"])
    places = [int(pairs[0].extra[name].rpartition("/")[2]) for name in ("chosen_id", "rejected_id")]
    assert len(pairs) == 1 and pairs[0].confidence == u[places[0], places[1]] > 0.0
    assert funnel["mean_confidence"] == pytest.approx(u[np.triu_indices(7, 1)].sum() / rows[0]["pairs"])
    assert sum(funnel["confidence_histogram"]["counts"]) == rows[0]["pairs"]


def test_the_config_asks_for_it():
    assert AdaptivePairs.of(load_config(None).scorer) is None
    section = load_config(None, ["scorer.pairs=adaptive", "scorer.adaptive_contenders=3"]).scorer
    pairs = AdaptivePairs.of(section)
    assert pairs is not None and pairs.settings == section
    assert pairs.is_short(7) and not pairs.is_short(6) and ALONE == -1
