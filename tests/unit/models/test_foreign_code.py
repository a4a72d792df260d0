"""No file of a checkpoint makes transformers fetch something from a hub, or import and run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.family_models import FamilyModels
from helpers.small_checkpoints import text_config, write_text_model
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import hub_kernels

from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.models.foreign_code import BOUNDS
from srcfast.models.text_model import load_text_model

REPOSITORY = "someone/kernels"
PLANTED: dict[str, Any] = {
    **dict.fromkeys(BOUNDS, REPOSITORY),
    "use_kernels": True,
    "use_pretrained_backbone": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": REPOSITORY}},
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What transformers asks a hub for."""
    asked: list[Any] = []

    def fetch(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise AssertionError("something was fetched")

    for module, name in ((hub_kernels, "get_kernel"), (hub_kernels, "load_and_register_attn_kernel")):
        monkeypatch.setattr(module, name, fetch)
    assert hasattr(flash, "lazy_import_flash_attention")  # which calls the latter
    return asked


def plant(directory: Path, field: str, *sections: str) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[field] = PLANTED[field]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("field", BOUNDS)
def test_a_text_model_that_names_a_repository_is_refused(field: str, fetched: list[Any], tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config())
    plant(tmp_path, field)
    with pytest.raises(InputError, match=rf"config\.json.*'{field}'.*Fix: remove the field"):
        load_text_model(tmp_path)
    assert not fetched


@pytest.mark.parametrize("sections", [("text_config",), ("vision_config",), ("vision_config", "inner")])
@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation", "use_pretrained_backbone"])
def test_an_lvlm_is_refused_by_any_section(
    field: str, sections: tuple[str, ...], fetched: list[Any], tmp_path: Path
) -> None:
    FamilyModels("internvl", tmp_path)
    plant(tmp_path, field, *sections)
    with pytest.raises(InputError, match=rf"'{'.'.join(sections)}.{field}'"):
        load_lvlm(tmp_path)
    assert not fetched


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_attn_implementation", "sdpa"),
        ("attn_implementation", {"text_config": "eager", "vision_config": None}),
        ("use_kernels", False),
        ("backbone", None),
    ],
)
def test_what_reaches_nothing_is_read(field: str, value: Any, tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    load_text_model(tmp_path)


def test_an_adapter_beside_a_base_does_not_replace_it(family: Callable[[str], FamilyModels], tmp_path: Path) -> None:
    """transformers would read the base that the adapter's config names."""
    FamilyModels("qwen3_vl", tmp_path)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(family("internvl").path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"adapter_config\.json.*an adapter beside the base"):
        load_lvlm(tmp_path)
