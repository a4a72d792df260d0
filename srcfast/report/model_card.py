"""The model card of an adapter or a checkpoint: base, data, settings, results with intervals, use and limits, versions.

It holds no path of this machine: of a local path the last part alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.config.datasets import DatasetConfig
from srcfast.config.load import load_config
from srcfast.config.settings import Config
from srcfast.config.yaml import dump_yaml
from srcfast.data.answer_rules import rule_text
from srcfast.data.jsonl import flatten
from srcfast.hub.names import HubName, dataset_name, model_name
from srcfast.report.run_files import RunFiles, read_run
from srcfast.run.directory import RunDirectory, iteration_of
from srcfast.run.environment import version

# Settings that say nothing of the model: of this machine, or shown elsewhere on the card.
ELSEWHERE = re.compile(
    r"(name|output|quiet|threads|preset|memory|max_rejected)|(data|checkpoint|distributed)\..*|model\.(path|device)"
)
SHOWN_VERSIONS = ("srcfast", "torch", "transformers", "python")


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        repository: owner/name on the Hub.
        kind: "adapter" or "merged".
        base: what the base is called, without a directory.
        base_name: the base's name on the Hub, if it has one.
        licence: identifier of a licence, None where the user has stated none.
        run: the run directory that it comes from.
        model: which of the run's models it is: "rationale", "iteration-1", ...
    """

    repository: str
    kind: str
    base: str
    base_name: HubName | None = None
    licence: str | None = None
    run: Path | None = None
    model: str = ""


def last_adapter(run: Path) -> tuple[str, Path] | None:
    """Return the model of the last training stage that a run has finished, and its adapter; None before the first."""
    directory = RunDirectory(run)
    done = [name for name in directory.manifest() if name == "rationale" or name.endswith("/dpo")]
    if not done:
        return None
    last = max(map(iteration_of, done))
    return (f"iteration-{last}" if last else "rationale"), directory.adapter(last)


