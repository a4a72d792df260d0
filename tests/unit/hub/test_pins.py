"""Names in settings become names at a commit, which is recorded and used again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.hub_server import READ, Hub, Repository

from srcfast.config.load import load_config
from srcfast.errors import InputError, SrcfastError
from srcfast.hub.names import local_model
from srcfast.hub.pins import fetched_data, fetched_model, pinned

DATASET = "{name: d, path: [hf://datasets/someone/data/a.jsonl, local.jsonl], image_root: 'hf://datasets/someone/data/images'}"


def test_a_branch_that_moves_does_not_change_a_run(hub: Hub, tmp_path: Path) -> None:
    config = load_config(None, ["model.path=someone/model"])
    first = hub.models["someone/model"].branches["main"]
    assert pinned(config, tmp_path / "run", models=["model"]).model.path == f"hf://someone/model@{first}"
    assert json.loads((tmp_path / "run" / "hub.json").read_text()) == {"someone/model@main": first}
    second = hub.models["someone/model"].commit({"config.json": b"{}"})
    hub.requests.clear()
    assert pinned(config, tmp_path / "run", models=["model"]).model.path == f"hf://someone/model@{first}"
    assert hub.requests == []
    assert pinned(config, tmp_path / "other", models=["model"]).model.path == f"hf://someone/model@{second}"
    assert pinned(config, None, models=["model"]).model.path == f"hf://someone/model@{second}"


def test_another_revision_is_recorded_beside_the_first(hub: Hub, tmp_path: Path) -> None:
    first = hub.models["someone/model"].branches["main"]
    second = hub.models["someone/model"].commit({"config.json": b"{}"}, "v2")
    for name in ("someone/model", "someone/model@v2"):
        fetched_model(Path(name), tmp_path, quiet=True)
    recorded = json.loads((tmp_path / "hub.json").read_text())
    assert recorded == {"someone/model@main": first, "someone/model@v2": second}


def test_local_paths_and_models_that_are_not_read_make_no_request(hub: Hub, tmp_path: Path) -> None:
    config = load_config(None, ["model.path=./someone/model", "scorer.path=someone/none"])
    assert pinned(config, tmp_path / "run", models=["model"], data=["train", "evaluation"]) is config
    adapter = tmp_path / "adapter"
    assert fetched_model(adapter, tmp_path / "run", quiet=True) == adapter
    assert fetched_data([adapter], tmp_path / "run", quiet=True) == [adapter]
    assert hub.requests == [] and not (tmp_path / "run").exists()


def test_datasets_are_read_at_the_commit_of_their_settings(hub: Hub, tmp_path: Path) -> None:
    hub.datasets["someone/data"] = Repository()
    commit = hub.datasets["someone/data"].commit({"a.jsonl": b"{}\n", "images/1.png": b"png"})
    config = load_config(None, [f"data.train=[{DATASET}]"])
    [dataset] = pinned(config, tmp_path, data=["train"]).data.train
    assert dataset.path == (f"hf://datasets/someone/data@{commit}/a.jsonl", "local.jsonl")
    assert dataset.image_root == f"hf://datasets/someone/data@{commit}/images"
    assert json.loads((tmp_path / "hub.json").read_text()) == {"datasets/someone/data@main": commit}
    [file] = fetched_data([Path("hf://datasets/someone/data/a.jsonl")], tmp_path, quiet=True)
    assert file.read_bytes() == b"{}\n"


def test_which_settings_were_set_is_still_known(hub: Hub, tmp_path: Path) -> None:
    config = load_config(None, ["model.path=someone/model"])
    result = pinned(config, None, models=["model"])
    assert "dtype" not in result.model.model_fields_set and result.scorer == config.scorer


def test_an_adapter_s_directory_is_that_of_its_download(hub: Hub, tmp_path: Path) -> None:
    directory = fetched_model(Path("someone/model"), tmp_path, quiet=True)
    assert directory is not None and {*os.listdir(directory)} == READ
    assert local_model("someone/model") == directory


@pytest.mark.parametrize("text", ["[]", '{"a/b@main": 3}', '{"a/b@main": "main"}', "{"])
def test_a_damaged_record_is_an_error_that_names_it(hub: Hub, tmp_path: Path, text: str) -> None:
    (tmp_path / "hub.json").write_text(text)
    with pytest.raises(InputError, match=r"hub\.json: expected commits by the names of repositories"):
        fetched_model(Path("someone/model"), tmp_path, quiet=True)
    assert hub.requests == []


def test_what_fails_leaves_no_record(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SrcfastError, match="someone/none@main"):
        fetched_model(Path("someone/none"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
