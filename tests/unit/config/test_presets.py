"""Presets: what lies beneath a user's settings, and that each fits the memory that it is named after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from helpers.shapes_7b import write_configs

from srcfast.config.load import PRESETS, load_config, load_with_sources
from srcfast.config.settings import Config, Preset
from srcfast.errors import ConfigError
from srcfast.memory.advice import largest_value
from srcfast.memory.plan import STAGES, forecast_stage, policy_stays
from srcfast.units import parse_bytes

NAMES = get_args(Preset)


@pytest.fixture(scope="module")
def shapes_7b(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name LLaVA-1.5-7B's shapes and a 1.5B R-Scorer's."""
    model, scorer = write_configs(tmp_path_factory.mktemp("shapes"))
    return [f"model.path={model}", f"scorer.path={scorer}"]


def test_there_is_a_file_for_each_name() -> None:
    assert sorted(NAMES) == sorted(file.stem for file in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_each_stage_of_a_7b_lvlm_fits_with_the_margin(name: str, stage: str, shapes_7b: list[str]) -> None:
    config = load_config(None, [f"preset={name}", *shapes_7b])
    memory = parse_bytes(name)
    assert parse_bytes(config.memory or "0B") == memory
    forecast = forecast_stage(config, stage, memory=memory)
    assert forecast.peak <= 0.9 * memory
    assert forecast.checkpoint_every == 0  # at typical lengths nothing is computed twice


@pytest.mark.parametrize("name", NAMES)
def test_what_is_there_is_used(name: str, shapes_7b: list[str]) -> None:
    config = load_config(None, [f"preset={name}", *shapes_7b])
    memory = parse_bytes(name)
    used = [forecast_stage(config, stage, memory=memory).peak / memory for stage in ("rationale", "candidates", "dpo")]
    assert min(used) >= 0.6
    assert policy_stays(config, memory)
    # Half as many candidates' samples or DPO's pairs again would not fit any more without another price.
    beyond = forecast_stage(config, "dpo", memory=memory, token_budget=round(1.5 * max(config.dpo.token_budget, 1024)))
    assert beyond.checkpoint_every > 0
    assert config.candidates.batch_size == largest_value(config, "candidates.batch_size", "candidates", memory=memory)


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_of_eight_candidates_can_be_judged_under_every_preset(name: str, shapes_7b: list[str]) -> None:
    from srcfast.memory.plan import Lengths, typical_tree

    config = load_config(None, [f"preset={name}", *shapes_7b])
    assert typical_tree(config, "scores", Lengths()).num_tokens <= config.scorer.token_budget


@pytest.mark.parametrize("name", NAMES)
def test_training_sees_as_many_pairs_an_update_under_every_preset(name: str) -> None:
    for section in (load_config(None, [f"preset={name}"]).rationale, load_config(None, [f"preset={name}"]).dpo):
        assert section.micro_batch_size * section.gradient_accumulation_steps == 32


def test_the_users_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("preset: 24GiB\nmodel: {quantize: none, path: here}\ndpo:\n  beta: 0.3\nevaluation:\n")
    config = load_config(file, ["dpo.micro_batch_size=7", "lora.r=8"])
    below = yaml.safe_load((PRESETS / "24GiB.yaml").read_text())
    assert (config.model.quantize, config.model.path, config.model.dtype) == ("none", "here", "bfloat16")
    assert (config.dpo.beta, config.dpo.micro_batch_size) == (0.3, 7)
    assert config.dpo.token_budget == below["dpo"]["token_budget"] != Config().dpo.token_budget
    assert config.evaluation.batch_size == below["evaluation"]["batch_size"]


def test_a_preset_on_the_command_line_takes_the_place_of_the_files(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("preset: 24GiB\ndpo: {epochs: 3}\n")
    config = load_config(file, ["preset=12GiB"], "dpo")
    assert (config.memory, config.dpo.epochs, config.dpo.optimizer) == ("12GiB", 3, "adamw_8bit")


def test_a_resolved_config_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = load_config(None, ["preset=48GiB", "dpo.token_budget=5000", "candidates.batch_size=1"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file) == config


@pytest.mark.parametrize("value", ["13GiB", "../presets/12GiB", "[12GiB]", "{a: 1}", "12"])
def test_another_preset_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="preset"):
        load_config(None, [f"preset={value}"])


def test_a_preset_says_nothing_of_data_or_method() -> None:
    allowed: set[Any] = {"memory", "model", "scorer", "rationale", "dpo", "candidates", "evaluation"}
    for file in PRESETS.glob("*.yaml"):
        tree = yaml.safe_load(file.read_text())
        assert set(tree) == allowed
        assert not {"path", "beta", "learning_rate", "epochs"} & {
            key for part in tree.values() if isinstance(part, dict) for key in part
        }


def test_a_setting_comes_from_where_it_was_set_last_and_others_from_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("preset: 24GiB\ndpo:\n  micro_batch_size: 2\n")
    _, sources = load_with_sources(file, ["candidates.num_beams=4"])
    assert sources["dpo.micro_batch_size"] == f"{file}, line 3"
    assert sources["candidates.num_beams"] == "override 'candidates.num_beams=4'"
    assert sources["dpo.token_budget"] == sources["candidates.batch_size"] == "preset 24GiB"
    assert "dpo.beta" not in sources
