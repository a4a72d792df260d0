"""`srcfast push` from a run or a directory, and commands that read names of the Hub, against a stand-in of its API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from helpers.finished_run import finished_run, write_adapter
from helpers.hub_server import SECRET, Hub, Repository, hub_server, use_hub

from srcfast.config.settings import LoRAConfig
from srcfast.models.lora import lora_parameters, save_adapter
from srcfast.models.lvlm import load_lvlm

Srcfast = Callable[..., Result]
ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with hub_server() as running:
        use_hub(running, tmp_path / "home", monkeypatch, SECRET)
        running.models["someone/base"] = Repository()
        running.models["someone/base"].commit({file.name: file.read_bytes() for file in (ASSETS / "base").iterdir()})
        yield running


def head(hub: Hub, name: str) -> dict[str, bytes]:
    return hub.models[name].commits[hub.models[name].branches["main"]]


def test_the_last_adapter_of_a_run_is_uploaded_with_its_card(hub: Hub, tmp_path: Path, srcfast: Srcfast) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    run = finished_run(tmp_path / "run", f"hf://someone/base@{commit}")
    done = srcfast("push", run, "someone/adapter", "--licence", "mit")
    assert done.exit_code == 0 and SECRET not in done.output
    assert f"someone/adapter@{hub.models['someone/adapter'].branches['main']}: uploaded" in done.output
    files = head(hub, "someone/adapter")
    assert {*files} == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == (run / "iteration-1/adapter/adapter_model.safetensors").read_bytes()
    settings = json.loads(files["adapter_config.json"])
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/base", commit)
    card = files["README.md"].decode()
    assert "license: mit\n" in card and f"commit `{commit}`" in card and str(tmp_path) not in card
    assert hub.models["someone/adapter"].private
    again = srcfast("push", run, "someone/adapter", "--licence", "mit")
    assert again.exit_code == 0 and "all of it was there" in again.output
    assert len(hub.paths("POST", "/commit/")) == 1


def test_a_dry_run_sends_nothing(hub: Hub, tmp_path: Path, srcfast: Srcfast) -> None:
    run = finished_run(tmp_path / "run", "/home/someone/base")
    done = srcfast("push", run / "rationale" / "adapter", "someone/adapter", "--dry-run")
    assert done.exit_code == 0 and done.output.startswith("---\n") and "after the rationale fine-tuning" in done.output
    assert "nothing is sent. someone/adapter: adapter_config.json, adapter_model.safetensors, README.md" in done.output
    written = srcfast("push", run, "someone/adapter", "--dry-run", "--output", tmp_path / "card")
    assert written.exit_code == 0 and "after 1 round" in (tmp_path / "card" / "README.md").read_text()
    assert hub.requests == []


def test_a_card_that_is_there_is_replaced_and_other_files_are_listed(
    hub: Hub, tmp_path: Path, srcfast: Srcfast
) -> None:
    directory = write_adapter(tmp_path / "adapter", "someone/base")
    for name in ("README.md", "training.log", "optimizer.pt"):
        (directory / name).write_text("old")
    done = srcfast("push", directory, "someone/adapter")
    assert "left out: optimizer.pt, training.log" in done.output
    card = head(hub, "someone/adapter")["README.md"].decode()
    assert "base_model: someone/base\n" in card and "revision `main` (no commit was recorded)" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter", "name"], "repository: expected owner/name, found 'name'"),
        (["adapter", "a/b@v1"], "Fix: name a branch by --revision"),
        (["adapter", "a/b", "--licence", "Apache 2"], "--licence: expected an identifier"),
        (["adapter", "a/b", "--output", "card"], "--output: expected --dry-run beside it"),
        (["none", "a/b"], "none: expected a checkpoint"),
    ],
)
def test_what_can_t_be_pushed(hub: Hub, tmp_path: Path, srcfast: Srcfast, words: list[str], message: str) -> None:
    write_adapter(tmp_path / "adapter", "someone/base")
    done = srcfast("push", *words)
    assert done.exit_code == 2 and message in done.output and hub.requests == []


def test_an_adapter_is_merged_by_names_and_uploaded_as_a_checkpoint(hub: Hub, tmp_path: Path, srcfast: Srcfast) -> None:
    model = load_lvlm("embedded", lora=LoRAConfig(r=2, alpha=4.0))
    for parameter in lora_parameters(model):
        parameter.data.fill_(0.01)
    save_adapter(model, tmp_path / "adapter")
    assert srcfast("push", tmp_path / "adapter", "someone/adapter").exit_code == 0
    done = srcfast("merge", "--model", "someone/base", "--adapter", "someone/adapter", "--output", "merged")
    assert done.exit_code == 0, done.output
    commits = {f"{name}@main": hub.models[name].branches["main"] for name in ("someone/base", "someone/adapter")}
    assert json.loads((tmp_path / "merged" / "hub.json").read_text()) == commits
    srcfast("merge", "--model", "embedded", "--adapter", tmp_path / "adapter", "--output", "local")
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "local" / "model.safetensors").read_bytes()
    done = srcfast("push", tmp_path / "merged", "someone/merged", "--public")
    assert done.exit_code == 0 and "left out: .lock, TRAINING.json, hub.json" in done.output
    files = head(hub, "someone/merged")
    assert (
        files["model.safetensors"] == weights and "tokenizer.json" in files and not hub.models["someone/merged"].private
    )
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


def test_an_adapter_that_is_trained_on_a_download_names_the_repository(
    hub: Hub, tmp_path: Path, srcfast: Srcfast
) -> None:
    assert srcfast("estimate", "--model", "someone/base").exit_code == 0
    assert hub.paths("GET", "model.safetensors") == []  # config and processor are enough
    hub.requests.clear()
    assert srcfast("doctor", "someone/base").exit_code == 0
    missing = srcfast("doctor", "someone/none")
    assert (
        missing.exit_code == 2 and "expected a directory, or a repository in the cache, found neither" in missing.output
    )
    assert srcfast("config", "model.path=someone/none").exit_code == 0
    assert hub.requests == []
    from srcfast.hub.pins import fetched_model

    directory = fetched_model(Path("someone/base"), None, quiet=True)
    assert directory is not None
    save_adapter(load_lvlm(directory, lora=LoRAConfig(r=2, alpha=4.0)), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    commit = hub.models["someone/base"].branches["main"]
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/base", commit)


def test_data_are_read_by_name(hub: Hub, tmp_path: Path, srcfast: Srcfast) -> None:
    row = {
        "id": "1",
        "images": ["1.png"],
        "question": "What is it?",
        "answer": "red",
        "rationale": "It is red. So red.",
    }
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    hub.datasets["someone/data"] = Repository()
    files = {"train.jsonl": json.dumps(row).encode() + b"\n", "images/1.png": (tmp_path / "1.png").read_bytes()}
    hub.datasets["someone/data"].commit(files)
    name = "hf://datasets/someone/data"
    done = srcfast("inspect", "--model", "embedded", "--data", f"{name}/train.jsonl", "--image-root", f"{name}/images")
    assert done.exit_code == 0 and "image 1.png: 8 x 8 pixels" in done.output, done.output
    listed = f"data.train=[{{name: d, path: '{name}/train.jsonl', image_root: '{name}/images'}}]"
    again = srcfast("inspect", "--model", "embedded", listed)
    assert again.exit_code == 0 and "image 1.png: 8 x 8 pixels" in again.output, again.output
