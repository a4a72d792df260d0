"""Which oracle verifies a sample, and that none verifies any other."""

from __future__ import annotations

from typing import Any

import pytest

from srcfast.data.rationale_format import ParsedResponse, parse_response
from srcfast.data.records import Sample
from srcfast.world.verification import can_verify, verify_sample

CIRCLE = {"shape": "circle", "color": "red", "size": "small", "place": "top"}
SCENE: dict[str, Any] = {
    "scene": {"objects": [CIRCLE], "background": "plain"},
    "program": {"op": "query", "attribute": "color", "of": {"shape": "circle"}},
}
SEEN = "<see> There is a small red circle at the top. </see> <think> The circle is red. </think> <answer> red </answer>"


def sample(extra: dict[str, Any], answer: str = "red") -> Sample:
    return Sample("s", (), "What color is the circle?", answer, extra=extra)


def test_a_scene_s_sample_goes_to_the_oracle_of_scenes() -> None:
    right = verify_sample(sample(SCENE), parse_response(SEEN))
    wrong = verify_sample(sample(SCENE), parse_response(SEEN.replace("small", "large")))
    assert right is not None and right.aligned and right.case == "both_right"
    assert wrong is not None and not wrong.aligned and wrong.case == "right_answer_wrong_rationale"


@pytest.mark.parametrize(
    "extra", [{}, {"scene": SCENE["scene"]}, {"program": SCENE["program"]}, SCENE | {"scene": None}, {"kind": "count"}]
)
def test_a_sample_without_truth_or_program_is_not_verified(extra: dict[str, Any]) -> None:
    assert not can_verify(sample(extra))
    assert verify_sample(sample(extra), ParsedResponse((), (), "red")) is None
