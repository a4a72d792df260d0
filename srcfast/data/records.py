"""The records that stages exchange, one JSON object a line: samples, candidates, preferences. Unknown keys are preserved.

The prompt of a sample or a preference is its question, after the `turns` before it if it has some; see `srcfast.data.turns`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from srcfast.data.turns import (
    ASSISTANT,
    IMAGE_MARK,
    SYSTEM,
    USER,
    Turn,
    count_marks,
    settle_marks,
    tidy,
    without_marks,
)
from srcfast.errors import InputError

ReferenceQuality = Literal[
    "complete", "noisy", "partial", "answer"
]  # how far facts or rationale of a sample can be trusted
LOGPROB_ROUNDING = 1e-3  # a log-probability may exceed 0 by so much


class MadeUpId(str):
    """An id that a reader has given a record; it makes way for the same id in the file."""


@dataclass(frozen=True)
class Sample:
    """A question about images. `images` are paths relative to `image_root`; `facts` are true sentences about the images."""

    id: str
    images: tuple[str, ...]
    question: str
    answer: str
    rationale: str | None = None
    facts: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    image_root: Path = Path(".")
    turns: tuple[Turn, ...] = ()
    source: tuple[str, int] | None = field(default=None, compare=False)  # file and line that the record was read from

    def to_json(self) -> dict[str, Any]:
        """Convert to `{id, images, question, answer, rationale?, facts?, turns?}` and the extra keys."""
        return _to_json(self, optional=("rationale", "facts", "turns"))

    @classmethod
    def from_json(cls, row: Mapping[str, Any], *, file: str | Path, line: int | None, image_root: Path) -> Sample:
        """Read a record. Raises InputError naming file, line and field."""
        reader = Fields(row, file, line)
        tolerance = reader.peek_number("tolerance", default=0.0)
        if not 0.0 <= tolerance < 1.0:
            raise reader.error("tolerance", "a share of the answer, a number in [0, 1)", tolerance)
        return cls(
            id=reader.identifier("id"),
            images=reader.images(),
            turns=reader.turns(),
            question=reader.text("question"),
            answer=reader.answer("answer"),
            rationale=reader.optional_text("rationale"),
            facts=reader.sentences("facts"),
            extra=reader.rest(),
            image_root=image_root,
        )


@dataclass(frozen=True)
class Candidate:
    """A response that the model generated for a sample; `logprob` is the model's, summed over `token_ids`."""

    id: str
    sample_id: str
    text: str
    rationale: str
    answer: str
    logprob: float
    token_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Convert to `{id, sample_id, text, rationale, answer, logprob, token_ids}` and the extra keys."""
        return _to_json(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any], *, file: str | Path, line: int | None) -> Candidate:
        """Read a record. Raises InputError naming file, line and field."""
        reader = Fields(row, file, line)
        return cls(
            id=reader.identifier("id"),
            sample_id=reader.identifier("sample_id"),
            text=reader.text("text"),
            rationale=reader.optional_text("rationale") or "",
            answer=reader.optional_text("answer") or "",
            logprob=reader.logprob("logprob"),
            token_ids=reader.integers("token_ids"),
            extra=reader.rest(),
        )


def first_of_texts(candidates: Iterable[Candidate]) -> dict[str, int]:
    """Return the distinct texts of candidates, in order, each with the index of the first candidate that has it."""
    first_of: dict[str, int] = {}
    for index, candidate in enumerate(candidates):
        first_of.setdefault(candidate.text, index)
    return first_of


CREDITS = (None, "response", "sentence", "answer")
SPAN_FIELDS = ("credit", "reference_chosen_span_logprob", "reference_rejected_span_logprob")


@dataclass(frozen=True)
class Preference:
    """A chosen and a rejected response, their confidence and, once computed, their reference log-probabilities.

    Attributes:
        credit: what the preference is credited to: `sentence`, `answer`, or None: the whole responses (`stages/credit.py`).
        reference_chosen_span_logprob, reference_rejected_span_logprob: log pi_ref of the credited tokens, where not all are.
    """

    sample_id: str
    images: tuple[str, ...]
    prompt: str
    chosen: str
    rejected: str
    confidence: float = 1.0
    reference_chosen_logprob: float | None = None
    reference_rejected_logprob: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    image_root: Path = Path(".")
    turns: tuple[Turn, ...] = ()
    credit: str | None = None
    reference_chosen_span_logprob: float | None = None
    reference_rejected_span_logprob: float | None = None
    source: tuple[str, int] | None = field(default=None, compare=False)  # file and line that the record was read from

    @property
    def id(self) -> str:
        """The sample's id."""
        return self.sample_id

    @property
    def question(self) -> str:
        """The prompt's last turn."""
        return self.prompt

    @property
    def judge_confidence(self) -> float:
        """The R-Scorer's confidence in this pair, which may not weigh it; `confidence` where none is stored beside it."""
        judged = self.extra.get("judge_confidence")
        return self.confidence if judged is None else float(judged)

    def to_json(self) -> dict[str, Any]:
        """Convert to a record with all fields but `image_root`, `source`, empty `turns` and what only credited spans need.

        The extra keys are among them.
        """
        return _to_json(self, optional=("turns", *SPAN_FIELDS))

    @classmethod
    def from_json(cls, row: Mapping[str, Any], *, file: str | Path, line: int | None, image_root: Path) -> Preference:
        """Read a record. Raises InputError naming file, line and field."""
        reader = Fields(row, file, line)
        confidence = reader.number("confidence", default=1.0)
        if not 0.0 < confidence <= 1.0:
            raise reader.error("confidence", "a number in (0, 1]", confidence, "leave pairs of no confidence out")
        judged = reader.peek_number("judge_confidence", default=confidence)
        if not 0.0 <= judged <= 1.0:
            fix = "leave it out, or score the candidates again"
            raise reader.error("judge_confidence", "a number in [0, 1]", judged, fix)
        sample_id = reader.identifier("sample_id", default="" if line is None else f"line-{line}")
        images, turns, prompt = reader.images(), reader.turns(), reader.text("prompt")
        chosen, rejected = reader.text("chosen"), reader.text("rejected")
        if chosen == rejected:
            raise reader.error("rejected", "a response other than the chosen one", rejected, "leave the pair out")
        credit = reader.optional_text("credit")
        if credit not in CREDITS:
            raise reader.error("credit", "response, sentence or answer", credit, "leave it out: `dpo.credit` says it")
        return cls(
            sample_id=sample_id,
            images=images,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            confidence=confidence,
            reference_chosen_logprob=reader.optional_number("reference_chosen_logprob"),
            reference_rejected_logprob=reader.optional_number("reference_rejected_logprob"),
            credit=None if credit == "response" else credit,
            reference_chosen_span_logprob=reader.optional_number("reference_chosen_span_logprob"),
            reference_rejected_span_logprob=reader.optional_number("reference_rejected_span_logprob"),
            extra=reader.rest(),
            image_root=image_root,
            turns=turns,
        )


