"""Records from one format to another: ours, LLaVA's conversations, VLMEvalKit's tables, TRL's preferences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import read_lines, replacing, write_jsonl
from srcfast.data.readers import IMAGE_MARK, read_preferences, read_samples
from srcfast.data.records import Preference, Sample
from srcfast.data.vlmeval import OPTION_LETTERS, write_table, write_vlmeval_tsv
from srcfast.errors import InputError

SAMPLE_FORMATS = ("jsonl", "llava", "vlmeval_tsv")
PREFERENCE_FORMATS = ("jsonl", "trl")
_TURN_KEYS = {"id", "image", "images", "conversations", "rationale", "facts"}
_MESSAGE_KEYS = {"prompt", "chosen", "rejected", "images", "image"}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    source_format: str,
    target_format: str,
    image_root: Path,
    rejected: list[dict[str, Any]],
    image_output: Path | None = None,
    lost: Counter[str] | None = None,
) -> int:
    """Write what `source` holds as `target`, at once or not at all; returns how many records.

    Samples go among jsonl, llava and vlmeval_tsv, preferences among jsonl and trl. A jsonl source holds preferences
    if its first record has `chosen` and `rejected`.

    Args:
        image_root: folder that the source's image paths are relative to; the target's are relative to it too.
        rejected: bad records are appended here.
        image_output: where a table's images are written; the target's paths are relative to the target's folder
            where they lie below it, else to `image_output`. Default: `<target's name>_images` beside the target.
        lost: counts, by name, the fields that the target format can't carry.

    Raises:
        InputError: there is no such conversion, the source as a whole can't be read, or no record of it is good.
    """
    lost = Counter() if lost is None else lost
    target = Path(target)
    if target.resolve() == Path(source).resolve():
        raise InputError(
            file=target, field="target", expected="another file than the source", found="the source itself"
        )
    formats = {source_format, target_format}
    preferences = "trl" in formats or (source_format == "jsonl" and _holds_preferences(source))
    if preferences and formats <= set(PREFERENCE_FORMATS):
        pairs = read_preferences(source, format=source_format, image_root=image_root, rejected=rejected)
        _refuse_empty(source, len(pairs), rejected)
        if target_format == "jsonl":
            return write_jsonl(target, (pair.to_json() for pair in pairs))
        return _write_list(target, (_trl_row(pair, lost) for pair in pairs))
    if preferences or not formats <= set(SAMPLE_FORMATS):
        raise InputError(
            file=source,
            field="format",
            expected=f"samples among {', '.join(SAMPLE_FORMATS)}, or preferences among jsonl and trl",
            found=f"{'preferences' if preferences else 'samples'} from {source_format} to {target_format}",
        )
    image_output = image_output or target.with_name(f"{target.stem}_images")
    samples = read_samples(
        source, format=source_format, image_root=image_root, rejected=rejected, image_output=image_output
    )
    _refuse_empty(source, len(samples), rejected)
    if target_format == "vlmeval_tsv":
        return write_vlmeval_tsv(target, samples, lost)
    if source_format == "vlmeval_tsv":
        samples = [_relative_to(sample, target.parent) for sample in samples]
    if target_format == "jsonl":
        return write_jsonl(target, (sample.to_json() for sample in samples))
    return _write_list(target, (_llava_row(sample, lost) for sample in samples))


def _holds_preferences(source: str | Path) -> bool:
    first = next((row for _, row in read_lines(source) if isinstance(row, dict)), {})
    return {"chosen", "rejected"} <= first.keys()


def _refuse_empty(source: str | Path, count: int, rejected: list[dict[str, Any]]) -> None:
    if not count:
        found = f"none; the first: {rejected[0]['reason']}" if rejected else "none"
        raise InputError(file=source, expected="at least one good record", found=found)


def _relative_to(sample: Sample, folder: Path) -> Sample:
    """The sample with its image paths relative to `folder`, where they lie below it."""
    root, folder = sample.image_root.resolve(), folder.resolve()
    if not root.is_relative_to(folder):
        return sample
    below = root.relative_to(folder)
    return replace(sample, images=tuple(str(below / image) for image in sample.images), image_root=folder)


def _llava_row(sample: Sample, lost: Counter[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": sample.id}
    if sample.images:
        row["image"] = sample.images[0] if len(sample.images) == 1 else list(sample.images)
    asked = "\n".join((*[IMAGE_MARK] * len(sample.images), sample.question))
    row["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": sample.answer}]
    if sample.rationale is not None:
        row["rationale"] = sample.rationale
    if sample.facts:
        row["facts"] = list(sample.facts)
    return row | _carried(sample.extra, _TURN_KEYS, lost)


def _trl_row(pair: Preference, lost: Counter[str]) -> dict[str, Any]:
    """A conversational row; TRL puts the images before the text of the first user message by itself."""
    flat: dict[str, Any] = {}
    for name, value in pair.to_json().items():
        if name not in _MESSAGE_KEYS and value is not None:
            flat[name] = value
    nested = {name: value for name, value in flat.items() if isinstance(value, dict | list)}
    lost.update(list(nested))  # `datasets` wants one type a column: nested fields that differ by row would stop it
    return {
        "images": list(pair.images),
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    } | {name: value for name, value in flat.items() if name not in nested}


def _carried(extra: Mapping[str, Any], taken: set[str], lost: Counter[str]) -> dict[str, Any]:
    """The extra fields whose names the target format doesn't use itself; the others are counted as lost."""
    lost.update(name for name in extra if name in taken)
    return {name: value for name, value in extra.items() if name not in taken}


def _write_list(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """A JSON list, one item a line."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(b",\n" if count else b"[\n")
            file.write(json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8"))
            count += 1
        file.write(b"\n]\n" if count else b"[]\n")
    return count


def write_predictions_tsv(path: str | Path, rows: Iterable[Mapping[str, Any]], letters: Sequence[str]) -> int:
    """Write predictions as VLMEvalKit scores them, row by row; returns how many.

    Args:
        rows: index (or id), question, answer, prediction (the bare answer), and if known rationale, category (or
            ability), split, and options (capital letter -> text; options in another form are left out).
        letters: `letters_of` all rows' options; each has a column.
    """
    columns = ("index", "question", *letters, "answer", "prediction", "rationale", "category", "split")
    return write_table(path, columns, map(_prediction_row, rows))


def letters_of(options: Iterable[object]) -> list[str]:
    """The letters that some of these options have, in their order."""
    found = {letter for one in options for letter in _lettered(one)}
    return [letter for letter in OPTION_LETTERS if letter in found]


def _prediction_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "index": row["index"] if "index" in row else row["id"],
        "question": row["question"],
        "answer": row["answer"],
        "prediction": row["prediction"],
        "rationale": row.get("rationale"),
        "category": row.get("category") or row.get("ability"),
        "split": row.get("split"),
        **_lettered(row.get("options")),
    }


def _lettered(options: object) -> dict[str, Any]:
    """Options by letter; none where a data set has them in a form of its own."""
    found = options if isinstance(options, dict) else {}
    return {letter: found[letter] for letter in OPTION_LETTERS if letter in found}
