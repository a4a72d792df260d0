"""What is requested of the Hub and what is not, what the cache serves, and what each failure says."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hub_server import FILES, READ, SECRET, Hub, Repository
from huggingface_hub import constants

from srcfast.errors import SrcfastError
from srcfast.hub.download import commit_of, fetch
from srcfast.hub.names import HubName, cached_directory, dataset_name, local_data

MODEL = HubName("model", "someone/model")


def fetched(name: HubName, **options: bool) -> str:
    commit = commit_of(name)
    fetch(name, commit, quiet=True, **options)
    return commit


def names_in(directory: Path | None) -> set[str]:
    assert directory is not None
    return {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}


def test_weights_and_text_are_read_and_no_pickle_or_code_is_requested(hub: Hub) -> None:
    commit = fetched(MODEL)
    assert commit == hub.models["someone/model"].branches["main"]
    directory = cached_directory(MODEL)
    assert names_in(directory) == READ and directory is not None
    assert all((directory / name).read_bytes() == FILES[name] for name in READ)
    requested = {path.rpartition(f"/resolve/{commit}/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert requested == READ
    assert {*hub.tokens} == {f"Bearer {SECRET}"}


def test_weights_are_left_out_where_they_are_not_needed_and_come_later(hub: Hub) -> None:
    fetched(MODEL, weights=False)
    assert names_in(cached_directory(MODEL)) == READ - {"model.safetensors"}
    fetched(MODEL)
    assert names_in(cached_directory(MODEL)) == READ


def test_a_commit_in_the_cache_needs_no_request(hub: Hub) -> None:
    commit = fetched(MODEL)
    hub.requests.clear()
    assert fetched(HubName("model", "someone/model", commit)) == commit
    assert hub.requests == []


def test_branches_and_tags_have_their_commits(hub: Hub) -> None:
    repository = hub.models["someone/model"]
    other = repository.commit({"config.json": b'{"a": 2}'}, "refs/pr/1")
    tagged = repository.commit({"config.json": b'{"a": 3}'}, "v1.0")
    for revision, commit, text in (("refs/pr/1", other, b'{"a": 2}'), ("v1.0", tagged, b'{"a": 3}')):
        name = HubName("model", "someone/model", revision)
        assert fetched(name) == commit
        directory = cached_directory(name)
        assert directory is not None and (directory / "config.json").read_bytes() == text


def test_offline_the_cache_serves_what_it_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = fetched(MODEL)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched(MODEL) == commit
    with pytest.raises(SrcfastError, match="someone/model@v9: expected it in the cache, since HF_HUB_OFFLINE is set"):
        fetched(HubName("model", "someone/model", "v9"))
    with pytest.raises(SrcfastError, match="HF_HUB_OFFLINE is set, found not all"):
        fetched(HubName("model", "someone/model", "a" * 40))
    assert hub.requests == []


def test_offline_a_download_without_weights_is_no_whole_one(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(MODEL, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetched(MODEL, weights=False)
    with pytest.raises(SrcfastError, match="HF_HUB_OFFLINE is set, found not all. Fix: run the command once"):
        fetched(MODEL)


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (401, "set HF_TOKEN"),
        (403, "accept the repository's terms"),
        (404, "correct the name"),
        (429, "wait, and run"),
        (400, "wait"),
    ],
)
def test_each_status_says_what_to_do_and_quotes_no_token(hub: Hub, status: int, fix: str) -> None:
    hub.fail = lambda method, path: status if "/revision/" in path else None
    with pytest.raises(SrcfastError, match=f"someone/model@main: .* found status {status}. Fix: {fix}") as caught:
        fetched(MODEL)
    assert SECRET not in str(caught.value)


def test_a_repository_or_revision_that_is_missing(hub: Hub) -> None:
    for name in (HubName("model", "someone/none"), HubName("model", "someone/model", "none")):
        with pytest.raises(
            SrcfastError, match=f"{name.label}: .* found status 404. Fix: correct the name and the revision"
        ):
            fetched(name)
    with pytest.raises(SrcfastError, match="found no name that the Hub allows"):
        fetched(HubName("model", "some--one/model"))


def test_no_server_is_an_error_with_a_fix(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        SrcfastError, match="a whole reply of http://127.0.0.1:9, found .*Error. Fix: see to the network"
    ):
        fetched(MODEL)


def test_a_download_that_is_cut_is_continued(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = iter(["cut"])
    hub.fail = lambda method, path: next(cuts, None) if method == "GET" and path.endswith("model.safetensors") else None
    fetched(MODEL)
    directory = cached_directory(MODEL)
    assert directory is not None and (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert len(hub.paths("GET", "/model.safetensors")) == 2


def test_a_file_that_is_refused_leaves_no_whole_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail = lambda method, path: 403 if path.endswith("model.safetensors") else None
    with pytest.raises(SrcfastError, match="found status 403"):
        fetched(MODEL)
    hub.fail = lambda method, path: None
    fetched(MODEL)
    assert names_in(cached_directory(MODEL)) == READ


def test_the_token_is_in_no_file_of_the_cache(hub: Hub, tmp_path: Path) -> None:
    hub.token = SECRET
    fetched(MODEL)
    files = [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
    assert files and not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_without_hf_token_no_token_is_sent(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_from_a_file")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    fetched(MODEL)
    assert {*hub.tokens} == {None}


def test_files_of_datasets_are_real_files_beside_their_images(hub: Hub) -> None:
    files = {"data/a.jsonl": b"{}\n", "data/b.jsonl": b"{}\n", "images/x/1.PNG": b"png" * 500, "images/2.jpg": b"jpg"}
    hub.datasets["someone/data"] = Repository()
    commit = hub.datasets["someone/data"].commit(files | {"images/code.py": b"import os", "loader.py": b"import os"})
    for text in ("hf://datasets/someone/data/data/*.jsonl", "hf://datasets/someone/data/images"):
        name = dataset_name(text)
        assert name is not None and fetched(name) == commit
    directory = cached_directory(HubName("dataset", "someone/data"))
    assert directory is not None
    assert {name for name in names_in(directory) if not name.startswith(".cache/")} == files.keys()
    assert not any((directory / name).is_symlink() for name in files)
    assert local_data(f"hf://datasets/someone/data@{commit}/data/*.jsonl") == f"{directory}/data/*.jsonl"
    missing = dataset_name("hf://datasets/someone/data/none.jsonl")
    assert missing is not None
    with pytest.raises(SrcfastError, match=r"none.jsonl: expected a file of the repository, .*, found none"):
        fetched(missing)
