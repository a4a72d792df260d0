"""Which texts are names of the Hub, and which are local paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from srcfast.hub.names import HubName, cached_directory, dataset_name, local_data, local_model, model_name, name_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf", "main"),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        (f"hf://owner/name@{COMMIT}", "owner/name", COMMIT),
        ("hf:/owner/name", "owner/name", "main"),  # as pathlib writes hf://owner/name
    ],
)
def test_names_of_models(text: str, repository: str, revision: str) -> None:
    assert model_name(text) == HubName("model", repository, revision)
    assert model_name(str(Path(text))) == model_name(text)


@pytest.mark.parametrize(
    "text",
    ["embedded", "./owner/name", "/owner/name", "../name", "~/name", "a/b/c", "owner/", "/name", "", "owner/na me"]
    + [
        "owner/name@",
        "owner/name@-x",
        "hf://datasets/owner/name/a.jsonl",
        "https://host/name",
        "owner\\name",
        "owner/.name",
    ],
)
def test_what_is_no_name_of_a_model(text: str) -> None:
    assert model_name(text) is None


def test_what_exists_or_lies_in_a_folder_that_does_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name("runs/adapter") is not None
    (tmp_path / "runs").mkdir()
    assert model_name("runs/adapter") is None
    assert model_name("hf://runs/adapter") == HubName("model", "runs/adapter")
    (tmp_path / "linked").symlink_to("nowhere")
    assert model_name("linked/name") is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://datasets/o/n/a.jsonl", HubName("dataset", "o/n", "main", "a.jsonl")),
        ("hf://datasets/o/n@v2/data/*.parquet", HubName("dataset", "o/n", "v2", "data/*.parquet")),
        ("hf:/datasets/o/n@refs/pr/2/a/b.tsv", HubName("dataset", "o/n", "refs/pr/2", "a/b.tsv")),
        ("hf://datasets/o/n/images/", HubName("dataset", "o/n", "main", "images/")),
        ("hf://datasets/o/n", None),
        ("hf://datasets/o/n/", None),
        ("hf://datasets/o/n/../../etc/passwd", None),
        ("hf://datasets/o/n//etc/passwd", None),
        ("hf://o/n/a.jsonl", None),
        ("datasets/o/n/a.jsonl", None),
    ],
)
def test_names_of_files_of_datasets(text: str, expected: HubName | None) -> None:
    assert dataset_name(text) == expected
    if expected is not None:
        assert dataset_name(expected.text) == expected


def test_what_was_downloaded_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    assert local_model("owner/name") == Path("owner/name")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert local_model(f"owner/name@{COMMIT}") == snapshot and name_of(snapshot) == HubName(
        "model", "owner/name", COMMIT
    )
    assert cached_directory(HubName("model", "owner/name")) is None
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("no commit")
    assert cached_directory(HubName("model", "owner/name")) is None
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    assert local_model("owner/name") == snapshot
    assert local_data(f"hf://datasets/o/n@{COMMIT}/a.jsonl") == f"hf://datasets/o/n@{COMMIT}/a.jsonl"
    assert name_of(tmp_path) is None and name_of("models--a--b/snapshots/main") is None
