"""Turns as text and tokens, for the LVLMs of both backbones: chat templates, control tokens, ends, responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from srcfast.data.jsonl import parse_object
from srcfast.errors import InputError


class ChatModel(nn.Module):
    """What an LVLM does with text alone; a subclass sets the attributes and encodes prompts."""

    tokenizer: Any  # transformers'
    control_tokens: tuple[str, ...]  # that a question must not hold
    end_token_id: int
    max_positions: int

    def check_question(self, question: str, sample_id: str | None) -> None:
        """Raise InputError where a question holds a control token."""
        for token in self.control_tokens:
            if token in question:
                fix = "name images under 'images' only, and leave out the tokenizer's control tokens"
                raise prompt_error(sample_id, "question", f"text without {token}", question, fix)

    def check_room(self, prompt: np.ndarray, sample_id: str | None) -> None:
        """Raise InputError where a prompt [n] leaves no position for a response."""
        if len(prompt) >= self.max_positions:
            expected = f"fewer than {self.max_positions} prompt tokens, images included"
            fix = "leave this sample out: image tokens are never truncated"
            raise prompt_error(sample_id, "question", expected, f"{len(prompt)} tokens", fix)

    def encode_response(self, text: str) -> np.ndarray:
        """Tokenize a response, then the end token, into [n]; no other special token is added."""
        # Text of a data set never becomes a control token, least of all an image's placeholder.
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return np.array([*ids, self.end_token_id])

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn tokens into text, without special ones."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()


def prompt_error(sample_id: str | None, field: str, expected: str, found: object, fix: str) -> InputError:
    """Return the error of a sample that makes no prompt."""
    return InputError(sample_id=sample_id, field=field, expected=expected, found=found, fix=fix)


def adds_bos(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer has to add its special tokens: not where the template wrote the first one itself."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def control_tokens(tokenizer: Any, image_token: str) -> tuple[str, ...]:
    """List the tokens that text must not hold: those that the tokenizer names, and others that its file declares special."""
    declared = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys((image_token, *tokenizer.all_special_tokens, *declared)))


def generation_ends(path: str | Path) -> frozenset[int]:
    """Read the tokens that end a response from `generation_config.json`; none without the file. Raises InputError."""
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return frozenset()
    try:
        named = parse_object(file.read_bytes()).get("eos_token_id")
    except (OSError, ValueError) as error:
        raise InputError(file=file, expected="settings of generation, in JSON", found=error) from error
    tokens = named if isinstance(named, list) else [] if named is None else [named]
    if any(type(token) is not int for token in tokens):
        raise InputError(file=file, field="eos_token_id", expected="a token's id, or a list of them", found=repr(named))
    return frozenset(tokens)


def user_turn(content: Any) -> list[dict[str, Any]]:
    """Return a conversation of a single turn, the user's."""
    return [{"role": "user", "content": content}]


def chat_text(
    tokenizer: Any,
    turns: Sequence[dict[str, Any]],
    chat_template: str | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render turns, and the generation prompt, by `chat_template`, by default the tokenizer's, in a sandbox.

    Raises:
        InputError: the template fails, or accesses what transformers' sandbox forbids.
    """
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise SecurityError, UndefinedError, TypeError, ...
        raise InputError(
            field="chat_template",
            expected="a template that shows a user's turn",
            found=f"{type(error).__name__}: {error}",
            fix="repair the checkpoint's chat template",
        ) from error
