"""The temperature of verdict logits, and how calibrated confidence is: SciPy's minimum, and sums by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.seeds import fresh_rng

from srcfast.errors import InputError
from srcfast.models.scorer import load_scorer, scorer_hash, slot_hidden
from srcfast.models.verdict_temperature import CALIBRATION, fit_temperature, reliability, softmax

LOGITS = np.array(
    [[2.0, 0.0, -1.0], [1.5, 0.5, 0.0], [-1.0, 0.0, 3.0], [0.5, 2.0, 0.0], [3.0, 1.0, -2.0], [0.0, -1.0, 1.0]]
)


@pytest.mark.parametrize(("targets", "expected"), [((0, 1, 2, 1, 2, 0), 4.4009458), ((0, 1, 2, 1, 0, 0), 0.9568816)])
def test_the_temperature_is_scipy_s(targets: tuple[int, ...], expected: float) -> None:
    """SciPy 1.17.1's minimize_scalar(method="bounded") of -log_softmax(logits / T)[targets].mean() over [0.05, 20]."""
    assert fit_temperature(LOGITS, np.array(targets)) == pytest.approx(expected, rel=1e-6)  # its loss is flat to 1e-14


@pytest.mark.parametrize("verdicts", [3, 5])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_at_the_temperature_torch_s_cross_entropy_has_no_slope(verdicts: int, sharpness: float) -> None:
    rng = fresh_rng()
    truth = rng.normal(size=(3000, verdicts))
    targets = np.array([rng.choice(verdicts, p=row) for row in torch.from_numpy(truth).softmax(-1).numpy()])
    logits = truth * sharpness  # calibrated at the temperature `sharpness`
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(sharpness, rel=0.15)  # 3,000 draws: a standard deviation is 0.03
    temperature = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits) / temperature, torch.from_numpy(targets))
    loss.backward()
    assert temperature.grad is not None and abs(float(temperature.grad)) * found < 1e-6


def test_without_a_minimum_the_nearer_bound_is_taken() -> None:
    logits = np.array([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
    assert fit_temperature(logits, np.array([0, 2])) == pytest.approx(0.05, rel=1e-6)  # always right
    assert fit_temperature(logits, np.array([2, 0])) == pytest.approx(20.0, rel=1e-6)  # always wrong
    extreme = np.array([[3e4, 0.0, -3e4]])
    assert np.isfinite(fit_temperature(extreme, np.array([2])))


def test_softmax_is_torch_s() -> None:
    logits = fresh_rng().normal(scale=5, size=(20, 3))
    np.testing.assert_allclose(softmax(logits, 2.5), torch.from_numpy(logits / 2.5).softmax(-1).numpy(), rtol=1e-12)


def test_expected_calibration_error_by_hand() -> None:
    confidence = np.array([0.41, 0.45, 0.49, 0.9, 0.95, 1.0, 0.62])
    right = np.array([True, False, False, True, True, False, True])
    error, rows = reliability(confidence, right)
    # Bins of 3, 1 and 3 verdicts: |1/3 - 0.45|, |1 - 0.62| and |2/3 - 0.95|, weighted by 3, 1 and 3 of 7.
    assert error == pytest.approx((3 * (0.45 - 1 / 3) + 0.38 + 3 * (0.95 - 2 / 3)) / 7)
    assert [row["pairs"] for row in rows] == [3, 1, 3]
    assert [row["bounds"] for row in rows] == [[0.4, 0.5], [0.6, 0.7], [0.9, 1.0]]
    assert [row["confidence"] for row in rows] == pytest.approx([0.45, 0.62, 0.95])
    assert [row["accuracy"] for row in rows] == pytest.approx([1 / 3, 1.0, 2 / 3])


def test_a_calibration_beside_the_checkpoint_scales_the_logits_of_its_quality_alone(
    scorer_directory: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(scorer_directory, tmp_path / "scorer"))
    plain = load_scorer(directory)
    calibration = {
        "noisy": {"temperature": 2.5, "verdict": "choice"},
        "partial": {"temperature": 1, "verdict": "choice"},
    }
    (directory / CALIBRATION).write_text(json.dumps(calibration))
    cases: tuple[tuple[dict[str, str], float], ...] = (
        ({"quality": "noisy"}, 2.5),
        ({"quality": "noisy", "verdict_form": "graded"}, 1.0),  # it was fitted to the other form's verdicts
        ({"quality": "partial"}, 1.0),
        ({"quality": "answer"}, 1.0),
        ({}, 1.0),
    )
    assert [load_scorer(directory, **words).temperature for words, _ in cases] == [found for _, found in cases]  # type: ignore[arg-type]
    told = load_scorer(directory, quality="noisy").eval()
    assert scorer_hash(told) != scorer_hash(plain) == scorer_hash(load_scorer(directory))
    tree = told.judge_tree("Facts\n", ["red red", "red blue", "green"])
    slots = slot_hidden(told, [tree], 4096)[0]
    with torch.no_grad():
        logits = plain.verdict_logits(slots).double()
        wins = told.win_and_verdict(slots)[0].numpy()
        head = told.verdict_head
        through_head = head.logits(slots).double()
    expected = (logits / 2.5).softmax(-1).numpy() @ np.array([1.0, 0.5, 0.0])
    np.testing.assert_allclose(wins, expected, atol=1e-12)
    torch.testing.assert_close(through_head, logits / 2.5, atol=1e-5, rtol=0)  # fp32
    assert np.abs(wins - plain.win_and_verdict(slots)[0].numpy()).max() > 1e-3


def test_a_soft_cap_s_logits_are_divided_after_it(scorer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srcfast.models.head import Head

    scorer = load_scorer(scorer_directory).eval()
    weight = scorer.text_model.decoder.head.weight
    monkeypatch.setattr(type(scorer.text_model.decoder), "head", property(lambda self: Head(weight, 0.7)))
    slots = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(int(fresh_rng().integers(1 << 31))))
    capped = scorer.verdict_head.logits(slots)
    scorer.temperature = 3.0
    torch.testing.assert_close(scorer.verdict_head.logits(slots), capped / 3.0)
    wins = (capped.double() / 3.0).softmax(-1) @ torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(scorer.win_and_verdict(slots)[0], wins, atol=1e-6, rtol=0)


def test_a_temperature_that_is_none_is_refused_by_name(scorer_directory: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(scorer_directory, tmp_path / "scorer"))
    for found in ("0", "-1", "null", '"1"', "true", "1e9"):
        (directory / CALIBRATION).write_text(f'{{"complete": {{"verdict": "choice", "temperature": {found}}}}}')
        with pytest.raises(InputError, match=r"calibration\.json.*complete\.temperature"):
            load_scorer(directory)
