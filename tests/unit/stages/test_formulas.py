"""The judge's formulas by hand: verdict logits to p, q, u and S, through the operation that scoring calls."""

import numpy as np
import pytest
import torch

from srcfast_kernels import pairwise_verdict

CHOICE = torch.tensor([1.0, 0.5, 0.0])
PAIRS = [(i, j) for i in range(3) for j in range(3) if i != j]


def judge(verdicts, n=3):
    """Run pairwise_verdict on verdicts {(i, j): (first, tie, second)}: the head is the identity."""
    pairs = list(verdicts)
    hidden = torch.tensor([verdicts[pair] for pair in pairs]).log().clamp_min(-60.0)
    output = pairwise_verdict(
        hidden,
        torch.eye(3),
        torch.tensor([i for i, _ in pairs]),
        torch.tensor([j for _, j in pairs]),
        n,
        verdict_values=CHOICE,
    )
    return (np.asarray(x, dtype=float) for x in (output.win_probability, output.confidence, output.scores))


def random_verdicts(seed, n=3):
    rng = np.random.default_rng(seed)
    return {(i, j): tuple(rng.dirichlet([1, 1, 1])) for i in range(n) for j in range(n) if i != j}


def test_hand_computed_example():
    # p_01 = .8 + .1/2 = .85, p_10 = .1 + .2/2 = .2: q_01 = (.85 + 1 - .2)/2 = .825, u_01 = .65 * (1 - .05) =
    # .6175 p_02 = .5, p_20 = .5: q = .5, u = 0
    # p_12 = .6, p_21 = .6 (flips): q_12 = .5, u = 0
    verdicts = {
        (0, 1): (0.8, 0.1, 0.1),
        (1, 0): (0.1, 0.2, 0.7),
        (0, 2): (0.25, 0.5, 0.25),
        (2, 0): (0.0, 1.0, 0.0),
        (1, 2): (0.6, 0.0, 0.4),
        (2, 1): (0.5, 0.2, 0.3),
    }
    q, u, scores = judge(verdicts)
    assert q[0, 1] == pytest.approx(0.825, abs=1e-6) and q[1, 0] == pytest.approx(0.175, abs=1e-6)
    assert u[0, 1] == pytest.approx(0.6175, abs=1e-6) and u[1, 0] == pytest.approx(0.6175, abs=1e-6)
    assert u[0, 2] == pytest.approx(0.0, abs=1e-6) and u[1, 2] == pytest.approx(0.0, abs=1e-6)
    assert scores == pytest.approx([0.825, 0.175, 0.5], abs=1e-5)


def test_score_is_the_confidence_weighted_mean_of_wins():
    verdicts = random_verdicts(0)
    q, u, scores = judge(verdicts)
    p = {pair: first + tie / 2 for pair, (first, tie, _) in verdicts.items()}
    for i in range(3):
        others = [j for j in range(3) if j != i]
        wins = {j: (p[i, j] + 1 - p[j, i]) / 2 for j in others}
        weight = {j: abs(2 * wins[j] - 1) * (1 - abs(p[i, j] + p[j, i] - 1)) for j in others}
        expected = sum(weight[j] * wins[j] for j in others) / sum(weight.values())
        assert scores[i] == pytest.approx(expected, abs=1e-5)  # fp32
        for j in others:
            assert q[i, j] == pytest.approx(wins[j], abs=1e-6) and u[i, j] == pytest.approx(weight[j], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_wins_are_antisymmetric_and_confidence_symmetric(seed):
    q, u, scores = judge(random_verdicts(seed))
    away = ~np.eye(3, dtype=bool)
    assert (q + q.T)[away] == pytest.approx(1.0, abs=1e-6) and u == pytest.approx(u.T, abs=1e-6)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_renaming_the_candidates_renames_the_scores():
    verdicts, order = random_verdicts(7), [2, 0, 1]
    renamed = {(order.index(i), order.index(j)): value for (i, j), value in verdicts.items()}
    _, _, scores = judge(verdicts)
    _, _, moved = judge(renamed)
    assert moved == pytest.approx([scores[i] for i in order], abs=1e-6)


def test_neutral_verdicts_have_no_confidence_and_every_score_is_a_half():
    _, u, scores = judge({pair: (0.3, 0.4, 0.3) for pair in PAIRS})
    assert u == pytest.approx(0.0, abs=1e-6) and scores == pytest.approx(0.5, abs=1e-6)


def test_a_judge_that_always_prefers_the_first_has_no_confidence():
    _, u, scores = judge({pair: (1.0, 0.0, 0.0) for pair in PAIRS})
    assert u == pytest.approx(0.0, abs=1e-6) and scores == pytest.approx(0.5, abs=1e-6)
