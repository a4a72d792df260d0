"""Turns before a sample's question, and images between the words of a prompt.

A text shows an image where IMAGE_MARK stands. A prompt (the turns before the question, then the question) has as many marks as
images, in the images' order, or none: all images then stand before the text of its first user turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_MARK = "<image>"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_LEADING_MARKS = re.compile(rf"(?:\s*{IMAGE_MARK})+\s*")


@dataclass(frozen=True, order=True, slots=True)
class Turn:
    """A turn before the question: its role (system, user or assistant) and its text, with image marks in a user's turn."""

    role: str
    text: str

    def to_json(self) -> dict[str, str]:
        """Convert to `{role, content}`."""
        return {"role": self.role, "content": self.text}


def count_marks(turns: Sequence[Turn]) -> int:
    """Count the image marks of all turns."""
    return sum(turn.text.count(IMAGE_MARK) for turn in turns)


def message_parts(text: str) -> list[dict[str, str]]:
    """Split a text at its image marks into the parts of a message, as chat templates take them; a text without is one part."""
    if IMAGE_MARK not in text:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def messages_of(turns: Sequence[Turn], question: str, num_images: int) -> list[dict[str, Any]]:
    """Build the messages of a prompt, as chat templates take them: parts of text and image, each image where it stands."""
    prompt = [*turns, Turn(USER, question)]
    unmarked = 0 if count_marks(prompt) else num_images
    messages: list[dict[str, Any]] = []
    for turn in prompt:
        images = [{"type": "image"}] * (unmarked if turn.role == USER else 0)
        unmarked -= len(images)
        messages.append({"role": turn.role, "content": [*images, *message_parts(turn.text)]})
    return messages


def without_marks(text: str) -> str:
    """Remove image marks, and the white space at both ends of a text that has some."""
    return text.replace(IMAGE_MARK, "").strip() if IMAGE_MARK in text else text


def tidy(text: str) -> str:
    """Strip a text that has image marks, and remove the white space around those that it begins with."""
    if IMAGE_MARK not in text:
        return text
    stripped = text.strip()
    leading = _LEADING_MARKS.match(stripped)
    if leading is None:
        return stripped
    return IMAGE_MARK * leading.group().count(IMAGE_MARK) + stripped[leading.end() :]


def settle_marks(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns in the form in which records hold them: without marks where these say what no marks say.

    A text of image marks alone keeps them, and text beside marks is tidied.
    """
    total = count_marks(turns)
    first = next((index for index, turn in enumerate(turns) if turn.role == USER), 0)
    default = IMAGE_MARK * total
    if total and turns[first].text.startswith(default) and turns[first].text[len(default) :].strip():
        plain = Turn(USER, turns[first].text[len(default) :])
        return [plain if index == first else turn for index, turn in enumerate(turns)]
    # Unchanged turns are not copied: a long conversation's samples share them.
    return [turn if (text := tidy(turn.text)) == turn.text else Turn(turn.role, text) for turn in turns]
