"""Settings: files, single values, sections, and errors that say where and what."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from srcfast import __version__
from srcfast.cli.app import app
from srcfast.cli.inputs import complete_words, settings
from srcfast.config.load import known_settings, load_config
from srcfast.config.settings import Config
from srcfast.data.jsonl import write_shards
from srcfast.errors import ConfigError


def in_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_need_no_file() -> None:
    assert load_config(None, []) == Config()


def test_single_values_win_over_the_file_and_leave_its_others(tmp_path: Path) -> None:
    file = in_file(tmp_path, "dpo: {beta: 0.2, epochs: 3}\nlora:\n  r: 4\n")
    config = load_config(file, ["dpo.beta=0.5", "lora={alpha: 7}", "seed=9"])
    assert (config.dpo.beta, config.dpo.epochs, config.lora.r, config.lora.alpha, config.seed) == (
        0.5,
        3,
        4,
        7.0,
        9,
    )


def test_null_unsets_a_value_and_leaves_a_section_as_it_is(tmp_path: Path) -> None:
    file = in_file(
        tmp_path,
        "rationale: {teacher: notes.jsonl, epochs: 3}\nscorer_training: {vocabulary: words}\ndpo:\nlora: {r: 4}\n",
    )
    config = load_config(file, ["rationale={teacher: null}", "scorer_training={vocabulary: null}", "lora=null"])
    assert (config.rationale.teacher, config.rationale.epochs, config.scorer_training.vocabulary) == (None, 3, None)
    assert config.dpo == Config().dpo  # a heading with nothing under it
    assert load_config(file, ["rationale.teacher=null"]).rationale.teacher is None
    assert load_config(file, []).rationale.teacher == "notes.jsonl"


def test_a_key_is_looked_up_in_the_stages_section_before_the_root() -> None:
    config = load_config(None, ["learning_rate=3e-4", "lora.r=8", "seed=2", "rationale.learning_rate=1e-2"], "dpo")
    assert config.dpo.learning_rate == 3e-4  # YAML 1.1 reads 3e-4 as a string: it is a number all the same
    assert config.rationale.learning_rate == 1e-2
    assert (config.lora.r, config.seed) == (8, 2)


@pytest.mark.parametrize(
    ("text", "line", "nearest"),
    [
        ("name: x\n\ndpo:\n  epochs: 1\n  bta: 0.1\n", 5, "dpo.beta"),
        ("itterations: 2\n", 1, "iterations"),
        ("seed: 1\nrationale: {beta: 1}\n", 2, "dpo.beta"),
        (
            "data:\n  train:\n  - name: a\n    fromat: world\n    format: world\n    limit: 3\n",
            4,
            "data.train.0.format",
        ),
    ],
)
def test_unknown_setting_names_file_line_and_the_nearest(tmp_path: Path, text: str, line: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(in_file(tmp_path, text))
    assert f"settings.yaml, line {line}:" in str(error.value)
    assert f"the nearest known one is {nearest!r}" in str(error.value)


def test_unknown_single_setting_names_the_nearest_of_the_section() -> None:
    with pytest.raises(ConfigError, match=r"override 'betta=1'.*nearest known one is 'dpo.beta'"):
        load_config(None, ["betta=1"], "dpo")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora: {r: 0}", ["line 1", "lora.r", ">= 1 and <= 4096", "found 0"]),
        ("curation:\n  min_margin: 1.5", ["line 2", "curation.min_margin", ">= 0 and <= 1", "found 1.5"]),
        ("dpo: {beta: .nan}", ["dpo.beta", "> 0", "found nan"]),
        ("dpo: {beta: lots}", ["dpo.beta", "a number > 0", "found 'lots'"]),
        ("dpo: {label_smoothing: 0.5}", ["label_smoothing", "[0, 0.5)", "found 0.5"]),
        ("dpo: {preference_weight: 0, sft_weight: 0}", ["sft_weight", "above 0", "no loss is left"]),
        ("scorer: {pairs: adaptive, finalists: 2}", ["finalists", "expected 0 with pairs adaptive", "found 2"]),
        ("seed: true", ["seed", "found true"]),
        ("model: {dtype: float8}", ["model.dtype", "'float32', 'bfloat16' or 'float16'", "found 'float8'"]),
        ("max_rejected: 5.5", ["max_rejected", "a share of at most 1", "found 5.5"]),
        ("name: ../up", ["line 1", "name", "found '../up'"]),
        ("data: {train: [{name: a, format: world}]}", ["data.train.0", "set its limit"]),
        ("data: {train: [{name: a, format: world, limit: -1}]}", ["data.train.0.limit", ">= 0", "found -1"]),
        ("seed: 1\nseed: 2", ["line 2", "seed is set twice", "line 1"]),
        ("dpo: 3", ["line 1", "dpo", "found 3"]),
        ("- 1", ["settings.yaml", "found list"]),
        ("a: [", ["settings.yaml", "expected YAML"]),
    ],
)
def test_bad_value_names_setting_bounds_and_what_was_found(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(in_file(tmp_path, text))
    for word in words:
        assert word in str(error.value)


def test_all_errors_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(in_file(tmp_path, "lora: {r: 0, alpha: -1}\n"))
    assert "lora.r" in str(error.value) and "lora.alpha" in str(error.value)


def test_a_heading_with_nothing_under_it_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(in_file(tmp_path, "dpo:\nlora:\n")) == Config()


@pytest.mark.parametrize("value", [3, 0.25])
def test_max_rejected_is_a_count_or_a_share(tmp_path: Path, value: float) -> None:
    found = load_config(in_file(tmp_path, f"max_rejected: {value}")).max_rejected
    assert found == value and type(found) is type(value)


def test_resolved_settings_written_as_yaml_read_back_the_same(tmp_path: Path) -> None:
    data = "data.train=[{name: shapes, format: world, limit: 12, use: [rationale]}]"
    config = load_config(None, [data, "dpo.label_smoothing=confidence", "lora.target_modules=[q_proj]"])
    file = in_file(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file) == config


def test_every_setting_is_described() -> None:
    def undescribed(model: type, prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            if hasattr(field.annotation, "model_fields"):
                found += undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert undescribed(Config) == []
    assert "dpo.min_learning_rate_ratio" in known_settings()


def test_stages_get_their_settings() -> None:
    config = load_config(
        None, ["dpo.epochs=3", "dpo.beta=0.3", "curation.min_margin=0.4", "lora.r=5", "candidates.top_p=0.7"]
    )
    assert config.dpo.epochs == 3 and config.dpo.beta == 0.3
    assert config.curation.min_margin == 0.4 and config.candidates.top_p == 0.7 and config.lora.r == 5


def test_a_seed_is_the_run_s_and_no_setting_of_a_section() -> None:
    section = load_config(None, ["dpo.epochs=3"]).dpo
    seeded = section.seeded(8, deterministic=True)
    assert (seeded.seed, seeded.deterministic, seeded.epochs) == (8, True, 3)
    assert (section.seed, section.deterministic) == (0, False)
    assert seeded.model_dump() == section.model_dump() and seeded != section
    assert seeded.loop() == section.loop() | {"seed": 8, "deterministic": True}
    changed = seeded.replace(epochs=2)
    assert (changed.seed, changed.deterministic, changed.epochs) == (8, True, 2)
    with pytest.raises(ValidationError, match="epochs"):
        seeded.replace(epochs=0)
    with pytest.raises(ConfigError, match="unknown setting"):
        load_config(None, ["dpo.seed=3"])
    assert load_config(None).lora.seeded(4).seed == 4


def test_how_a_stage_trains_is_set_and_checked() -> None:
    config = load_config(
        None, ["dpo.optimizer=adamw_8bit", "dpo.activation_checkpointing=2", "rationale.loader_workers=4"]
    )
    loop = config.dpo
    assert (loop.optimizer, loop.activation_checkpointing, loop.loader_workers) == ("adamw_8bit", 2, 0)
    assert config.rationale.loader_workers == 4
    assert config.rationale.activation_checkpointing == "auto"
    for word, expected in (
        ("dpo.activation_checkpointing=-1", "dpo.activation_checkpointing: expected"),
        ("dpo.activation_checkpointing=most", "dpo.activation_checkpointing: expected"),
        ("dpo.optimizer=sgd", "'adamw', 'adamw_8bit', 'paged_adamw' or 'paged_adamw_8bit', found 'sgd'"),
        ("dpo.loader_workers=-1", "dpo.loader_workers: expected a whole number >= 0 and <= 64, found -1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            load_config(None, [word])


# `srcfast config` ----------------------------------------------------------------------------------------------------


def test_config_prints_a_file_that_gives_the_same_settings_and_says_where_each_came_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: 24GiB\ndpo:\n  beta: 0.2\ndata: {train: [{name: 'a: b', format: jsonl, path: x.jsonl}]}\n")
    done = CliRunner().invoke(app, ["config", str(file), "lora.r=8", "candidates.top_p=0.5"])
    assert done.exit_code == 0, done.output
    sources = dict(
        re.fullmatch(r"\s*(\w+): .*  # (.*)", line).groups()
        for line in done.output.splitlines()
        if re.search(r"(beta|\br|top_p|epochs|dtype|train): ", line)
    )
    assert sources["beta"] == f"{file}, line 3" and sources["train"] == f"{file}, line 4"
    assert sources["r"] == "override 'lora.r=8'" and sources["top_p"] == "override 'candidates.top_p=0.5'"
    assert sources["epochs"] == "default"
    (tmp_path / "printed.yaml").write_text(done.output)
    assert load_config(tmp_path / "printed.yaml") == load_config(file, ["lora.r=8", "candidates.top_p=0.5"])
    as_json = json.loads(CliRunner().invoke(app, ["config", str(file), "--json"]).output)
    assert as_json["sources"]["model.quantize"] == "preset 24GiB" and "lora.r" not in as_json["sources"]
    assert Config.model_validate(as_json["settings"]) == load_config(file)


def test_the_schema_names_every_setting_with_its_meaning() -> None:
    schema = json.loads(CliRunner().invoke(app, ["config", "--schema"]).output)

    def settings(part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        for name, field in part["properties"].items():
            target = field.get("$ref")
            yield prefix + name, field
            if target:
                yield from settings(schema["$defs"][target.rpartition("/")[2]], f"{prefix}{name}.")

    fields = dict(settings(schema))
    assert set(fields) == set(known_settings())
    assert all("description" in field for name, field in fields.items() if "$ref" not in field)
    assert fields["dpo.beta"]["exclusiveMinimum"] == 0 and fields["dpo.beta"]["default"] == 0.1
    assert fields["model.quantize"]["enum"] == ["none", "nf4"]
    assert schema["additionalProperties"] is False


def test_words_are_completed_to_settings_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dpo.yaml", "d[1].yaml", "dpo.txt"):
        (tmp_path / name).touch()
    assert {"dpo.beta=", "dpo.epochs=", "dpo=", "dpo.yaml"} <= set(complete_words("dpo"))
    assert complete_words("d[") == ["d[1].yaml"] and complete_words("nothing") == []


def test_the_version_is_said(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output == f"srcfast {__version__}\n"


LIGHT = (
    ["--help"],
    ["--version"],
    ["config", "preset=24GiB"],
    ["config", "--schema"],
    ["convert", "rows.jsonl", "rows.json", "--to", "llava"],
    ["world", "--output", "world", "--samples", "2"],
    ["curate", "--data", "rows.jsonl", "--candidates", "candidates", "--output", "pairs", "pairing=random"],
    ["dpo", "dpo.beta=-1"],
)


@pytest.mark.parametrize("words", LIGHT, ids=lambda words: " ".join(words[:2]))
def test_what_runs_no_model_imports_no_pytorch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "question": "What?", "answer": "red"}\n')
    write_shards(tmp_path / "candidates", [])
    script = (
        "import sys\nfrom srcfast.cli.app import app\n"
        "try:\n    app(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.endswith("heavy: []\n"), done.stderr[-2000:]
    assert done.returncode == (2 if words[0] == "dpo" else 0), done.stderr


def test_a_single_setting_fills_a_heading_with_nothing_under_it(tmp_path: Path) -> None:
    file = in_file(tmp_path, "dpo:\nseed: 3\n")
    config = load_config(file, ["dpo.beta=0.2"])
    assert (config.dpo.beta, config.seed) == (0.2, 3)


def test_an_option_takes_any_path(tmp_path: Path) -> None:
    for name in ("😀", "Größe", "a: b # c"):
        assert settings(None, None, output=tmp_path / name).output == str(tmp_path / name)


def test_overrides_of_one_section_are_merged_and_the_last_of_one_setting_wins() -> None:
    config = load_config(None, ["dpo={beta: 0.2, epochs: 3}", "dpo={beta: 0.3}", "dpo.epochs=4"])
    assert (config.dpo.beta, config.dpo.epochs) == (0.3, 4)
    nested = load_config(None, ["candidates={temperature: 0.5, num_beams: 3}", "candidates={num_beams: 2}"])
    assert (nested.candidates.temperature, nested.candidates.num_beams) == (0.5, 2)


@pytest.mark.parametrize("name", ["a.", "nul", "Com1.x", "a" * 201])
def test_a_run_whose_directory_no_system_would_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected names without '/'.*they name files"):
        load_config(None, [f"name={name}"])


def test_a_run_s_name_that_is_a_path_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nname: exp/of may/a")
    with pytest.raises(ConfigError, match=r"no path, found 'exp/of may/a'. Fix: output=runs/exp/of may name=a"):
        load_config(str(tmp_path / "a.yaml"), [])
    with pytest.raises(
        ConfigError, match=r"override 'name=exp/a': .*no path, found 'exp/a'. Fix: output=runs/exp name=a"
    ):
        load_config(None, ["name=exp/a"])


@pytest.mark.parametrize("key", ["output", "model.path", "scorer.path", "memory"])
def test_a_nul_in_any_text_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"expected text without a NUL, found 'a\\x00b'"):
        load_config(None, [rf'{key}="a\0b"'])


def test_training_sets_and_sets_beside_each_other_may_have_any_names() -> None:
    train = "data.train=[{name: a/b, format: jsonl, path: x}, {name: a/b, format: jsonl, path: y}]"
    sets = "data.evaluation=[{name: a, split: b, format: jsonl, path: x}, {name: a, split: c, format: jsonl, path: x}]"
    assert [dataset.label for dataset in load_config(None, [train, sets]).data.evaluation] == ["a-b", "a-c"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((("a-b", "c"), ("a", "b-c")), "two datasets whose files are named 'a-b-c'"),
        ((("a/b", "c"),), "expected names without '/'"),
        ((("a", "../c"),), "expected names without '/'"),
        (((f"a{'b' * 300}", "c"),), "at most 200 bytes"),
        ((('".."', "c"),), "expected names without '/'"),
        ((("nul", "c"),), "none of a device"),
        ((("a", '"c."'),), "dots or spaces at an end"),
        (((r'"a\0b"', "c"),), "without a NUL"),
        (((r'"a\e[2Jb"', "c"),), "control characters"),
        ((("Dev", "c"), ("dev", "C")), "named 'dev-C' .name-split., or 'Dev-c', which is one to some disks"),
        ((("caf\u00e9", "c"), ("cafe\u0301", "c")), "which is one to some disks"),
        ((("a", "test"), ("a", "test-scores")), "two datasets whose files are named 'a-test-scores'"),
        ((("a", "test-scores"), ("a", "test")), "two datasets whose files are named 'a-test'"),
    ],
)
def test_evaluation_sets_whose_files_would_be_others_are_refused(
    sets: tuple[tuple[str, str], ...], message: str
) -> None:
    words = [f"{{name: {name}, format: jsonl, path: x.jsonl, split: {split}}}" for name, split in sets]
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"data.evaluation=[{', '.join(words)}]"])


@pytest.mark.parametrize("loss_type", ["ipo", "hinge"])
@pytest.mark.parametrize("smoothing", ["0.1", "confidence"])
def test_labels_are_smoothed_for_the_sigmoid_loss_alone(loss_type: str, smoothing: str) -> None:
    words = [f"loss_type={loss_type}", f"label_smoothing={smoothing}"]
    with pytest.raises(ConfigError, match=f"expected 0 with loss_type {loss_type}, found {smoothing}"):
        load_config(None, words, "dpo")
    assert load_config(None, [f"loss_type={loss_type}"], "dpo").dpo.label_smoothing == 0
    assert load_config(None, words[1:], "dpo").dpo.label_smoothing in (0.1, "confidence")


def test_true_rationales_are_not_paired_where_references_are_made_worse() -> None:
    data = "data.train=[{name: a, format: world, limit: 3, reference: noisy}]"
    with pytest.raises(ConfigError, match="curation.pairing: expected no true with the reference of 'a'"):
        load_config(None, ["curation.pairing='true'", data])
    assert load_config(None, ["curation.pairing='true'"]).curation.pairing == "true"
