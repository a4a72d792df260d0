"""Record what each stage reads (samples, files of earlier stages, models), and name what has changed since.

`inputs.jsonl` has a row of short hashes for every sample, one a field; that of `images` is of their contents. What a finished
stage has read is one hash for each of its inputs, in the manifest. These hashes decide; the file names what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from srcfast.data.jsonl import as_json, json_hash, read_jsonl, write_jsonl
from srcfast.data.records import Preference, Sample
from srcfast.errors import InputError
from srcfast.run.metric_rows import way_out
from srcfast.stages.prompts import image_prints

FILE = "inputs.jsonl"
COMMAND = "data"  # the name of a command's only set
PROMPT = ("question", "turns", "images")
FIELDS = (*PROMPT, "answer", "rationale", "facts", "other fields")
JUDGED = ("question", "turns", "answer", "rationale", "facts")  # that the R-Scorer reads
DIGITS = 12  # of a field's hash: 48 bits

Prints = dict[str, tuple[str, ...]]  # sample id -> the hash of each of FIELDS; of a preference's id those of PROMPT


def prints_of(records: Sequence[Sample | Preference]) -> Prints:
    """Hash each record's fields, in the records' order. Raises InputError for an image that can't be read."""
    prints = Prints()
    for record, images in zip(records, image_prints(records), strict=True):
        turns = [turn.to_json() for turn in record.turns]
        of_sample = (
            () if isinstance(record, Preference) else (record.answer, record.rationale, record.facts, record.extra)
        )
        values = (record.question, turns, images, *of_sample)
        prints[record.id] = tuple(json_hash(as_json({"": value}))[:DIGITS] for value in values)
    return prints


def read_prints(directory: Path, name: str) -> Prints:
    """Read the rows of one set in a directory's `inputs.jsonl`; empty where there is no file. Raises InputError."""
    file = directory / FILE
    if not file.is_file():
        return {}
    rows = (row for _, row in read_jsonl(file) if row.get("set") == name)
    return {str(row.get("id")): tuple(str(row.get(field)) for field in FIELDS) for row in rows}


def changes(before: Prints, now: Prints, fields: Sequence[str]) -> list[str]:
    """List by name what differs in these fields, at most one text a sample; empty: nothing, but perhaps the order."""
    indices = [FIELDS.index(field) for field in fields]
    texts = []
    for key, old in before.items():
        if key not in now:
            texts.append(f"sample {key!r} is missing")
        elif names := [FIELDS[index] for index in indices if old[index] != now[key][index]]:
            texts.append(f"{' and '.join(names)} of sample {key!r}")
    return texts + [f"sample {key!r} is new" for key in now if key not in before]


def _listed(differences: Sequence[str]) -> str:
    """Join the first three texts, and count the others; without one nothing but the order can have changed."""
    more = f", and {len(differences) - 3:,} more" if len(differences) > 3 else ""
    return (", ".join(differences[:3]) or "the order of the samples") + more


@dataclass(frozen=True)
class StageInputs:
    """What a stage of a calibration reads.

    Attributes:
        samples: by the name of their set: the samples in the stage's order, and which of their fields are read.
        hashes: of other inputs by name, such as a model's or a file's.
    """

    samples: Mapping[str, tuple[Sequence[Sample], Sequence[str]]]
    hashes: Mapping[str, Callable[[], str]] = field(default_factory=dict)


class InputRecord:
    """The inputs of a run or a command: hashes each set once, compares, and writes `inputs.jsonl`. Used on rank 0 alone.

    Args:
        directory: of `inputs.jsonl`.
        sets: records by the name of their set; a command's only set is `COMMAND`.
    """

    def __init__(self, directory: Path, sets: Mapping[str, Sequence[Sample | Preference]]) -> None:
        self.directory, self.sets = directory, sets
        self._prints: dict[str, Prints] = {}
        self._written = False

    def prints(self, name: str) -> Prints:
        """Return the hashes of a set's records."""
        if name not in self._prints:
            self._prints[name] = prints_of(self.sets[name])
        return self._prints[name]

    def all(self) -> dict[str, str]:
        """Return one hash for each set, of all fields, by its name."""
        return {name: json_hash(list(self.prints(name).items())) for name in self.sets}

    def of(self, inputs: StageInputs) -> dict[str, str]:
        """Return one hash for each of a stage's inputs, by name."""
        result = {}
        for name, (samples, fields) in inputs.samples.items():
            indices, prints = [FIELDS.index(field) for field in fields], self.prints(name)
            result[name] = json_hash([[s.id, *(prints[s.id][index] for index in indices)] for s in samples])
        return result | {name: value() for name, value in inputs.hashes.items()}

    def write(self) -> None:
        """Write `inputs.jsonl`, if this process has not; in a run once all finished stages were compared with it."""
        if self._written:
            return
        rows = (
            {"set": name, "id": key} | dict(zip(FIELDS, hashes, strict=False))
            for name in self.sets
            for key, hashes in self.prints(name).items()
        )
        write_jsonl(self.directory / FILE, rows)
        self._written = True

    def check(self, stage: str, recorded: Mapping[str, str], inputs: StageInputs) -> None:
        """Raise InputError where a finished stage's inputs are no longer those that are recorded; it names what has changed."""
        now = self.of(inputs)
        changed = next((name for name in recorded if recorded[name] != now.get(name)), None)
        if changed is None:
            return
        found = "another"
        if changed in inputs.samples:
            before, fields = read_prints(self.directory, changed), inputs.samples[changed][1]
            found = f"changed since: {_listed(changes(before, self.prints(changed), fields))}"
        raise InputError(
            field=changed,
            expected=f"what stage {stage!r} of {self.directory} has read",
            found=found,
            fix=f"{way_out(stage)}; or take another name or output directory",
        )

    def check_made_of(self, directory: Path, fields: Sequence[str] = PROMPT) -> None:
        """Compare a command's records with those of the same ids that an earlier command's files were made of.

        Args:
            directory: the earlier command's output; without `inputs.jsonl` nothing is compared.
            fields: that the earlier command has read.

        Raises:
            InputError: a record has changed since; it is named.
        """
        before = read_prints(directory, COMMAND)
        now = {key: value for key, value in self.prints(COMMAND).items() if key in before} if before else {}
        if differences := changes({key: before[key] for key in now}, now, fields):
            raise InputError(
                file=directory / FILE,
                expected="the records that these files were made of",
                found=f"changed since: {_listed(differences)}",
                fix="put the data back as they were, or run the earlier command again on the changed data",
            )
