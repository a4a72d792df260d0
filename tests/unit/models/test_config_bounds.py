"""The table of bounds: published checkpoints pass, and each field, in each section, refuses what no model has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.published_configs import CONFIGS

from srcfast.errors import InputError
from srcfast.models.config_bounds import FILES, TABLE, check_files, position_limit
from srcfast.models.foreign_code import BOUNDS

ODD: tuple[Any, ...] = (-(10**12), 10**12, 1e30, -1e30, "words", {"a": -5e12}, [[-5e12]])
PUBLISHED = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_within_bounds(name: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(CONFIGS / name, tmp_path / name))
    assert (directory / "config.json").is_file()
    check_files(directory)


@pytest.mark.parametrize("field", [name for name in TABLE if name not in BOUNDS])
def test_what_no_model_has_is_refused_by_file_and_field(field: str, tmp_path: Path) -> None:
    for file in FILES:
        for section in ((), ("text_config",), ("image_processor",), ("a", "b")):
            for value in (one for one in ODD if field != "model_max_length" or one not in (10**12, 1e30)):
                settings: dict[str, Any] = {}
                inner = settings
                for name in section:
                    inner = inner.setdefault(name, {})
                inner[field] = value
                (tmp_path / file).write_text(json.dumps(settings))
                with pytest.raises(InputError, match=rf"{file}, field '{'.'.join((*section, field))}': expected"):
                    check_files(tmp_path)
        (tmp_path / file).unlink()


@pytest.mark.parametrize("field", ["image_token_id", "video_token_index", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [-2, 1.5, "3", 1 << 40, [3, -2], True])
def test_ids_are_whole_numbers_from_0(field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {field: value}}))
    with pytest.raises(InputError, match=rf"config.json, field 'text_config.{field}'"):
        check_files(tmp_path)


@pytest.mark.parametrize("value", [1, 0, "true", [], {}, 1.0])
def test_switches_are_true_or_false(value: Any, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_anything": value}))
    with pytest.raises(InputError, match=r"field 'do_anything': expected true or false"):
        check_files(tmp_path)


def test_a_file_is_read_to_a_bound(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer_config.json").open("wb") as file:
        file.truncate(1 << 30)  # without a byte on the disk
    with pytest.raises(InputError, match=r"tokenizer_config.json: expected .*found 1,073,741,824 bytes"):
        check_files(tmp_path)


def test_a_rotary_factor_of_null_is_none() -> None:
    rotary = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    assert position_limit(SimpleNamespace(max_position_embeddings=32, rope_parameters=rotary)) == 64
    assert position_limit(SimpleNamespace(max_position_embeddings=32, rope_parameters=rotary | {"factor": 4.0})) == 256
