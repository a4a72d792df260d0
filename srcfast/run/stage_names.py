"""Names of a calibration's stages."""

from __future__ import annotations

KINDS_OF_ROUND = ("candidates", "headroom", "scores", "preferences", "dpo", "evaluation")


def planned_stages(iterations: int) -> list[str]:
    """List the stages of a calibration of so many rounds, in the order in which `calibrate` runs them."""
    rounds = (f"iteration-{number}/{kind}" for number in range(1, iterations + 1) for kind in KINDS_OF_ROUND)
    return ["base/evaluation", "rationale", "rationale/evaluation", *rounds]