def _to_json(record: Sample | Candidate | Preference, optional: Sequence[str] = ()) -> dict[str, Any]:
    """Convert a record's fields that JSON has, without `optional` ones that it has not, and extra keys of other names."""
    row: dict[str, Any] = {}
    for name, value in vars(record).items():  # in the order of the fields
        if name not in ("extra", "image_root", "source") and not (name in optional and value in (None, ())):
            row[name] = [turn.to_json() for turn in value] if name == "turns" else _listed(value)
    hidden = hidden_keys(record)
    return row | {name: value for name, value in record.extra.items() if name not in hidden}


def hidden_keys(record: Sample | Candidate | Preference) -> set[str]:
    """Return the extra keys that JSON has no room for: another format's row may have a field of the name of a record's own."""
    return record.extra.keys() & (vars(record).keys() - {"image_root", "source"})


def _listed(value: Any) -> Any:
    """Return a tuple as a list, and any other value as it is."""
    return list(value) if isinstance(value, tuple) else value


def are_in_turn(roles: Sequence[str]) -> bool:
    """Return whether these roles can stand before a question: of system one at most, first, then user and assistant in pairs."""
    spoken = roles[1:] if roles[:1] == [SYSTEM] else roles
    return spoken == [USER, ASSISTANT] * (len(spoken) // 2)


# Names that other formats have for turns and images: under these they would not be part of the prompt.
_OTHER_TURNS = ("conversations", "history", "messages", "query", "system", "system_message", "system_prompt")
OTHER_IMAGES = ("image_file", "image_files", "image_path", "image_paths", "image_url", "image_urls", "img", "img_path")
# What a prompt of text and images would lose.
UNUSABLE = (
    "audio",
    "audios",
    "chat_template_kwargs",
    "rejected_images",
    "rejected_messages",
    "tools",
    "video",
    "videos",
)


class Fields:
    """Take typed fields out of one JSON object; `rest` returns the others. Errors name file, line, field and sample."""

    def __init__(self, row: Mapping[str, Any], file: str | Path, line: int | None) -> None:
        self.file, self.line = file, line
        self.sample_id: str | None = None
        if not isinstance(row, Mapping):
            raise InputError(file=file, line=line, expected="a JSON object", found=row)
        self.left = dict(row)
        name = row.get("id", row.get("sample_id"))
        self.sample_id = None if name is None else str(name)

    def error(self, name: str, expected: str, found: Any, fix: str | None = None) -> InputError:
        """Return an error about a field of this record."""
        return InputError(
            file=self.file,
            line=self.line,
            field=name,
            sample_id=self.sample_id,
            expected=expected,
            found=repr(found),
            fix=fix,
        )

    def take(
        self, name: str, expected: str, is_valid: Callable[[Any], bool] | None = None, fix: str | None = None
    ) -> Any:
        """Take a field of any value or, with `is_valid`, of values for which that holds.

        Raises:
            InputError: it is missing, or has another value, for which `fix` is what the user can do.
        """
        if name not in self.left:
            raise self.error(name, expected, "no such key", f"add {name!r} to the record")
        value = self.left.pop(name)
        if is_valid is not None and not is_valid(value):
            raise self.error(name, expected, value, fix)
        return value

    def identifier(self, name: str, default: str | None = None) -> str:
        """Take an id, a non-empty string or an integer, as a string. Raises InputError."""
        if default and name not in self.left:
            return MadeUpId(default)
        kinds = (str, int, MadeUpId)
        value = self.take(name, "an id (string or integer)", lambda value: type(value) in kinds and value != "")
        return value if isinstance(value, str) else str(value)

    def text(self, name: str) -> str:
        """Take a string that is not blank. Raises InputError."""
        return self.take(name, "a non-empty string", lambda value: isinstance(value, str) and bool(value.strip()))

    def answer(self, name: str) -> str:
        """Take an answer, a string that is not blank or a number, as a string. Raises InputError."""
        if isinstance(self.left.get(name), int | float) and not isinstance(self.left[name], bool):
            self.left[name] = str(self.left[name])
        return self.text(name)

    def optional_text(self, name: str) -> str | None:
        """Take a string, or None if it is missing or null. Raises InputError for another type."""
        value = self.left.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "a string", value)
        return value

    def sentences(self, name: str) -> tuple[str, ...]:
        """Take a list of sentences, or a single one; empty if it is missing or null. Raises InputError."""
        value = self.left.pop(name, None)
        if value is None:
            return ()
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or any(not isinstance(text, str) or not text.strip() for text in value):
            raise self.error(name, "a list of sentences, none of them empty", value)
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """Take a list of token ids; empty if it is missing. Raises InputError."""
        value = self.left.pop(name, [])
        if not isinstance(value, list) or any(type(x) is not int or not 0 <= x < 2**31 for x in value):
            raise self.error(name, "a list of token ids, integers of at least 0", value)
        return tuple(value)

    def number(self, name: str, default: float | None = None) -> float:
        """Take a finite number, or the default if it is missing or null. Raises InputError."""
        if default is not None and self.left.get(name) is None:
            self.left.pop(name, None)
            return default
        value = self.take(name, "a finite number")
        try:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self.error(name, "a finite number", value)
            return float(value)
        except OverflowError as error:
            raise self.error(name, "a finite number", "an integer beyond all floats") from error

    def peek_number(self, name: str, default: float) -> float:
        """Return a finite number, or the default if it is missing or null, and leave the field among the `rest`."""
        return type(self)({name: self.left.get(name)}, self.file, self.line).number(name, default)

    def logprob(self, name: str) -> float:
        """Take a log-probability, at most 0 within rounding. Raises InputError."""
        value = self.number(name)
        if value > LOGPROB_ROUNDING:
            raise self.error(name, "a log-probability, at most 0", value, "compute it anew: it is none of any response")
        return value

    def optional_number(self, name: str) -> float | None:
        """Take a finite number, or None if it is missing or null. Raises InputError."""
        if self.left.get(name) is None:
            self.left.pop(name, None)
            return None
        return self.number(name)

    def images(self) -> tuple[str, ...]:
        """Take the image paths of `image` or `images`; empty if both are missing or null.

        Raises:
            InputError: they are no paths, or stand under another name, or the record has what a prompt would lose.
        """
        if lost := next((name for name in UNUSABLE if self.left.get(name)), None):
            fix = "leave this record out, or what is not supported out of it"
            raise self.error(lost, "text and images alone", self.left[lost], fix)
        if not (self.left.get("image") or self.left.get("images")):
            if other := next((name for name in OTHER_IMAGES if self.left.get(name)), None):
                raise self.error(
                    other, "images under the name 'image' or 'images'", self.left[other], "rename the field"
                )
        image, images = self.left.pop("image", None), self.left.pop("images", None)
        if image is not None and images is not None:
            raise self.error("images", "either 'image' or 'images'", "both")
        value = image if image is not None else [] if images is None else images
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or any(not isinstance(path, str) or not path for path in value):
            raise self.error("images", "an image path or a list of image paths", value)
        return tuple(value)

    def turns(self) -> tuple[Turn, ...]:
        """Take the turns before the question; empty if they are missing or null.

        Raises:
            InputError: they are not in turn, one has no text, or turns stand under another format's name.
        """
        self.check_no_other_turns()
        value = self.left.pop("turns", None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(_is_turn(turn) for turn in value):
            expected = f"a list of turns {{role, content}}, role one of {SYSTEM}, {USER}, {ASSISTANT}, content a text"
            raise self.error("turns", expected, value)
        if not are_in_turn([turn["role"] for turn in value]):
            fix = "the question is the user's next turn; put it under its own name"
            expected = f"{SYSTEM} first or not at all, then {USER} and {ASSISTANT} in pairs"
            raise self.error("turns", expected, [turn["role"] for turn in value], fix)
        return tuple(Turn(turn["role"], turn["content"]) for turn in value)

    def check_no_other_turns(self) -> None:
        """Raise InputError where turns stand under a name that this format does not have."""
        if other := next((name for name in _OTHER_TURNS if self.left.get(name)), None):
            fix = "write the turns before the question as 'turns', or choose the format messages or llava"
            raise self.error(other, "turns under the name 'turns'", self.left[other], fix)

    def rest(self) -> dict[str, Any]:
        """Return the fields that were not taken."""
        return self.left


def _is_turn(value: Any) -> bool:
    """Return whether a value is a turn `{role, content}` with text, and nothing else."""
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in (SYSTEM, USER, ASSISTANT)
        and isinstance(value["content"], str)
        and bool(value["content"].strip())
    )