def model_card(subject: Subject) -> str:
    """Return the card as Markdown with a YAML header.

    Raises:
        InputError, ConfigError: a file of the run is damaged.
    """
    config, manifest, results = None, {}, None
    if subject.run is not None:
        config = load_config(subject.run / "config.yaml")
        manifest = RunDirectory(subject.run).manifest()
        results = read_run(subject.run) if (subject.run / "summary.json").is_file() else None
    parts = [
        f"---\n{dump_yaml(_header(subject, config), sort_keys=False)}---",
        f"# {_plain(subject.repository.rpartition('/')[2])}",
        _what(subject),
        f"## Base\n\n{_base(subject)}",
        f"## Data\n\n{_data(config, manifest, subject.model)}",
        f"## Settings\n\n{_settings(config)}",
        f"## Results\n\n{_results(results, subject.model)}",
        f"## Intended use and limits\n\n{LIMITS}",
        f"## Use\n\n{_use(subject)}",
        f"## Versions\n\n{_versions(results)}",
        f"## Licence\n\n{_licence(subject)}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(subject: Subject, config: Config | None) -> dict[str, Any]:
    adapter = subject.kind == "adapter"
    header: dict[str, Any] = {}
    if subject.base_name is not None:
        header["base_model"] = subject.base_name.repository
        header["base_model_relation"] = "adapter" if adapter else "finetune"
    header["library_name"] = "peft" if adapter else "transformers"
    header["pipeline_tag"] = "image-text-to-text"
    if subject.licence is not None:
        header["license"] = subject.licence
    header["tags"] = ["srcfast", "self-rationale-calibration", *(["lora"] if adapter else [])]
    names = [name for dataset in (config.data.train if config else ()) for name in _names_of(dataset)]
    if names:
        header["datasets"] = list(dict.fromkeys(name.repository for name in names))
    return header


def _what(subject: Subject) -> str:
    what = "A LoRA adapter, in PEFT's format, of" if subject.kind == "adapter" else "A checkpoint made from"
    by = "Self-Rationale Calibration"
    stage = iteration_of(subject.model)
    how = (
        f"after {stage} round{'s' if stage > 1 else ''} of {by}"
        if stage
        else f"after the rationale fine-tuning of {by}"
    )
    trained = f", {how}" if subject.model else ""
    return (
        f"{what} {_plain(subject.base)}{trained}. It was trained with srcfast: the model states what it sees and what follows "
        "from it before it answers, and preference training favours answers that their rationale supports."
    )


def _base(subject: Subject) -> str:
    name = subject.base_name
    if name is None:
        return (
            f"{_plain(subject.base)}, from a local directory; it is not known whether a repository of the Hub has it."
        )
    revision = f"commit `{name.revision}`" if name.is_pinned else f"revision `{name.revision}` (no commit was recorded)"
    return f"`{name.repository}`, {revision}."


def _names_of(dataset: DatasetConfig) -> list[HubName]:
    return [name for path in dataset.paths if (name := dataset_name(path)) is not None]


def _files(dataset: DatasetConfig) -> str:
    """Return a dataset's files: names of the Hub, and the last parts of local paths."""
    return ", ".join(shown_value(path) for path in dataset.paths)


def _data(config: Config | None, manifest: Mapping[str, Any], model: str) -> str:
    if config is None:
        return "Not recorded: the files were uploaded without their run."
    rows = [("set", "use", "format", "split", "samples drawn", "files")]
    for use, datasets in (("training", config.data.train), ("evaluation", config.data.evaluation)):
        for dataset in datasets:
            uses = f"{use}: {', '.join(dataset.use)}" if use == "training" else use
            drawn = str(dataset.limit or "all")
            rows.append(
                (dataset.name, uses, dataset.format, dataset.split, drawn, _files(dataset) or "made by srcfast")
            )
    lines = []
    if "pairs" in manifest.get("rationale", {}):
        lines.append(f"- Rationale fine-tuning: {manifest['rationale']['pairs']:,} rationale-answer pairs.")
    for number in range(1, iteration_of(model) + 1):
        funnel = manifest.get(f"iteration-{number}/preferences", {}).get("funnel", {})
        pairs = manifest.get(f"iteration-{number}/dpo", {}).get("pairs")
        if pairs is not None:
            of = f" from {funnel['samples']:,} samples" if "samples" in funnel else ""
            lines.append(f"- Round {number}: {pairs:,} preference pairs{of}, made from the model's candidates.")
    return "\n\n".join([_table(rows), *(["\n".join(lines)] if lines else [])])


def _settings(config: Config | None) -> str:
    if config is None:
        return "Not recorded."
    default, values = flatten(Config().model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    rows = [
        (f"`{key}`", shown_value(value))
        for key, value in values.items()
        if value != default.get(key) and not ELSEWHERE.fullmatch(key)
    ]
    if not rows:
        return "The defaults of srcfast."
    return "Those that differ from srcfast's defaults.\n\n" + _table([("setting", "value"), *rows])


def shown_value(value: Any) -> str:
    """Return a setting's value as text; of a local path the last part, of several values each."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown_value, value))
    text = str(value)
    if text.startswith("hf://") and (model_name(text) or dataset_name(text)) is not None:
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1]


def _results(results: RunFiles | None, model: str) -> str:
    if results is None or not results.evaluations:
        return "No evaluation was recorded."
    rows = [("evaluation set", "samples", "model", "right, %", "right and aligned, %")]
    notes = []
    last = iteration_of(model)
    for dataset, split in results.splits:
        for row in results.evaluations:
            if (row["dataset"], row["split"]) != (dataset, split) or iteration_of(row["model"]) > last:
                continue
            name = f"**{_plain(row['model'])}** (this model)" if row["model"] == model else _plain(row["model"])
            shares = (
                _share(row["accuracy"], row.get("accuracy_ci95")),
                _share(row.get("alignment"), row.get("alignment_ci95")),
            )
            rows.append((f"{dataset} {split}", f"{row['n']:,}", name, *shares))
        first = next(row for row in results.evaluations if (row["dataset"], row["split"]) == (dataset, split))
        if rule := rule_text(first):
            notes.append(f"{_plain(dataset)} {_plain(split)}: {_plain(rule)}.")
    text = (
        "Greedy answers, with 95 % intervals. `base` is the model before training. Aligned: the claims of the rationale are "
        "true, where an oracle can check them."
    )
    return "\n\n".join([text, _table(rows, escaped=(2,)), *notes])


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "not measured"
    text = f"{100 * value:.1f}"
    return text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


LIMITS = """\
For research on questions about images whose answers can be checked, on data like those above.

- A rationale is text that the model writes. It may be wrong where the answer is right, and it is no proof of how the answer came
  about.
- The results hold for the evaluation sets above. Other images, languages and questions were not measured.
- Errors, biases and limits of use of the base and of the data apply to this model as well.
- Don't use its answers without a check where a wrong one does harm: in medicine, law, safety, or decisions about people."""


def _use(subject: Subject) -> str:
    base = '"PATH OF THE BASE"' if subject.base_name is None else f'"{subject.base_name.repository}"'
    revision = "" if subject.base_name is None else f', revision="{subject.base_name.revision}"'
    named = (
        "PATH_OF_THE_BASE"
        if subject.base_name is None
        else f"{subject.base_name.repository}@{subject.base_name.revision}"
    )
    if subject.kind == "adapter":
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f"base = AutoModelForImageTextToText.from_pretrained({base}{revision})",
            f'model = PeftModel.from_pretrained(base, "{subject.repository}")',
            f"processor = AutoProcessor.from_pretrained({base}{revision})",
        ]
        command = f"srcfast chat {named} --adapter {subject.repository} --image photo.png"
    else:
        code = [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f'model = AutoModelForImageTextToText.from_pretrained("{subject.repository}")',
            f'processor = AutoProcessor.from_pretrained("{subject.repository}")',
        ]
        command = f"srcfast chat {subject.repository} --image photo.png"
    return "```python\n" + "\n".join(code) + f"\n```\n\nor\n\n```sh\n{command}\n```"


def _versions(results: RunFiles | None) -> str:
    if results is None or not results.environment:
        return f"Uploaded by srcfast {version('srcfast')}."
    versions = [f"{name} {results.environment[name]}" for name in SHOWN_VERSIONS if results.environment.get(name)]
    return f"Trained with {_plain(', '.join(versions))}."


def _licence(subject: Subject) -> str:
    stated = "none was stated" if subject.licence is None else f"`{subject.licence}`, as stated by who uploaded it"
    return f"Of these files: {stated}. The licences of the base and of the data apply to what is made from them."


def _table(rows: Iterable[Sequence[str]], escaped: Sequence[int] = ()) -> str:
    """Return a Markdown table, its first row the heading; the columns `escaped` are Markdown already."""
    lines = []
    for number, row in enumerate(rows):
        cells = [cell if column in escaped and number else _plain(cell) for column, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cells)} |")
    head, *rest = lines
    return "\n".join([head, f"|{' --- |' * (head.count(' | ') + 1)}", *rest])


def _plain(text: str) -> str:
    """Return a text in which a name of a dataset or a model is no markup: one line, without HTML, bars, links and emphasis."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\|*<>\[\]])", r"\\\1", line)
