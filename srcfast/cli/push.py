"""The command `push`: upload an adapter or a merged checkpoint with its model card to the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from srcfast.config.load import load_config
from srcfast.data.jsonl import write_text
from srcfast.errors import ConfigError, InputError
from srcfast.hub.names import HubName, model_name, name_of
from srcfast.hub.upload import (
    ADAPTER_FILES,
    CARD,
    Upload,
    adapter_upload,
    base_of_adapter,
    checkpoint_upload,
)
from srcfast.hub.upload import push as upload_files
from srcfast.report.model_card import Subject, last_adapter, model_card, shown_value
from srcfast.run.directory import iteration_of

LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")  # the Hub's identifiers are such
OUTPUTS_OF_A_RUN = 2  # levels below a run at which its adapters lie: iteration-1/adapter


@dataclass(frozen=True)
class _Chosen:
    """The directory to upload, its run, and which model of the run it is."""

    directory: Path
    kind: str
    run: Path | None
    model: str


def push(
    source: Path,
    repository: str,
    merged: Path | None,
    private: bool,
    revision: str | None,
    licence: str | None,
    dry_run: bool,
    output: Path | None,
) -> None:
    """Upload an adapter or a checkpoint with its card, in one commit; a dry run prints the card and the files instead.

    Args:
        source: a run, whose last adapter is meant, or the directory of an adapter or a checkpoint.
        repository: owner/name.
        merged: the directory that `srcfast merge` wrote of the run's adapter, which is uploaded in its place.
        private: see `srcfast.hub.upload.push`.
        revision: branch.
        licence: identifier for the card.
        dry_run: nothing is sent.
        output: directory to which a dry run writes the card.

    Raises:
        ConfigError: an option can't be used.
        InputError: there is nothing to upload.
        SrcfastError: the Hub refuses.
    """
    name = model_name(f"hf://{repository}")
    if name is None or name.repository != repository:
        raise ConfigError(f"repository: expected owner/name, found {repository!r}. Fix: name a branch by --revision")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise ConfigError(f"--licence: expected an identifier of the Hub, such as apache-2.0, found {licence!r}")
    if output is not None and not dry_run:
        raise ConfigError("--output: expected --dry-run beside it, found none. Fix: leave one of them out")
    chosen = _choose(source, merged)
    base, base_name = _base_of(chosen)
    upload = (
        adapter_upload(chosen.directory, base_name) if chosen.kind == "adapter" else checkpoint_upload(chosen.directory)
    )
    subject = Subject(
        repository=repository,
        kind=chosen.kind,
        base=base,
        base_name=base_name,
        licence=licence,
        run=chosen.run,
        model=chosen.model,
    )
    card = model_card(subject)
    upload = Upload({**upload.files, CARD: card.encode()}, [name for name in upload.left_out if name != CARD])
    left_out = f"left out: {', '.join(upload.left_out)}" if upload.left_out else "nothing is left out"
    files = f"{repository}: {', '.join(upload.files)}; {left_out}"
    if dry_run:
        if output is None:
            print(card)
        else:
            write_text(output / CARD, card)
        print(f"nothing is sent. {files}")
        return
    title = f"Upload {'an adapter' if chosen.kind == 'adapter' else 'a checkpoint'} of srcfast"
    commit, is_new = upload_files(upload, repository, private=private, revision=revision, title=title)
    print(files)
    print(f"{repository}@{commit}: {'uploaded' if is_new else 'all of it was there'}")


def _choose(source: Path, merged: Path | None) -> _Chosen:
    """Return what is meant by a run or a directory. Raises InputError, ConfigError."""
    run, model = None, ""
    directory = source
    if _is_run(source):
        if (last := last_adapter(source)) is None:
            expected, fix = "a run that has trained an adapter", "let it finish a training stage"
            raise InputError(file=source, expected=expected, found="no finished one", fix=fix)
        run, (model, directory) = source, last
    else:
        inside = [parent for parent in source.resolve().parents[:OUTPUTS_OF_A_RUN] if _is_run(parent)]
        if inside:
            run = inside[0]
            of = source.resolve().relative_to(run.resolve()).parts[0]
            model = of if of == "rationale" or iteration_of(of) else ""
    if merged is not None:
        return _Chosen(merged, "merged", run, model)
    kind = "adapter" if (directory / ADAPTER_FILES[0]).is_file() else "merged"
    return _Chosen(directory, kind, run, model)


def _is_run(path: Path) -> bool:
    return (path / "manifest.json").is_file() and (path / "config.yaml").is_file()


def _base_of(chosen: _Chosen) -> tuple[str, HubName | None]:
    """Return what the base of the files is called, and its name on the Hub if it has one."""
    if chosen.run is not None:
        text = load_config(chosen.run / "config.yaml").model.path
        name = model_name(text) if text.startswith("hf://") else name_of(text)  # a run records names so
    elif chosen.kind == "adapter":
        stated, name = base_of_adapter(chosen.directory)
        text = stated or "a base that its settings don't name"
    else:
        text, name = "a base that is not recorded", None
    if name is not None:
        return name.repository, name
    return ("srcfast's embedded LVLM" if text == "embedded" else shown_value(text)), None
