"""What the pieces of a command's work are compared by when the command is started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srcfast.config.settings import Config
from srcfast.stages.stage_run import command_stage

SETTINGS: dict[str, Any] = {"seed": 7, "model": {"path": "somewhere"}, "candidates": {"num_beams": 3}, "quiet": True}


def depends_on(directory: Path, inputs: str = "i", policy: str = "p", **settings: Any) -> dict[str, Any]:
    """Return what the chunks of a search by a command depend on."""
    config = Config.model_validate(SETTINGS | settings)
    with command_stage(
        "candidates",
        config,
        directory,
        4,
        sections=("candidates", "curation"),
        models=list,
        inputs=lambda: {"data": inputs},
    ) as stage:
        return dict(stage.chunks("a set", policy=lambda: policy).depends_on())


def test_a_command_s_chunks_depend_on_its_seed_model_sections_inputs_and_weights(tmp_path: Path) -> None:
    values = depends_on(tmp_path)
    assert values.keys() == {"seed", "model", "candidates", "curation", "inputs", "policy"}
    assert (values["seed"], values["model"]["path"], values["candidates"]["num_beams"]) == (7, "somewhere", 3)
    assert (values["inputs"], values["policy"]) == ({"data": "i"}, "p")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"model": {"path": "elsewhere"}},
        {"model": {"path": "somewhere", "dtype": "bfloat16"}},
        {"candidates": {"num_beams": 4}},
        {"curation": {"min_confidence": 0.25}},
        {"inputs": "j"},
        {"policy": "q"},
    ],
    ids=str,
)
def test_with_another_of_these_no_chunk_is_taken_for_finished(tmp_path: Path, change: dict[str, Any]) -> None:
    assert depends_on(tmp_path, **change) != depends_on(tmp_path)


@pytest.mark.parametrize("change", [{"dpo": {"epochs": 5}}, {"quiet": False}, {"iterations": 9}], ids=str)
def test_other_settings_change_no_chunk(tmp_path: Path, change: dict[str, Any]) -> None:
    assert depends_on(tmp_path, **change) == depends_on(tmp_path)
