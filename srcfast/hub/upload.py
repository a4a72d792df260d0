"""Upload an adapter or a checkpoint to the Hub: its safetensors, JSON and text files beside a model card, in one commit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import parse_object, regular
from srcfast.errors import InputError, SrcfastError
from srcfast.hub.download import SUFFIXES, asked, endpoint, is_offline, token
from srcfast.hub.names import HubName, model_name, name_of

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARD = "README.md"
BASE = "base_model_name_or_path"
ORIGINS = ("_name_or_path", "name_or_path")  # where transformers notes the directory that a file was read from
# A checkpoint's files; others may be anything, such as a key.
OF_CHECKPOINT = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.*"),
    *(
        "tokenizer*",
        "*.model",
        "*processor_config.json",
        "chat_template.*",
        "*.safetensors",
        "*.safetensors.index.json",
    ),
)


@dataclass(frozen=True)
class Upload:
    """What is uploaded: files by their names in the repository, as paths or as bytes; and what of the directory is not."""

    files: Mapping[str, Path | bytes]
    left_out: list[str]


def adapter_upload(directory: Path, base: HubName | None) -> Upload:
    """Collect an adapter's files, in which the base is called by its name on the Hub, or else by its directory's name.

    Raises:
        InputError: a file is missing, or the settings are no JSON.
    """
    for name in ADAPTER_FILES:
        if not (directory / name).is_file():
            raise InputError(file=directory, expected=f"an adapter: {' and '.join(ADAPTER_FILES)}", found=f"no {name}")
    settings = _object(directory / ADAPTER_FILES[0])
    if base is not None:
        settings |= {BASE: base.repository, "revision": base.revision}
    elif settings.get(BASE) is not None:
        settings[BASE] = Path(str(settings[BASE])).name
    files: dict[str, Path | bytes] = {
        ADAPTER_FILES[0]: _json_bytes(settings),
        ADAPTER_FILES[1]: regular(directory / ADAPTER_FILES[1]),
    }
    return Upload(files, _others(directory, files))


def checkpoint_upload(directory: Path) -> Upload:
    """Collect a checkpoint's weights, config, tokenizer, processor and templates, without paths of this machine.

    Raises:
        InputError: there is no config or no weight in safetensors, or a file is no JSON.
    """
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        expected = "a checkpoint (config.json and safetensors), an adapter, or a run that has trained one"
        raise InputError(file=directory, expected=expected, found="none", fix="name the directory of one")
    if "vision_config" not in _object(directory / "config.json"):
        expected = "a model that sees images, with a vision_config"
        raise InputError(file=directory / "config.json", expected=expected, found="none: a text model, or an R-Scorer")
    files: dict[str, Path | bytes] = {}
    for file in sorted(directory.iterdir()):
        if not file.is_file() or file.suffix not in SUFFIXES or not any(map(file.match, OF_CHECKPOINT)):
            continue
        files[file.name] = regular(file)
        if file.name.endswith("config.json"):
            values = _object(file)
            if (shown := _without_origins(values)) != values:
                files[file.name] = _json_bytes(shown)
    return Upload(files, _others(directory, files))


def _without_origins(value: Any) -> Any:
    """Return JSON values without the paths that transformers notes, at any depth."""
    if isinstance(value, list):
        return [_without_origins(each) for each in value]
    if not isinstance(value, dict):
        return value
    is_path = {key: key in ORIGINS and model_name(str(each)) is None for key, each in value.items()}
    return {key: _without_origins(each) for key, each in value.items() if not is_path[key]}


def base_of_adapter(directory: Path) -> tuple[str | None, HubName | None]:
    """Return what an adapter's settings call its base, and its name on the Hub where that is one. Raises InputError."""
    settings = _object(directory / ADAPTER_FILES[0])
    text = settings.get(BASE)
    if not isinstance(text, str) or not text:
        return None, None
    name = name_of(text) or model_name(text)
    revision = settings.get("revision")
    if name is not None and isinstance(revision, str) and revision and name_of(text) is None:
        name = model_name(f"hf://{name.repository}@{revision}") or name
    return text, name


def push(upload: Upload, repository: str, *, private: bool, revision: str | None, title: str) -> tuple[str, bool]:
    """Create the repository unless it is there, and commit what it lacks; return the commit's hash and whether it is new.

    Args:
        repository: owner/name.
        private: whether the repository is, or becomes, private.
        revision: branch, made from the default one unless it is there.
        title: of the commit.

    Raises:
        SrcfastError: no token, a request that failed, or a public repository where a private one is asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    secret = token()
    if not secret:
        raise SrcfastError("HF_TOKEN: expected a token that may write, found none. Fix: set it in the environment")
    if is_offline():
        raise SrcfastError("HF_HUB_OFFLINE: expected it not to be set, since push uploads, found it set. Fix: unset it")
    api = HfApi(endpoint=endpoint(), token=secret)

    def work() -> tuple[str, bool]:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and api.repo_info(repository).private is False:
            fix = "--public, or another repository"
            raise SrcfastError(f"{repository}: expected a private repository, found a public one. Fix: {fix}")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        before = api.repo_info(repository, revision=revision).sha
        operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        commit = api.create_commit(repository, operations, commit_message=title, revision=revision)
        return str(commit.oid), commit.oid != before

    return asked(repository, work)


def _object(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError for anything else."""
    try:
        return parse_object(regular(file).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(file=file, expected="a JSON object", found=error) from error


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _others(directory: Path, files: Mapping[str, Any]) -> list[str]:
    """List what of a directory is not uploaded; a card that it holds is replaced."""
    return sorted(
        entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(directory) if entry.name not in files
    )
