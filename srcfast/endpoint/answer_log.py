"""A file of all answers that an endpoint has given, by the content of the request: none is asked, and paid, twice.

A line is written and flushed as soon as an answer is there, so a killed process has lost the requests that were under way. The
last line of a file is removed if it was cut off.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import naming, read_jsonl
from srcfast.endpoint.client import Answer
from srcfast.errors import InputError


def content_key(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a request asks, written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


class AnswerLog:
    """The answers of a file, and those that are added to it; for several threads.

    Raises:
        InputError: a line is no answer.
    """

    def __init__(self, path: Path) -> None:
        self._answers: dict[str, Answer] = {}
        self.prompt_tokens = self.completion_tokens = 0
        self._path, self._writing = path, threading.Lock()
        self._claims: set[str] = set()
        self._released = threading.Condition()
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115  (closed by `close`)
            written = path.read_bytes()
            self._file.truncate(written.rfind(b"\n") + 1)  # a line that was cut off
        for line, row in read_jsonl(path):
            try:
                self._count(row["prompt_tokens"], row["completion_tokens"])
                if row["text"] is not None:
                    first_token = row.get("first_token")
                    if first_token is not None:
                        first_token = {str(token): float(value) for token, value in first_token.items()}
                    self._answers[row["key"]] = Answer(row["text"], bool(row["truncated"]), None, None, first_token)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                expected = "an answer {key, text, truncated, prompt_tokens, completion_tokens}"
                fix = "restore the file, or remove it: all is asked again then"
                raise InputError(file=path, line=line, expected=expected, found=error, fix=fix) from error

    def _count(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    @contextmanager
    def claimed(self, key: str) -> Iterator[Answer | None]:
        """Yield the answer to a request; None: it has none yet, and no other thread asks it while the body runs."""
        with self._released:
            while key in self._claims:
                self._released.wait()
            self._claims.add(key)
        try:
            yield self._answers.get(key)
        finally:
            with self._released:
                self._claims.remove(key)
                self._released.notify_all()

    def add(self, key: str, answer: Answer | None, tokens: tuple[int, int]) -> None:
        """Add an answer and the tokens of prompt and answer that it took; None: tokens were spent on an answer of no use."""
        row: dict[str, Any] = {"key": key, "text": None if answer is None else answer.text}
        row |= {"truncated": answer is not None and answer.truncated}
        row |= {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        if answer is not None and answer.first_token is not None:
            row["first_token"] = dict(answer.first_token)
        with self._writing, naming(self._path):
            self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
            self._file.flush()
            self._count(*tokens)
            if answer is not None:
                self._answers[key] = answer

    def close(self) -> None:
        """Close the file."""
        self._file.close()
