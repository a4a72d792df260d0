"""Calibrate an R-Scorer's confidence: one temperature of the verdict logits for each quality of reference.

The temperature (Guo et al., 2017, arXiv 1706.04599) minimises the negative log-likelihood of the right verdicts of held-out
pairs. It changes no likeliest verdict, but how sure of it the R-Scorer is, and by that every share of a win and confidence.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from srcfast.data.jsonl import parse_object, regular
from srcfast.errors import InputError

CALIBRATION = "calibration.json"  # beside the checkpoint: {quality: {temperature, verdict, ...}}
LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are searched
BINS = 10  # of confidence, of equal width


def read_calibration(directory: Path, quality: str, verdict: str) -> dict[str, Any]:
    """Read the calibration for a quality of reference, with its `temperature`; {} where none is for it and this form of verdict.

    Raises:
        InputError: the file can't be read, or its temperature is no number in the bounds that are searched.
    """
    file = directory / CALIBRATION
    if not file.exists():
        return {}
    fix = "remove the file, or train the R-Scorer again"
    try:
        entry = parse_object(regular(file).read_bytes()).get(quality)
    except (OSError, ValueError) as error:
        raise InputError(file=file, expected="the R-Scorer's calibration, in JSON", found=error, fix=fix) from error
    if entry is None or (isinstance(entry, dict) and entry.get("verdict") != verdict):
        return {}
    temperature = entry.get("temperature") if isinstance(entry, dict) else None
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
        or not LOWEST <= temperature <= HIGHEST
    ):
        expected = f"a number from {LOWEST} to {HIGHEST:g}"
        raise InputError(file=file, field=f"{quality}.temperature", expected=expected, found=repr(temperature), fix=fix)
    return dict(entry)


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Find the temperature under which the right verdicts `targets` [n] are likeliest, by golden-section search.

    The loss has one minimum, being convex in 1 / temperature. Without a minimum in the bounds the nearer bound is returned.

    Args:
        logits: [n, K] of the verdict tokens, n > 0.
        targets: [n], the index of the right verdict.
    """
    low, high = math.log(LOWEST), math.log(HIGHEST)
    share = (math.sqrt(5) - 1) / 2

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, targets, math.exp(log_temperature))

    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(40):  # narrows the interval to 3e-8
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2)


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    """Compute the mean negative log-likelihood in nats of `targets` [n] under softmax(logits [n, K] / temperature)."""
    shares = softmax(logits, temperature)
    return float(-np.log(np.maximum(shares[np.arange(len(targets)), targets], np.finfo(np.float64).tiny)).mean())


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Compute softmax(logits / temperature) over the last axis, in fp64."""
    scaled = logits.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Compare confidence in verdicts with how often they are right, by bins of confidence.

    Args:
        confidence: [n] in [0, 1], n > 0.
        right: [n] bool.

    Returns:
        The expected calibration error, the mean over verdicts of |share right - mean confidence| of their bin; and the bins
        that have verdicts: bounds, count, mean confidence, share right.
    """
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)  # [n]
    error, rows = 0.0, []
    for index in np.unique(bins).tolist():
        of_bin = bins == index
        mean, accuracy = float(confidence[of_bin].mean()), float(right[of_bin].mean())
        error += float(of_bin.mean()) * abs(accuracy - mean)
        bounds = [index / BINS, (index + 1) / BINS]
        rows.append({"bounds": bounds, "pairs": int(of_bin.sum()), "confidence": mean, "accuracy": accuracy})
    return error, rows
