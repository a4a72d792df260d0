"""Turns as text and tokens, for the LVLMs of both backbones: chat templates, control tokens, ends, responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from srcfast.data.jsonl import parse_object
from srcfast.data.turns import ASSISTANT, IMAGE_MARK, USER, Turn, count_marks, message_parts, messages_of
from srcfast.errors import InputError
from srcfast.models.config_bounds import ENDS
from srcfast.models.templates import render

if TYPE_CHECKING:  # which imports this module
    from srcfast.models.placeholders import Sized

_ANSWER = "The answer."


class ChatModel(nn.Module):
    """What an LVLM does with text alone; a subclass sets the attributes and encodes prompts."""

    tokenizer: Any  # transformers'
    image_token_id: int
    image_token: str
    control_tokens: tuple[str, ...]  # that no text of a data set may spell: see `check_text`
    end_tokens: frozenset[int]  # that end a response in generation
    end_token_id: int  # that ends one in training
    response_start: str  # what the chat template writes between the generation prompt and a response's text
    max_positions: int
    adapter_path: Path | None = None
    decoder: Any
    # (rendered prompt, its images, the sample's id) -> token ids [n]. Raises InputError where it shows other images.
    _prompt_ids: Callable[[str, Sequence[Sized], str | None], np.ndarray]

    @property
    def image_placeholder(self) -> str:
        """What the chat template writes for an image."""
        return self.image_token

    @property
    def chat_template(self) -> str | None:
        """The template by which turns become text; None: the tokenizer's."""
        return None

    def chat_text(
        self, messages: Sequence[dict[str, Any]], sample_id: str | None = None, *, add_generation_prompt: bool = True
    ) -> str:
        """Render messages, and the generation prompt, by the chat template, in a sandbox. Raises InputError where it fails."""
        template = self.chat_template
        return chat_text(self.tokenizer, messages, template, sample_id, add_generation_prompt=add_generation_prompt)

    def prompt_messages(
        self, question: str, num_images: int, sample_id: str | None, turns: Sequence[Turn] = ()
    ) -> list[dict[str, Any]]:
        """Build the messages of a prompt in the form that the chat template takes.

        Raises:
            InputError: a text holds a control token; marks are neither none nor as many as the images, or outside of the user's
                turns; or the template does not show each turn.
        """
        marks = count_marks([*turns, Turn(USER, question)])
        if marks not in (0, num_images):
            fix = f"give each image one {IMAGE_MARK}, and take others out of the text"
            raise prompt_error(sample_id, "question", f"{num_images} image marks, or none", marks, fix)
        if any(IMAGE_MARK in turn.text for turn in turns if turn.role != USER):
            fix = f"take {IMAGE_MARK} out of the other turns"
            raise prompt_error(sample_id, "turns", "images in the user's turns alone", IMAGE_MARK, fix)
        messages = messages_of(turns, question, num_images)
        for message in messages:
            for part in message["content"]:
                self.check_text(part.get("text", ""), sample_id)
        return self._in_form_of_template(messages, sample_id)

    def prompt_text(self, question: str, num_images: int, sample_id: str | None, turns: Sequence[Turn] = ()) -> str:
        """Render a prompt's turns and the generation prompt, each text of them as it is but for white space at its ends.

        Raises:
            InputError: as `prompt_messages`; or the template changes a text, or leaves it out.
        """
        messages = self.prompt_messages(question, num_images, sample_id, turns)
        shown, start = self.chat_text(messages, sample_id), 0
        for message in messages:
            content = message["content"]
            for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
                if (start := shown.find(text.strip(), start)) < 0:
                    fix = "take out of the text what the checkpoint's template acts on, or leave the sample out"
                    raise prompt_error(
                        sample_id, "chat_template", "a template that shows this text as it is", text, fix
                    )
                start += len(text.strip())
        return shown

    def encode_prompt(
        self, question: str, images: Sequence[Sized], sample_id: str | None = None, turns: Sequence[Turn] = ()
    ) -> np.ndarray:
        """Tokenize a prompt's turns and the generation prompt into [n], each image's placeholder at its full length.

        Args:
            question: the last turn, a user's; see `srcfast.data.turns` for image marks.
            images: of all turns, in order; their sizes are enough where the model makes the same of them.
            sample_id: named in errors.
            turns: those before the question.

        Raises:
            InputError: a text holds a control token, the template does not show each turn and image, or the prompt leaves no
                room for a response.
        """
        text = self.prompt_text(question, len(images), sample_id, turns)
        prompt = self._prompt_ids(text, images, sample_id)
        self.check_room(prompt, sample_id)
        return prompt

    def check_text(self, text: str, sample_id: str | None = None, field: str = "question") -> None:
        """Raise InputError where a text, of a prompt or a response, spells a control token of the tokenizer or the processor."""
        for token in self.control_tokens:
            if token in text:
                fix = "name images under 'images' only, and leave out the tokenizer's control tokens"
                raise prompt_error(sample_id, field, f"text without {token}", text, fix)

    def _in_form_of_template(self, messages: list[dict[str, Any]], sample_id: str | None) -> list[dict[str, Any]]:
        """Return messages whose every text the chat template shows: as parts, or as strings where no image is.

        Raises:
            InputError: it shows neither, or fails.
        """
        error: InputError | None = None
        shape = tuple((m["role"], *(part["type"] for part in m["content"])) for m in messages)
        key = (str(self.chat_template or self.tokenizer.chat_template), shape)
        if key in self.forms:
            return [_as_text(message) if self.forms[key] else message for message in messages]
        # Quotes, a line break and the like, which a template that writes a list or JSON would escape.
        probes = [
            [
                part if part["type"] == "image" else {**part, "text": f'Turn{n}Part{i}: "2 < 3 & 4"\n\\ it\'s.'}
                for i, part in enumerate(m["content"])
            ]
            for n, m in enumerate(messages)
        ]
        probed = [{**m, "content": content} for m, content in zip(messages, probes, strict=True)]
        for as_text in (False, True):
            try:
                shown = self.chat_text([_as_text(m) if as_text else m for m in probed], sample_id)
            except InputError as failure:
                error = error if as_text else failure
                continue
            if _shows(shown, probes, self.image_placeholder):
                self.forms[key] = as_text
                return self._in_form_of_template(messages, sample_id)
        roles = " and ".join(dict.fromkeys(message["role"] for message in messages))
        fix = "leave out the turns that this checkpoint's template drops, or repair it"
        expected = f"a template that shows each turn of {roles}"
        raise error or prompt_error(sample_id, "chat_template", expected, "one that drops some or changes them", fix)

    def check_room(
        self, prompt: np.ndarray, sample_id: str | None, response: np.ndarray | None = None, field: str = "response"
    ) -> None:
        """Check a prompt [n], and a response [m] to it, if there is one.

        Raises:
            InputError: the prompt leaves no position for a response, or this one none for its last token; or the embedding lacks
                a token, other than the images' placeholder.
        """
        ids = prompt if response is None else np.concatenate([prompt, response])
        if (largest := int(ids.max(initial=0, where=ids != self.image_token_id))) >= self.decoder.config.vocab_size:
            expected, fix = (
                f"tokens below {self.decoder.config.vocab_size}, of the model's embedding",
                "repair the tokenizer",
            )
            raise prompt_error(sample_id, "tokenizer", expected, largest, fix)
        if response is not None and len(ids) > self.max_positions:
            expected, found = f"at most {self.max_positions} tokens of prompt and response, images included", len(ids)
            raise prompt_error(sample_id, field, expected, f"{found} tokens", "leave this sample out, or shorten it")
        if len(prompt) >= self.max_positions:
            expected = f"fewer than {self.max_positions} prompt tokens, images included"
            fix = "leave this sample out: image tokens are never truncated"
            raise prompt_error(sample_id, "question", expected, f"{len(prompt)} tokens", fix)

    def read_tokens(self, path: Path, config: Any, processor: Any = None) -> None:
        """Set what tokenizer, processor, `generation_config.json` and chat template say of tokens, but for `image_token_id`.

        Raises:
            InputError: the embedding lacks the token that ends a response.
        """
        self.forms: dict[Any, bool] = {}
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.end_tokens = frozenset({int(self.tokenizer.eos_token_id), *generation_ends(path)})
        self.control_tokens = control_tokens(self.tokenizer, self.image_token, config, processor)
        self.control_ids = {*self.tokenizer.convert_tokens_to_ids(list(self.control_tokens))}
        self.read_response_form()
        self.check_room(np.array([self.end_token_id]), None)

    def read_response_form(self) -> None:
        """Read from the chat template how an assistant's turn begins and ends: `response_start` and `end_token_id`.

        The end is the first special token behind the text, which then ends generation, too; the tokenizer's end token where the
        template writes none.
        """
        self.response_start, self.end_token_id = "", int(self.tokenizer.eos_token_id)
        said = [{"role": role, "content": message_parts(_ANSWER)} for role in (USER, ASSISTANT)]
        try:
            said = self._in_form_of_template(said, None)
            prompt, whole = self.chat_text(said[:1]), self.chat_text(said, add_generation_prompt=False)
        except InputError:  # a template of users' turns alone
            return
        head, _, behind = whole.rpartition(_ANSWER)
        special = {self.tokenizer.convert_tokens_to_ids(token) for token in self.control_tokens}
        ends = (token for token in self._ids(behind) if token in self.end_tokens or token in special)
        self.end_token_id = next(ends, self.end_token_id)
        self.end_tokens |= {self.end_token_id}
        if not head.startswith(prompt):
            return
        start, before, expected = head[len(prompt) :], self._ids(prompt), self._ids(head + _ANSWER)
        # Some tokenizers put a space before any text; with those the template's must not be written again.
        if [*before, *self.encode_response(_ANSWER)[:-1].tolist()] != expected:
            self.response_start = start

    def encode_response(self, text: str) -> np.ndarray:
        """Tokenize a response as the chat template shows it in an assistant's turn, then the end token, into [n]."""
        start = self.response_start
        if start.strip():
            return np.array([*self._ids(start), *self._text_ids(text), self.end_token_id])
        return np.array([*self._text_ids(start + text), self.end_token_id])

    def response_tokens(self, prompt: np.ndarray, text: str, sample_id: str, field: str) -> np.ndarray:
        """Tokenize a response of a data set to a prompt [n] as `encode_response` does, into [m].

        Raises:
            InputError: it spells a control token, or the model has no position for its end; the sample and field are named.
        """
        self.check_text(text, sample_id, field)
        response = self.encode_response(text)
        self.check_room(prompt, sample_id, response, field)
        return response

    def _ids(self, text: str) -> list[int]:
        """Tokenize a template's text, in which special tokens are what they are."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text_ids(self, text: str) -> list[int]:
        """Tokenize text of a data set, which never becomes a control token, least of all an image's placeholder."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if not self.control_ids.intersection(ids):
            return ids
        spelled = next((token for token in self.control_tokens if token in text), None)
        if spelled is None:  # such as the unknown token, of an unknown character
            return ids
        # The tokenizer's file does not declare the token special: no piece holds all of it.
        first, rest = spelled[:1], spelled[1:]
        pieces = text.split(spelled)
        pieces = [rest * (index > 0) + piece + first * (index < len(pieces) - 1) for index, piece in enumerate(pieces)]
        return [token for piece in pieces for token in self._text_ids(piece)]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn a response's tokens into text, without special ones and what the template writes before the text."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()
        return text.removeprefix(self.response_start.strip()).strip()


