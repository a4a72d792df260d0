"""What the pieces of a command's work are compared by when the command is started again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srcfast.config.settings import Config
from srcfast.run.chunks import Chunks
from srcfast.stages import candidates, references
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


@pytest.mark.parametrize("work", ["candidates", "references"])
def test_pieces_of_another_policy_are_none_of_a_search_nor_of_references(
    work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Chunks] = []
    monkeypatch.setattr(candidates, "candidates_in_chunks", lambda chunks, *_, **__: given.append(chunks))
    monkeypatch.setattr(references, "references_in_chunks", given.append)
    monkeypatch.setattr(references, "reuse_candidate_logprobs", lambda *_, **__: None)

    def depends_on(policy_hash: str) -> dict[str, Any]:
        policy: Any = SimpleNamespace(model=None, features=None, hash=lambda: policy_hash)
        with command_stage(work, Config(quiet=True), tmp_path, 1, sections=("dpo",), models=list) as stage:
            if work == "candidates":
                candidates.search_candidates(stage, policy, [], 3)
            else:
                references.stage_references(stage, policy, [], {}, {}, 3)
        return dict(given.pop().depends_on())

    assert depends_on("p")["policy"] == "p" and depends_on("p") == depends_on("p") != depends_on("q")
