"""Errors that a user can act on: each says where, what was expected, what was found, and how to fix it."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

# Control characters but tab and line break, marks that turn the direction of writing, halves of surrogate pairs.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text out of data, fit for a terminal: what the terminal would obey instead of show is spelled out (\\x1b)."""
    return _OBEYED.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


class SrcfastError(Exception):
    """Base of every error that srcfast raises on purpose; the command line shows its text without a trace."""


class ConfigError(SrcfastError):
    """A setting that is unknown, malformed or out of bounds."""


class OutOfMemory(SrcfastError):
    """A stage that found less memory than it needs: with its forecast, and the setting to change."""


class Interrupted(BaseException):
    """A run that a signal asked to stop; the exit status of its process is `status`, 128 + the signal's number.

    No `Exception`, as KeyboardInterrupt is none: where any error of a library is taken for a bad image or file, a signal that
    arrives at that moment must not be.

    Args:
        number: the signal's.
        done: what was done last, or "at once".
    """

    def __init__(self, number: int, done: str = "") -> None:
        self.status = 128 + number
        where = "" if not done else f" {done}" if done == "at once" else f" after {done}"
        super().__init__(f"stopped by {signal.Signals(number).name}{where}. The same command continues")


class InputError(SrcfastError):
    """A file, record or tensor that is not what it must be.

    Args:
        file: the file in question.
        line: 1-based line within it.
        field: the record's field or the tensor's name.
        expected: what should have been there.
        found: what was there; long values are shortened.
        fix: what the user can do about it.
        sample_id: the sample's id, where one is known.
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
        places = [
            self.file,
            None if self.line is None else f"line {self.line}",
            None if self.sample_id is None else f"sample {self.sample_id!r}",
            None if self.field is None else f"field {self.field!r}",
        ]
        where = ", ".join(place for place in places if place)
        text = f"{where}: " if where else ""
        text += f"expected {self.expected}, found {self.found}"
        return text if self.fix is None else f"{text}. Fix: {self.fix}"

    def as_record(self) -> dict[str, Any]:
        """The row that `rejected.jsonl` keeps of this error: what is not UTF-8 is spelled out in it."""
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
    """A text for an error, cut off after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