def _shows(text: str, contents: Sequence[Sequence[Mapping[str, str]]], placeholder: str) -> bool:
    """Return whether a text shows each part of text once, in order, and images in their turns, between its texts."""
    counts = [sum(part["type"] == "image" for part in content) for content in contents]
    end = 0
    for number, content in enumerate(contents):
        between = None  # images since the turn's last text
        for part in content:
            if part["type"] == "image":
                between = None if between is None else between + 1
                continue
            start = text.find(part["text"], end)
            before = text.count(placeholder, 0, start) - sum(counts[:number])
            moved = counts.count(0) < len(counts) - 1 and not 0 <= before <= counts[number]
            if start < 0 or moved or text.count(part["text"]) > 1:
                return False
            if between is not None and text.count(placeholder, end, start) != between:
                return False
            end, between = start + len(part["text"]), 0
    return True


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of the system or the assistant with a string for its part."""
    return message if message["role"] == USER else {**message, "content": message["content"][0]["text"]}


def prompt_error(sample_id: str | None, field: str, expected: str, found: object, fix: str) -> InputError:
    """Return the error of a sample that makes no prompt."""
    return InputError(sample_id=sample_id, field=field, expected=expected, found=found, fix=fix)


def adds_bos(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer has to add its special tokens: not where the template wrote the first one itself."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def control_tokens(tokenizer: Any, image_token: str, config: Any, processor: Any = None) -> tuple[str, ...]:
    """List the tokens that no text may spell, whether the tokenizer's file declares them special or not.

    They are those that tokenizer, processor and config name (of images, videos, sounds, padding, ends), those that are declared
    special, and added ones that the embedding lacks.
    """
    added = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    declared = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    numbers = [number for name, number in vars(config).items() if name.endswith((*ENDS,)) and isinstance(number, int)]
    beyond = [number for number in added if number >= config.get_text_config().vocab_size]
    named = [added[number] for number in (*numbers, *beyond) if number in added]
    for owner in (tokenizer, processor) if processor is not None else (tokenizer,):
        named += [
            name for key, name in vars(owner).items() if key.endswith("_token") and isinstance(name, str) and name
        ]
    return tuple(dict.fromkeys((image_token, *tokenizer.all_special_tokens, *declared, *named)))


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
    return [{"role": USER, "content": content}]


def chat_text(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    chat_template: str | None = None,
    sample_id: str | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render messages, and the generation prompt, by `chat_template`, by default the tokenizer's, in a sandbox.

    Raises:
        InputError: the template fails, or accesses what transformers' sandbox forbids.
    """
    try:
        template = tokenizer.get_chat_template(chat_template)
        return render(template, messages, add_generation_prompt=add_generation_prompt, **tokenizer.special_tokens_map)
    except Exception as error:  # templates raise SecurityError, UndefinedError, TypeError, ...
        roles = " and ".join(dict.fromkeys(message["role"] for message in messages))
        fix = "" if roles == USER else ", or leave out the turns that it does not take"
        raise prompt_error(
            sample_id,
            "chat_template",
            f"a template that shows turns of {roles}",
            f"{type(error).__name__}: {error}",
            f"repair the checkpoint's chat template{fix}",
        ) from error
