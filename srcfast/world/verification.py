"""Verify a response by the oracle of its sample's data family, which the sample's `extra` tells."""

from __future__ import annotations

from collections.abc import Callable

from srcfast.data.rationale_format import ParsedResponse
from srcfast.data.records import Sample
from srcfast.world import clip_oracle, number_oracle, oracle
from srcfast.world.judgement import CASES, Verification

__all__ = ["CASES", "Verification", "can_verify", "verify_sample"]


def _verify_scene(sample: Sample, response: ParsedResponse) -> Verification:
    return oracle.verify(response, sample.extra["program"], sample.extra["scene"], sample.answer)


def _verify_clip(sample: Sample, response: ParsedResponse) -> Verification:
    return clip_oracle.verify_clip(response, sample.extra["program"], sample.extra["clip"], sample.answer)


# The oracles, by the key of `extra` that holds the truth about the images. The question is in `extra["program"]`.
_ORACLES: dict[str, Callable[[Sample, ParsedResponse], Verification]] = {
    "scene": _verify_scene,
    "numbers": number_oracle.verify,
    "clip": _verify_clip,
}


def _truth_of(sample: Sample) -> str | None:
    """Return the key of the truth about the sample's images; None if no oracle can verify the sample."""
    known = (key for key in _ORACLES if sample.extra.get(key) is not None)
    return next(known, None) if sample.extra.get("program") is not None else None


def can_verify(sample: Sample) -> bool:
    """Return whether an oracle can verify responses to a sample."""
    return _truth_of(sample) is not None


def verify_sample(sample: Sample, response: ParsedResponse) -> Verification | None:
    """Verify a response by the sample's oracle. Returns None for a sample that none can verify.

    Raises:
        InputError: the sample's truth or program is malformed. No response text raises.
    """
    truth = _truth_of(sample)
    return None if truth is None else _ORACLES[truth](sample, response)