def settled_prompt(
    fields: Fields, name: str, turns: Sequence[Turn], question: str, num_images: int
) -> tuple[tuple[Turn, ...], str]:
    """Return a prompt's earlier turns and its question as records hold them, see `settle_marks`.

    Raises:
        InputError: marks are neither none nor as many as the images, or outside of the user's turns, or the question is nothing
            but marks.
    """
    if not turns and IMAGE_MARK not in question and question.strip():
        return (), question
    if any(IMAGE_MARK in turn.text for turn in turns if turn.role != USER):
        raise fields.error("turns", "images in the user's turns alone", IMAGE_MARK, "keep images in the user's turns")
    prompt = [Turn(turn.role, tidy(turn.text)) for turn in (*turns, Turn(USER, question))]
    check_marks(fields, count_marks(prompt), num_images)
    if not without_marks(question).strip():
        raise fields.error(name, "text beside the image marks", question)
    *before, last = settle_marks(prompt)
    return tuple(before), last.text


def check_marks(fields: Fields, marks: int, num_images: int) -> None:
    """Raise InputError where image marks are neither none nor as many as the images."""
    if marks not in (0, num_images):
        expected = f"{marks} images, as many as are marked in the text"
        raise fields.error("images", expected, num_images, f"give each image one {IMAGE_MARK}")


Record = TypeVar("Record", Sample, Preference)
Row = tuple[int, dict[str, Any] | InputError]  # 1-based line, and what stands there


def of_record(error: InputError, record: Sample | Preference) -> InputError:
    """Turn an error about a record's text or image into one that names the record, its file and line."""
    file, line = record.source or (error.file, error.line)
    found = error.found if error.file is None else f"{error.found} ({error.file})"
    return InputError(
        file=file,
        line=line,
        sample_id=record.id,
        field=error.field,
        expected=error.expected,
        found=found,
        fix=error.fix,
    )


def each_record(
    read: Callable[[Fields, Path], Sequence[Record | InputError]],
    rows: Iterable[Row],
    path: str | Path,
    image_root: Path,
) -> Iterator[tuple[int, Record | InputError]]:
    """Yield the line and the records of each row; an error takes the place of a bad record."""
    for line, row in rows:
        try:
            for record in [row] if isinstance(row, InputError) else read(Fields(row, path, line), image_root):
                yield line, record
        except InputError as error:
            yield line, error
