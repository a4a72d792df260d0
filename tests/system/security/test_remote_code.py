"""Code that comes with a checkpoint is never run: not by auto_map, not by a chat template, and no setting allows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.bombs import plant_code

from srcfast.config.load import load_config
from srcfast.config.settings import Config
from srcfast.errors import ConfigError, InputError
from srcfast.models import load_lvlm
from srcfast.models.checkpoint import read_config
from srcfast.models.scorer import load_scorer
from srcfast.models.text_model import load_tokenizer
from srcfast.models.vision import load_image_processor

ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"
# Ways out that a template might try: to Python's classes, to a function's globals, to a bound method's, by a filter, by a
# format string, and by changing what it was given.
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch WITNESS') }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('WITNESS', 'w') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('WITNESS', 'w') }}",
    "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
    "{{ ((messages|attr('__class__'))|attr('__base__')).__subclasses__() }}",
    "{{ '{0.__class__.__base__}'.format(messages) ~ messages.pop() }}",
    "{% for a in range(99999999999) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch WITNESS') }}",
)


@pytest.fixture
def evil_model(sound_model: Path, tmp_path: Path, witness: Path) -> Path:
    directory = Path(shutil.copytree(sound_model, tmp_path / "model"))
    plant_code(directory, witness)
    return directory


def run_or_refuse(load: Any, *arguments: Any) -> None:
    """A known architecture may load as transformers' own; what would need the code must be refused by name."""
    try:
        load(*arguments)
    except InputError as error:
        assert "custom code" in str(error) or "expected" in str(error)


def test_auto_map_in_every_config_runs_nothing(evil_model: Path, tmp_path: Path, witness: Path) -> None:
    for load in (read_config, load_tokenizer, load_image_processor, load_lvlm):
        run_or_refuse(load, evil_model)
        assert not witness.exists(), load
    judge = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "scorer"))
    plant_code(judge, witness)
    run_or_refuse(load_scorer, judge)
    assert not witness.exists()


def test_an_architecture_that_is_only_in_the_checkpoints_code_is_refused(evil_model: Path, witness: Path) -> None:
    for name, key, value in (
        ("config.json", "model_type", "evil"),
        ("tokenizer_config.json", "tokenizer_class", "EvilTokenizer"),
        ("preprocessor_config.json", "image_processor_type", "EvilProcessor"),
    ):
        file = evil_model / name
        sound = file.read_text()
        file.write_text(json.dumps(json.loads(sound) | {key: value}))
        run_or_refuse(load_lvlm, evil_model)
        assert not witness.exists(), name
        file.write_text(sound)
    file = evil_model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "evil"}))
    with pytest.raises(InputError, match=r"config\.json"):
        load_lvlm(evil_model)


def test_no_setting_switches_it_on(monkeypatch: pytest.MonkeyPatch, evil_model: Path, witness: Path) -> None:
    for key in ("trust_remote_code", "model.trust_remote_code", "scorer.trust_remote_code"):
        with pytest.raises(ConfigError, match="trust_remote_code"):
            load_config(None, [f"{key}=true"], None)
    assert "trust_remote_code" not in json.dumps(Config.model_json_schema())
    for name in ("TRUST_REMOTE_CODE", "HF_TRUST_REMOTE_CODE", "TRANSFORMERS_TRUST_REMOTE_CODE"):
        monkeypatch.setenv(name, "1")
    run_or_refuse(load_lvlm, evil_model)
    assert not witness.exists()


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(sound_model: Path, tmp_path: Path, witness: Path, template: str) -> None:
    directory = Path(shutil.copytree(sound_model, tmp_path / "model"))
    (directory / "chat_template.jinja").write_text(template.replace("WITNESS", str(witness)))
    model = load_lvlm(directory)
    with pytest.raises(InputError, match="chat_template"):
        model.encode_prompt("what color", [])
    judge = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "scorer"))
    (judge / "chat_template.jinja").write_text(template.replace("WITNESS", str(witness)))
    with pytest.raises(InputError, match="chat_template"):
        load_scorer(judge)
    assert not witness.exists()
