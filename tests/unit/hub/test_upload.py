"""What of a directory is uploaded, and how the Hub is asked for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.finished_run import write_adapter
from helpers.hub_server import SECRET, Hub
from huggingface_hub import constants

from srcfast.errors import InputError, SrcfastError
from srcfast.hub.names import HubName
from srcfast.hub.upload import Upload, adapter_upload, base_of_adapter, checkpoint_upload, push

OTHERS = ["credentials.json", "hub.json", "pytorch_model.bin", "run.log", "summary.json", "token.txt"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint(directory: Path) -> Path:
    directory.mkdir()
    files = {
        "config.json": json.dumps(
            {
                "model_type": "llava",
                "_name_or_path": "/home/someone/base",
                "text_config": {"_name_or_path": "/home/someone/llm", "vocab_size": 3},
                "vision_config": {},
            }
        ),
        "credentials.json": "[]",
        "token.txt": "secret",
        "tokenizer_config.json": json.dumps({"name_or_path": "owner/base"}),
        "model.safetensors": "weights",
        "vocab.txt": "words",
        "pytorch_model.bin": "pickle",
        "run.log": "/home/someone",
        "summary.json": json.dumps({"model": "/home/someone/base"}),
        "hub.json": "{}",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "checkpoint").mkdir()
    return directory


def pushed(upload: Upload, **options: bool | str) -> tuple[str, bool]:
    return push(upload, "owner/new", **({"private": True, "revision": None, "title": "t"} | options))  # type: ignore[arg-type]


def head(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    repository = hub.models["owner/new"]
    return repository.commits[repository.branches[branch]]


def test_of_a_checkpoint_safetensors_and_text_are_uploaded_without_local_paths(tmp_path: Path) -> None:
    upload = checkpoint_upload(checkpoint(tmp_path / "merged"))
    assert {*upload.files} == {"config.json", "tokenizer_config.json", "model.safetensors", "vocab.txt"}
    assert upload.left_out == ["checkpoint/", *OTHERS]
    config, other = upload.files["config.json"], upload.files["tokenizer_config.json"]
    assert isinstance(config, bytes) and json.loads(config) == {
        "model_type": "llava",
        "text_config": {"vocab_size": 3},
        "vision_config": {},
    }
    assert other == tmp_path / "merged" / "tokenizer_config.json"


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    (checkpoint(tmp_path / "judge") / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="expected a model that sees images"):
        checkpoint_upload(tmp_path / "judge")


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, lacking: str) -> None:
    (checkpoint(tmp_path / "merged") / lacking).unlink()
    with pytest.raises(InputError, match="merged: expected a checkpoint"):
        checkpoint_upload(tmp_path / "merged")


def test_an_adapter_names_its_base_as_the_hub_does(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", "/home/someone/models/base")
    (directory / "summary.json").write_text("{}")
    for base, expected in (
        (HubName("model", "owner/base", COMMIT), {"base_model_name_or_path": "owner/base", "revision": COMMIT}),
        (None, {"base_model_name_or_path": "base"}),
    ):
        upload = adapter_upload(directory, base)
        settings = upload.files["adapter_config.json"]
        assert isinstance(settings, bytes) and json.loads(settings) == {"peft_type": "LORA", "r": 8} | expected
        assert upload.left_out == ["summary.json"]
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="found no adapter_model.safetensors"):
        adapter_upload(directory, None)


@pytest.mark.parametrize(
    ("base", "more", "expected"),
    [
        (f"/cache/models--owner--base/snapshots/{COMMIT}", {}, HubName("model", "owner/base", COMMIT)),
        ("owner/base", {"revision": COMMIT}, HubName("model", "owner/base", COMMIT)),
        ("owner/base", {"revision": None}, HubName("model", "owner/base", "main")),
        ("/home/someone/base", {}, None),
        (None, {}, None),
    ],
)
def test_the_base_of_an_adapter_by_its_settings(
    tmp_path: Path, base: str | None, more: dict[str, str | None], expected: HubName | None
) -> None:
    directory = write_adapter(tmp_path, "x")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base} | more))
    assert base_of_adapter(directory) == (base, expected)


def test_a_second_push_sends_what_is_missing_alone(hub: Hub, tmp_path: Path) -> None:
    upload = adapter_upload(write_adapter(tmp_path / "adapter", "base"), None)
    first, is_new = pushed(upload)
    assert is_new and first == hub.models["owner/new"].branches["main"] and hub.models["owner/new"].private
    assert head(hub)["adapter_model.safetensors"] == (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    hub.requests.clear()
    assert pushed(adapter_upload(tmp_path / "adapter", None)) == (first, False)
    assert hub.paths("PUT") == [] and hub.paths("POST", "/commit/") == []
    third, is_new = pushed(Upload(upload_files := {"README.md": b"a card"}, []))
    assert is_new and third != first and len(hub.paths("POST", "/commit/")) == 1 and hub.paths("PUT") == []
    assert head(hub).items() > upload_files.items() and "adapter_model.safetensors" in head(hub)


def test_a_branch_is_made_and_the_default_one_stays(hub: Hub) -> None:
    pushed(Upload({"README.md": b"one"}, []))
    for text in (b"two", b"three"):
        pushed(Upload({"README.md": text}, []), revision="v2")
    assert head(hub)["README.md"] == b"one" and head(hub, "v2")["README.md"] == b"three"


def test_nothing_is_uploaded_to_a_public_repository_unless_that_is_asked_for(hub: Hub) -> None:
    pushed(Upload({"README.md": b"one"}, []), private=False)
    with pytest.raises(
        SrcfastError, match="owner/new: expected a private repository, found a public one. Fix: --public"
    ):
        pushed(Upload({"README.md": b"two"}, []))
    assert head(hub)["README.md"] == b"one"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_says_what_to_do_and_quotes_no_token(hub: Hub, status: int) -> None:
    hub.fail = lambda method, path: status if path == "/api/repos/create" else None
    with pytest.raises(SrcfastError, match=f"owner/new: .* found status {status}. Fix: .*HF_TOKEN") as caught:
        pushed(Upload({"README.md": b"one"}, []))
    assert SECRET not in str(caught.value)


def test_without_a_token_or_a_network_no_request_is_made(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(SrcfastError, match="HF_HUB_OFFLINE: .* Fix: unset it"):
            pushed(Upload({}, []))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SrcfastError, match="HF_TOKEN: expected a token that may write, found none"):
        pushed(Upload({}, []))
    assert hub.requests == []
