"""A study's file: each arm's settings, under each seed, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srcfast.config.load import load_config
from srcfast.errors import ConfigError, InputError
from srcfast.study.settings import Study, read_judges, read_study

ROOT = Path(__file__).parents[3]
FILE = """\
name: trial
output: {output}
seeds: 2
settings:
  seed: "{{seed}}"
  iterations: 1
  model: {{path: "bases/{{seed}}/base"}}
  dpo: {{beta: 0.3, epochs: 2}}
  data:
    train: [{{name: world, format: world, limit: 8, seed: "1{{seed}}"}}]
    evaluation: [{{name: world, format: world, split: test, limit: 4}}]
arms:
  one: {{}}
  two: {{settings: {{dpo: {{beta: 0.5}}}}}}
  none: {{settings: {{iterations: 0}}}}
  base: {{settings: {{iterations: 0}}, model: base}}
differences: [two - one]
"""


def study_of(folder: Path, change: str = "") -> Study:
    """Read FILE, in which one text may be changed, as in `old => new`."""
    text = FILE
    if change:
        old, new = change.split(" => ")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "study.yaml"
    file.write_text(text.format(output=folder), encoding="utf-8")
    return read_study(file)


def test_an_arm_changes_the_study_s_settings_and_a_seed_stands_in_its_texts(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert list(study.configs) == [(arm, seed) for arm in ("one", "two", "none", "base") for seed in (0, 1)]
    two = study.configs["two", 1]
    assert (two.dpo.beta, two.dpo.epochs, two.seed) == (0.5, 2, 1)
    assert two.model.path == "bases/1/base"
    assert two.data.train[0].seed == 11
    assert two.run_path == tmp_path / "trial" / "two-1"
    assert study.configs["one", 0].dpo.beta == 0.3
    assert study.configs["one", 0].data.train[0].seed == 10


def test_the_last_model_of_an_arm_counts_unless_it_names_another(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert [study.model(arm) for arm in ("one", "none", "base")] == ["iteration-1", "rationale", "base"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "dpo: {{beta: 0.5}} => dpo: {{betta: 0.5}}",
            ["line 14", "unknown setting 'dpo.betta'", "'dpo.beta'", "arm two"],
        ),
        ("beta: 0.3 => beta: -1", ["line 8", "dpo.beta: expected a number > 0"]),
        ("one: {{}} => one: {{setings: {{}}}}", ["line 13", "arms.one.setings"]),
        ("two - one => two - three", ["expected `A - B` of the arms one, two, none, base", "two - three"]),
        ("two - one => two", ["expected `A - B`"]),
        ("seeds: 2 => seeds: 0", ["line 3", "seeds"]),
        ("name: trial => name: a/b", ["line 1", "name"]),
        ("model: base} => model: iteration-0}", ["arms.base.model"]),
        ("one: {{}} => one: {{settings: {{name: x}}}}", ["line 13", "expected name of the study alone"]),
        ("one: {{}} => '../x': {{}}", ["../x"]),
        ("seeds: 2 => seeds: [", ["expected YAML"]),
        ("model: base} => model: iteration-2}", ["arm base", "a model of its 0 iterations", "iteration-2"]),
        (
            "two: {{settings: {{dpo: {{beta: 0.5}}}}}} => "
            "two: {{settings: {{data: {{evaluation: [{{name: x, format: world, limit: 3}}]}}}}}}",
            ["arm two", "the same evaluation sets"],
        ),
        ("differences: [two - one] => judges: {output}/none.json", ["none.json", "judges"]),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path: Path, change: str, words: list[str]) -> None:
    with pytest.raises((ConfigError, InputError)) as error:
        study_of(tmp_path, change)
    assert all(word in str(error.value) for word in words), error.value


def test_figures_of_judges_are_read_and_another_form_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "judges.json"
    figures = {"pairwise": [0.9, 0.8, 1.0], "independent": [0.7, 0.6, 0.8]}
    file.write_text(json.dumps({"judges": {"2m": {"complete": figures}}}), encoding="utf-8")
    assert read_judges(file) == {"2m": {"complete": figures}}
    for wrong in (
        {"2m": {"complete": {"pairwise": [0.9, 0.8, 1.0]}}},
        {"2m": {"complete": figures | {"pairwise": [1.0]}}},
        [],
    ):
        file.write_text(json.dumps({"judges": wrong}), encoding="utf-8")
        with pytest.raises(InputError, match="judges.json"):
            read_judges(file)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "study").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_settings_of_the_repository_s_studies_are_read(file: Path) -> None:
    if "\narms:" not in file.read_text(encoding="utf-8"):  # of one calibration
        assert load_config(file).data.train
        return
    study = read_study(file)
    assert all(config.data.evaluation for config in study.configs.values())
    if file.stem == "main":
        assert set(study.settings.arms) >= {
            "rationale",
            "direct_answer",
            "gold_sft",
            "judged_sft",
            "dpo",
            "src",
            "src_improved",
        }
        splits = {dataset.split for config in study.configs.values() for dataset in config.data.evaluation}
        assert splits == {"test", "new_questions", "new_renderer", "generalisation"}
