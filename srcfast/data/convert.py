"""Convert records of any format that is read to srcfast's, LLaVA's conversations, VLMEvalKit's tables or TRL's preferences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from srcfast.data.answers import gold_answers
from srcfast.data.jsonl import replacing, write_jsonl
from srcfast.data.readers import PREFERENCES, SAMPLES, holds_preferences, read_preferences, read_samples
from srcfast.data.records import Preference, Record, Sample, hidden_keys
from srcfast.data.turns import ASSISTANT, IMAGE_MARK, SYSTEM, USER, Turn, count_marks, message_parts
from srcfast.data.vlmeval import OPTION_LETTERS, QUESTION_KEY, write_table, write_vlmeval_tsv
from srcfast.errors import InputError

SAMPLE_FORMATS = ("auto", *SAMPLES, "vlmeval_tsv")
PREFERENCE_FORMATS = ("auto", *PREFERENCES)
TARGETS = ("jsonl", "llava", "trl", "vlmeval_tsv")  # formats that are written, too
_TURN_KEYS = {"id", "image", "images", "conversations", "rationale", "facts"}
_MESSAGE_KEYS = {"prompt", "chosen", "rejected", "images", "image", "turns"}
_PREDICTION_KEYS = {
    "index",
    "question",
    "answer",
    "prediction",
    "rationale",
    "ability",
    "image",
    "image_path",
    QUESTION_KEY,
}
_SPEAKERS = {SYSTEM: "system", USER: "human", ASSISTANT: "gpt"}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    source_format: str,
    target_format: str,
    image_root: Path | None = None,
    rejected: list[dict[str, Any]],
    image_output: Path | None = None,
    lost: Counter[str] | None = None,
) -> int:
    """Convert a file of records, write the target atomically, and return the number of records.

    Samples are written as jsonl, llava or vlmeval_tsv, preferences as jsonl or trl. Which of them a source has, its first records
    tell where its format does not.

    Args:
        source: file to read.
        target: file to write.
        source_format, target_format: of SAMPLE_FORMATS or PREFERENCE_FORMATS.
        image_root: directory that the source's image paths are relative to (default: its own); the target's are, too.
        rejected: rows about bad records are appended to it.
        image_output: where images within the source are written. The target's paths are relative to the target's directory if
            that contains `image_output`, else to `image_output`. Default: `<target's name>_images` beside the target.
        lost: counts, by name, the fields that the target format can't hold.

    Raises:
        InputError: no such conversion exists, the source as a whole can't be read, or all its records are bad.
    """
    lost = Counter() if lost is None else lost
    target = Path(target)
    if target.resolve() == Path(source).resolve():
        expected = "another file than the source"
        raise InputError(file=target, field="target", expected=expected, found="the source itself")
    formats = {source_format, target_format}
    if target_format not in TARGETS:
        raise InputError(file=target, field="format", expected=", ".join(TARGETS), found=target_format)
    only_samples, only_preferences = {"llava", "vlmeval_tsv"}, {"trl", "rlhf_v"}
    preferences = source_format not in only_samples and (
        bool(formats & only_preferences) or holds_preferences(Path(source))
    )
    if not formats <= set(PREFERENCE_FORMATS if preferences else SAMPLE_FORMATS):
        expected = f"samples among {', '.join(SAMPLE_FORMATS)}, or preferences among {', '.join(PREFERENCE_FORMATS)}"
        found = f"{'preferences' if preferences else 'samples'} from {source_format} to {target_format}"
        raise InputError(file=source, field="format", expected=expected, found=found)
    read: Callable[..., list[Any]] = read_preferences if preferences else read_samples
    output = image_output or target.with_name(f"{target.stem}_images")
    records = read(source, format=source_format, image_root=image_root, rejected=rejected, image_output=output)
    _check_not_empty(source, len(records), rejected)
    if target_format == "vlmeval_tsv":
        return write_vlmeval_tsv(target, records, lost)
    records = [_relative_to(record, target.parent) if record.image_root == output else record for record in records]
    if target_format in ("jsonl", "trl"):
        lost.update(name for record in records for name in hidden_keys(record))
    if target_format == "jsonl":
        return write_jsonl(target, (record.to_json() for record in records))
    to_row: Callable[..., dict[str, Any]] = _trl_row if preferences else _llava_row
    return _write_list(target, (to_row(record, lost) for record in records))


def _check_not_empty(source: str | Path, count: int, rejected: list[dict[str, Any]]) -> None:
    """Raise InputError, with the first reason, if no record is good."""
    if not count:
        found = f"none; the first: {rejected[0]['reason']}" if rejected else "none"
        raise InputError(file=source, expected="at least one good record", found=found)


def _relative_to(sample: Record, folder: Path) -> Record:
    """Make a record's image paths relative to `folder` if its image root is below that; else return it unchanged."""
    root, folder = sample.image_root.resolve(), folder.resolve()
    if not root.is_relative_to(folder):
        return sample
    below = root.relative_to(folder)
    return replace(sample, images=tuple(str(below / image) for image in sample.images), image_root=folder)


