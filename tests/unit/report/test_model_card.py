"""What a model card says of a run, and that it has no path of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.finished_run import finished_run

from srcfast.hub.names import HubName
from srcfast.report.model_card import Subject, last_adapter, model_card, shown_value

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = f'[/home/someone/a.jsonl, "hf://datasets/owner/data@{COMMIT}/b.jsonl"]'
DATA = f'data.train=[{{name: "a|b <b>", path: {FILES}, limit: 9}}]'


def card_of(path: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """The card's header and text."""
    values = {"repository": "owner/new", "kind": "adapter", "base": "owner/base", "run": path, "model": "iteration-1"}
    card = model_card(Subject(**(values | options)))
    _, header, text = card.split("---\n", 2)
    return yaml.safe_load(header), text


def section(text: str, name: str) -> str:
    return text.split(f"\n## {name}\n\n")[1].split("\n## ")[0]


def test_its_header_is_what_the_hub_reads(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "owner/base", (DATA,))
    header, _ = card_of(run, base_name=HubName("model", "owner/base", COMMIT), licence="apache-2.0")
    assert header == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "tags": ["srcfast", "self-rationale-calibration", "lora"],
        "datasets": ["owner/data"],
    }
    header, _ = card_of(run, kind="merged", base="base")
    assert header["library_name"] == "transformers" and not {"base_model", "license"} & header.keys()


def test_data_settings_and_results_are_those_of_the_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "owner/base", (DATA, "scorer.path=/home/someone/judge", "dpo.beta=0.25"))
    _, text = card_of(run)
    data = section(text, "Data")
    files = f"a.jsonl, hf://datasets/owner/data@{COMMIT}/b.jsonl"
    row = f"| a\\|b \\<b\\> | training: rationale, calibration | auto | train | 9 | {files} |"
    assert (
        row in data
        and "1,200 rationale-answer pairs" in data
        and "Round 1: 512 preference pairs from 640 samples" in data
    )
    settings = [line for line in section(text, "Settings").splitlines() if line.startswith("| `")]
    assert settings == ["| `scorer.path` | judge |", "| `lora.r` | 8 |", "| `dpo.beta` | 0.25 |"]
    entries = json.loads((run / "summary.json").read_text())["evaluations"]
    rows = [line.strip("| ").split(" | ") for line in section(text, "Results").splitlines() if line.startswith("| ")][
        2:
    ]
    expected = [entry for entry in entries if entry["model"] != "iteration-2"]
    assert len(rows) == len(expected) == 9
    for entry in expected:
        name = "**iteration-1** (this model)" if entry["model"] == "iteration-1" else entry["model"]
        low, high = entry["accuracy_ci95"]
        shares = [f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"]
        low, high = entry["alignment_ci95"]
        shares += [f"{100 * entry['alignment']:.1f} ({100 * low:.1f} to {100 * high:.1f})"]
        assert [f"{entry['dataset']} {entry['split']}", f"{entry['n']:,}", name, *shares] in rows


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_it_has_no_path_of_this_machine(tmp_path: Path, kind: str) -> None:
    words = (DATA, "scorer.path=/home/someone/judge", "rationale.teacher=/home/someone/t.jsonl")
    run = finished_run(tmp_path / "run", "/home/someone/base", words)
    _, text = card_of(run, kind=kind, base="base")
    assert "/home" not in text and str(tmp_path) not in text
    assert "t.jsonl" in text and "from a local directory" in section(text, "Base")


def test_base_and_use_name_the_commit(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "owner/base")
    _, text = card_of(run, base_name=HubName("model", "owner/base", COMMIT))
    assert section(text, "Base").strip() == f"`owner/base`, commit `{COMMIT}`."
    use = section(text, "Use")
    assert f'from_pretrained("owner/base", revision="{COMMIT}")' in use
    assert f"srcfast chat owner/base@{COMMIT} --adapter owner/new --image photo.png" in use
    _, text = card_of(run, base_name=HubName("model", "owner/base"), kind="merged")
    assert "no commit was recorded" in section(text, "Base") and "srcfast chat owner/new --image" in section(
        text, "Use"
    )


def test_without_a_run_it_says_what_is_not_known() -> None:
    header, text = card_of(Path(), run=None, model="", base="base")
    assert "Not recorded" in section(text, "Data") and "No evaluation was recorded." in section(text, "Results")
    assert "datasets" not in header and "none was stated" in section(text, "Licence")


def test_the_last_adapter_of_a_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "owner/base")
    assert last_adapter(run) == ("iteration-1", run / "iteration-1" / "adapter")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({"rationale": manifest["rationale"]}))
    assert last_adapter(run) == ("rationale", run / "rationale" / "adapter")
    (run / "manifest.json").write_text("{}")
    assert last_adapter(run) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("/a/b/c.jsonl", "c.jsonl"),
        ("runs/x/", "x"),
        ("C:\\data\\x.tsv", "x.tsv"),
        ("hf://o/n@v1", "hf://o/n@v1"),
        (["/a/b", "c"], "b, c"),
        (0.5, "0.5"),
        ("auto", "auto"),
    ],
)
def test_of_a_local_path_the_last_part_is_shown(value: Any, text: str) -> None:
    assert shown_value(value) == text
