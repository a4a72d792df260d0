"""Errors that a user can act on: each says where, what was expected, what was found, and how to fix it."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

# Control characters except tab and line feed, marks that change the direction of writing, halves of surrogate pairs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escape the characters of a text that a terminal would obey instead of show, as \\x1b."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


class SrcfastError(Exception):
    """Base of every error that srcfast raises on purpose; the command line shows its text without a trace."""


class ConfigError(SrcfastError):
    """A setting that is unknown, malformed or out of bounds."""


class OutOfMemory(SrcfastError):
    """A stage ran out of memory; the text has its forecast and the settings to change."""


class Interrupted(BaseException):
    """A signal has stopped the run. The process exits with `status`, 128 + the signal's number.

    Not an `Exception`, just as KeyboardInterrupt is not: code that takes every error of a library for a bad image or file must
    not take a signal that arrives at that moment for one.

    Args:
        number: number of the signal.
        done: the last step or item that was finished, or "at once".
    """

    def __init__(self, number: int, done: str = "") -> None:
        self.status = 128 + number
        where = "" if not done else f" {done}" if done == "at once" else f" after {done}"
        super().__init__(f"stopped by {signal.Signals(number).name}{where}. The same command continues")


class InputError(SrcfastError):
    """A file, record or tensor is not what srcfast expects.

    Args:
        file: path of the file.
        line: line of the file, from 1.
        field: the record's field or the tensor's name.
        expected: what srcfast expects.
        found: what the file, record or tensor has; long values are shortened.
        fix: what the user can do about it.
        sample_id: id of the sample, if known.
    """

    def __init__(
        self,
        *,
        expected: str,
        found: Any,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        fix: str | None = None,
        sample_id: str | None = None,
    ) -> None:
        self.file = None if file is None else str(file)
        self.line = line
        self.field = field
        self.expected = expected
        self.found = shorten(str(found))
        self.fix = fix
        self.sample_id = sample_id
        super().__init__(self._text())

    def _text(self) -> str:
        parts = [
            self.file,
            None if self.line is None else f"line {self.line}",
            None if self.sample_id is None else f"sample {self.sample_id!r}",
            None if self.field is None else f"field {self.field!r}",
        ]
        where = ", ".join(part for part in parts if part)
        text = f"{where}: " if where else ""
        text += f"expected {self.expected}, found {self.found}"
        return text if self.fix is None else f"{text}. Fix: {self.fix}"

    def as_record(self) -> dict[str, Any]:
        """Return the row of `rejected.jsonl` for this error; characters that are not UTF-8 are escaped."""
        row = {
            "file": self.file,
            "line": self.line,
            "field": self.field,
            "expected": self.expected,
            "found": self.found,
            "sample_id": self.sample_id,
            "reason": str(self),
        }
        return {
            name: value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
            for name, value in row.items()
        }


def shorten(text: str, limit: int = 200) -> str:
    """Cut a text off after `limit` characters, and append its length."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