def _llava_row(sample: Sample, lost: Counter[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": sample.id}
    if sample.images:
        row["image"] = sample.images[0] if len(sample.images) == 1 else list(sample.images)
    row["conversations"] = [*_llava_turns(sample), {"from": "gpt", "value": sample.answer}]
    if sample.rationale is not None:
        row["rationale"] = sample.rationale
    if sample.facts:
        row["facts"] = list(sample.facts)
    lost.update(name for name in sample.extra if name in _TURN_KEYS)
    return row | {name: value for name, value in sample.extra.items() if name not in _TURN_KEYS}


def _llava_turns(sample: Sample) -> list[dict[str, Any]]:
    """Return the turns of a sample's prompt, with a mark for each image; earlier answers are no responses to train on."""
    turns = [*sample.turns, Turn(USER, sample.question)]
    unmarked = 0 if count_marks(turns) else len(sample.images)  # images before the first user turn's text
    rows: list[dict[str, Any]] = []
    for turn in turns:
        lines = [IMAGE_MARK] * unmarked if turn.role == USER else []
        row = {"from": _SPEAKERS[turn.role], "value": "\n".join((*lines, turn.text))}
        rows.append(row | {"loss": False} if turn.role == ASSISTANT else row)
        unmarked = 0 if lines else unmarked
    return rows


def _trl_row(pair: Preference, lost: Counter[str]) -> dict[str, Any]:
    """Convert a pair to a conversational row. TRL itself puts the images before the text of the first user message."""
    row = pair.to_json()
    flat = {name: value for name, value in row.items() if name not in _MESSAGE_KEYS and value is not None}
    nested = {name: value for name, value in flat.items() if isinstance(value, dict | list)}
    lost.update(list(nested))  # `datasets` needs one type a column, which nested fields that differ by row don't have
    return {
        "images": list(pair.images),
        "prompt": _trl_prompt(pair),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    } | {name: value for name, value in flat.items() if name not in nested}


def _trl_prompt(pair: Preference) -> list[dict[str, Any]]:
    """Return the messages of a pair's prompt: text, or parts where images stand between the words."""
    turns = [*pair.turns, Turn(USER, pair.prompt)]
    if not count_marks(turns):
        return [turn.to_json() for turn in turns]
    return [{"role": turn.role, "content": message_parts(turn.text)} for turn in turns]


def _write_list(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a JSON list, one item a line, atomically; return the number of items."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(b",\n" if count else b"[\n")
            file.write(json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8"))
            count += 1
        file.write(b"\n]\n" if count else b"[]\n")
    return count


def write_predictions_tsv(path: str | Path, rows: Iterable[tuple[Sample, str, str]], columns: Mapping[str, Any]) -> int:
    """Write predictions as a table that VLMEvalKit can score; return the number of rows.

    Args:
        rows: sample, prediction (the bare answer) and rationale.
        columns: of `prediction_columns` of all samples.
    """
    return write_table(path, list(columns), (_prediction_row(*row) for row in rows))


def prediction_columns(samples: Iterable[Sample]) -> dict[str, None]:
    """Return the columns of the predictions on these samples: those of their table, without pictures and empty ones.

    VLMEvalKit's evaluators read the table's further columns (split, category, l2-category, ...) out of the predictions, and take
    each that is there for filled in.
    """
    letters: set[str] = set()
    more: dict[str, None] = {}
    for sample in samples:
        letters |= _lettered(sample.extra.get("options")).keys()
        more |= dict.fromkeys(_further_cells(sample))
    ordered = [letter for letter in OPTION_LETTERS if letter in letters]
    return dict.fromkeys(("index", "question", *ordered, "answer", "prediction", "rationale", *more))


def _prediction_row(sample: Sample, prediction: str, rationale: str) -> dict[str, Any]:
    golds = gold_answers(sample)
    return {
        "index": sample.id,
        "question": sample.extra.get(QUESTION_KEY, sample.question),
        "answer": golds[0] if len(golds) == 1 else str(golds),  # a list as VLMEvalKit's tables have it
        "prediction": prediction,
        "rationale": rationale,
        **_lettered(sample.extra.get("options")),
        **_further_cells(sample),
    }


def _further_cells(sample: Sample) -> dict[str, Any]:
    """Return a sample's further fields that a cell can hold; its ability is its category, if it has no other."""
    fields = {"category": sample.extra["ability"]} if "ability" in sample.extra else {}
    fields |= {name: value for name, value in sample.extra.items() if name not in _PREDICTION_KEYS}
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, str | int | float) and str(value).strip() and name not in OPTION_LETTERS
    }


def _lettered(options: object) -> dict[str, Any]:
    """Return options by letter; empty if a dataset has them in another form."""
    by_name = options if isinstance(options, dict) else {}
    return {letter: by_name[letter] for letter in OPTION_LETTERS if letter in by_name}
